"""The page of an experiment in a real browser: as ``test_browser`` for the other pages."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from browser import BROWSER, DARK, LIGHT, PROBE, browse
from PIL import Image
from report_samples import write_experiment

from raymerge.report import write_report

pytestmark = [
    pytest.mark.skipif(
        BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH"
    ),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_experiment(tmp_path_factory.mktemp("report")))


@pytest.mark.parametrize(("scheme", "paper"), [(LIGHT, (255, 255, 255)), (DARK, (20, 23, 26))])
def test_it_renders_in_light_and_dark(
    report: Path, tmp_path: Path, scheme: str, paper: tuple[int, int, int]
) -> None:
    picture = tmp_path / "page.png"
    options = (scheme, "--window-size=1200,1600", f"--screenshot={picture}")
    browse(report, tmp_path / "profile", *options)
    image = Image.open(io.BytesIO(picture.read_bytes())).convert("RGB")
    assert image.getpixel((5, 5)) == paper
    darkest, brightest = image.convert("L").getextrema()
    assert brightest - darkest > 180


@pytest.mark.parametrize("width", [1400, 600])
def test_nothing_is_cut_off_or_wider_than_the_window(
    report: Path, tmp_path: Path, width: int
) -> None:
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    probed, count = policy.subn(PROBE, report.read_text(encoding="utf-8"))
    assert count == 1
    page = tmp_path / "page.html"
    page.write_text(probed, encoding="utf-8")
    done = browse(page, tmp_path / "profile", f"--window-size={width},900", "--dump-dom")
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stdout[:300]
    found = json.loads(title.group(1))
    assert found["overflow"] <= 0
    assert found["outside"] == []
    assert found["texts"] > 20


def test_it_prints(report: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.pdf"
    options = ("--no-pdf-header-footer", f"--print-to-pdf={target}")
    browse(report, tmp_path / "profile", *options)
    content = target.read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 6

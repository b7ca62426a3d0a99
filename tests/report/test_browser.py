"""The page in a real browser: no console message, both colour schemes, nothing cut off."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from browser import BROWSER, DARK, LIGHT, PROBE, browse
from PIL import Image
from report_samples import (
    EIGHT,
    TWENTY,
    vit_layers,
    write_comparison,
    write_experiment,
    write_run,
)

from raymerge.report import write_report

pytestmark = [
    pytest.mark.skipif(
        BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the PATH"
    ),
    pytest.mark.timeout(300),
]
NAMES = ("run", "large", "demo", "experiment")


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reports")
    run = write_run(root / "run", steps=100)
    large = write_run(root / "large", tasks=TWENTY, layers=vit_layers(24), steps=100)
    demo = write_comparison(root / "demo", tasks=EIGHT, steps=100)
    experiment = write_experiment(root / "experiment")
    return {folder.name: write_report(folder) for folder in (run, large, demo, experiment)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("scheme", "paper"), [(LIGHT, (255, 255, 255)), (DARK, (20, 23, 26))])
def test_it_renders_in_light_and_dark(reports, tmp_path, name, scheme, paper):
    picture = tmp_path / "page.png"
    options = (scheme, "--window-size=1200,1600", f"--screenshot={picture}")
    browse(reports[name], tmp_path / "profile", *options)
    image = Image.open(io.BytesIO(picture.read_bytes())).convert("RGB")
    assert image.getpixel((5, 5)) == paper
    darkest, brightest = image.convert("L").getextrema()
    assert brightest - darkest > 180


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [1400, 600])
def test_nothing_is_cut_off_or_wider_than_the_window(reports, tmp_path, name, width):
    html = reports[name].read_text(encoding="utf-8")
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    probed, count = policy.subn(PROBE, html)
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


@pytest.mark.parametrize(("name", "most"), [("demo", 10), ("experiment", 6)])
def test_it_prints(reports, tmp_path, name, most):
    target = tmp_path / "page.pdf"
    options = ("--no-pdf-header-footer", f"--print-to-pdf={target}")
    browse(reports[name], tmp_path / "profile", *options)
    content = target.read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= most

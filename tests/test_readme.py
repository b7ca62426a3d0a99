"""Every command of the README and of docs/try_it.md runs, on a small world at their paths."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from world import World

from raymerge.cli import main
from raymerge.config import load_config
from raymerge.distributed.submission import Submission

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRY_IT = (ROOT / "docs/try_it.md").read_text(encoding="utf-8")
# Run elsewhere: make demo and make test by CI, the demo by tests/apps/test_demo.py.
ELSEWHERE = ("make ", "pip install", "raymerge demo")


def _blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)


def _commands(page: str = README) -> list[str]:
    blocks = _blocks("sh", page)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(ELSEWHERE)]


@pytest.fixture(scope="module")
def project(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's folder: its my_merge.yaml as printed, with the world's files at its paths."""
    root = tmp_path_factory.mktemp("readme")
    (block,) = (b for b in _blocks("yaml") if b.startswith("# my_merge.yaml"))
    (root / "my_merge.yaml").write_text(block)
    shutil.copytree(world.root / "pretrained", root / "pretrained")
    for task, source in zip(yaml.safe_load(block)["tasks"], world.config["tasks"], strict=False):
        for key in ("checkpoint", "classnames", "adapt", "test"):
            (root / task[key]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source["checkpoint"], root / task["checkpoint"])
        (root / task["classnames"]).write_text("\n".join(source["classnames"]))
        shutil.copytree(source["adapt"], root / task["adapt"])
        shutil.copytree(source["test"], root / task["test"])
    return root


def test_the_readme_has_commands() -> None:
    assert len(_commands()) >= 5
    assert all(command.startswith("raymerge ") for command in _commands())


def test_every_command_runs_in_order(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr("raymerge.distributed.jobs.submit", _run_here)
    for command in _commands():
        argv = shlex.split(command.replace("/shared/project", str(project)))[1:]
        if argv[0] in ("plan", "merge", "eval", "submit"):  # 500 steps say no more here than 20
            argv += ["-o", "optimizer.steps=20", "-o", "cluster.workers=0"]
        assert main(argv) == 0, (command, capsys.readouterr().err)
    assert (project / "runs/my_merge/open_clip_model.safetensors").exists()


def test_every_command_of_the_try_it_page_runs_in_order(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo/zoo.yaml").write_text(yaml.safe_dump(world.config))
    monkeypatch.chdir(tmp_path)
    commands = _commands(TRY_IT)
    assert len(commands) >= 5
    for command in commands:
        few = ["-o", "optimizer.steps=5", "-o", "optimizer.batch_size=4", "-o", "cluster.workers=0"]
        argv = [*shlex.split(command)[1:], *few]
        assert main(argv) == 0, (command, capsys.readouterr().err)
    for folder in re.findall(r"runs/(?!demo)\w+", TRY_IT):
        assert (tmp_path / folder / "report.html").exists(), folder


def _run_here(address: str, submission: Submission, **given: object) -> int:
    """In place of a cluster, which distributed/test_job.py has: its command, on what travels."""
    (sent := Path("sent")).mkdir()
    (sent / "config.yaml").write_text(submission.text)
    return main(["merge", str(sent / "config.yaml"), "--resume"])


def test_the_python_blocks_run(project: Path) -> None:
    (project / "runs").mkdir(exist_ok=True)
    python = [b.replace('"output=', '"optimizer.steps=5", "output=') for b in _blocks("python")]
    assert any("raymerge.merge(" in block for block in python)
    code = "\n".join(sorted(python, key=lambda block: "open_clip" in block))
    code = code.replace("local-dir:runs/my_merge", "local-dir:runs/from_python")
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_shipped_configs_are_valid(name: str, tmp_path: Path) -> None:
    config = tmp_path / name
    shutil.copy(ROOT / "configs" / name, config)
    for task in yaml.safe_load(config.read_text()).get("tasks", []):
        if isinstance(task["classnames"], str):
            path = tmp_path / task["classnames"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("one\ntwo\n")
    loaded = load_config(config)
    assert loaded.method.name == "adamerging"


def test_links_to_files_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link

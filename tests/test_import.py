"""What importing costs: instant commands, maths without Ray, Ray in one place."""

from __future__ import annotations

import ast
import json
import pkgutil
from pathlib import Path

import pytest
from commands import config_data, python, write_config
from world import World

import raymerge
import raymerge.merging

PACKAGE = Path(raymerge.__file__).parent
HEAVY = ("torch", "ray", "numpy", "open_clip", "pydantic", "yaml", "matplotlib", "tqdm")


def _loaded(code: str, *argv: object) -> set[str]:
    """Top-level modules in a fresh interpreter after ``code``."""
    tail = "\nimport json, sys; print('\\n' + json.dumps(sorted(sys.modules)))"
    ran = python(code + tail, *argv)
    assert ran.returncode == 0, ran.stderr
    return {name.split(".")[0] for name in json.loads(ran.stdout.splitlines()[-1])}


def _imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module))
    return found


def _sources(folder: str = "") -> list[Path]:
    sources = sorted((PACKAGE / folder).rglob("*.py"))
    assert sources
    return sources


@pytest.mark.parametrize(
    "code",
    [
        "import raymerge, raymerge.cli",
        "import raymerge.errors",
        "from raymerge.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from raymerge.cli import main\ntry: main(['merge', '--help'])\nexcept SystemExit: pass",
        "from raymerge.cli import main\nmain(['--version'])",
        "from raymerge.cli import main\ntry: main(['nonsense'])\nexcept SystemExit: pass",
    ],
)
def test_the_command_line_imports_nothing_heavy(code: str) -> None:
    assert not _loaded(code) & set(HEAVY)


def test_config_imports_neither_torch_nor_ray() -> None:
    loaded = _loaded("import raymerge; raymerge.load_config")
    assert "pydantic" in loaded
    assert not loaded & {"torch", "ray", "numpy", "open_clip"}


def test_the_maths_never_imports_ray() -> None:
    modules = [
        m.name for m in pkgutil.walk_packages(raymerge.merging.__path__, "raymerge.merging.")
    ]
    assert len(modules) > 5
    loaded = _loaded("\n".join(f"import {name}" for name in modules))
    assert "torch" in loaded
    assert not loaded & {"ray", "open_clip"}


def test_only_distributed_imports_ray() -> None:
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in _sources()
        if any(name.split(".")[0] == "ray" for name in _imports(path))
    }
    assert users == {"distributed"}


WITHOUT_RAY = {"raymerge.distributed.placement", "raymerge.distributed.submission"}


def test_ray_is_imported_only_where_workers_are_opened() -> None:
    """Outside ``distributed``, a module's top imports only those of its modules without Ray."""
    for path in _sources():
        if path.is_relative_to(PACKAGE / "distributed"):
            continue
        top = {
            str(node.module)
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ImportFrom)
        }
        assert not [
            name for name in top - WITHOUT_RAY if name.startswith("raymerge.distributed")
        ], path
    assert "ray" not in _loaded("\n".join(f"import {name}" for name in sorted(WITHOUT_RAY)))


def test_the_maths_knows_no_files_and_no_models() -> None:
    allowed = ("raymerge.merging", "raymerge.errors", "raymerge.config")
    for path in _sources("merging"):
        own = {name for name in _imports(path) if name.startswith("raymerge.")}
        assert all(name.startswith(allowed) for name in own), (path, own)


def test_every_public_name_is_there() -> None:
    for name in raymerge.__all__:
        assert getattr(raymerge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = raymerge.nonsense


def test_a_static_merge_of_plain_vits_imports_no_model_no_ray_and_no_plots(
    world: World, tmp_path: Path
) -> None:
    data = config_data(world)
    for task in data["tasks"]:
        del task["test"]
    config = write_config(tmp_path / "config.yaml", data)
    code = """
import sys
from raymerge.cli import main
config, out = sys.argv[1:]
for method in ("average", "task_arithmetic", "ties"):
    assert main(["merge", config, "--output", f"{out}/{method}", "-o", f"method={method}"]) == 0
"""
    loaded = _loaded(code, config, tmp_path)
    assert "torch" in loaded
    assert not loaded & {"open_clip", "torchvision", "timm", "ray", "matplotlib"}
    assert (tmp_path / "ties" / "report.html").exists()
    assert not (tmp_path / "ties" / "lambda_heatmap.png").exists()


def test_local_work_never_imports_ray(world: World, tmp_path: Path) -> None:
    """Static merges, also with ``workers: 3`` where no image is scored, and in-process learning."""
    data = config_data(world, cluster={"workers": 3, "cpus_per_worker": 1})
    for task in data["tasks"]:
        del task["test"]
    config = write_config(tmp_path / "config.yaml", data)
    tested = write_config(tmp_path / "tested.yaml", config_data(world))
    code = """
import sys
from raymerge.cli import main
import raymerge.runs.folder
raymerge.runs.folder.write_plots = lambda folder: None  # matplotlib takes a second
config, tested, out = sys.argv[1:]
for method in ("average", "ties"):
    assert main(["merge", config, "--output", f"{out}/{method}", "-o", f"method={method}"]) == 0
assert main(["merge", tested, "--output", f"{out}/learned", "-o", "optimizer.steps=1"]) == 0
assert main(["plan", config]) == main(["eval", tested]) == 0
"""
    assert "ray" not in _loaded(code, config, tested, tmp_path)
    assert (tmp_path / "learned" / "results.json").exists()

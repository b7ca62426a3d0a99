"""The cost of importing: the libraries that a command, the config, the maths and a merge load.

Which module may import which is tested in test_rooms.py.
"""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path

import pytest
from commands import config_data, python, write_config
from world import World

import raymerge
import raymerge.merging

HEAVY = ("torch", "ray", "numpy", "open_clip", "pydantic", "yaml", "matplotlib", "tqdm")


def _loaded(code: str, *argv: object) -> set[str]:
    """Top-level modules in a fresh interpreter after ``code``."""
    tail = "\nimport json, sys; print('\\n' + json.dumps(sorted(sys.modules)))"
    ran = python(code + tail, *argv)
    assert ran.returncode == 0, ran.stderr
    return {name.split(".")[0] for name in json.loads(ran.stdout.splitlines()[-1])}


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

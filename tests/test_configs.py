"""Every YAML under configs/ parses, the methods' own are ready to run, the docs agree with them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from world import World

from raymerge.config import METHOD_NAMES, Config, MethodConfig, load_config
from raymerge.config.experiments import load_experiment
from raymerge.config.methods import AdaMerging
from raymerge.distributed.placement import Resources
from raymerge.merging.registry import METHODS, needed_images
from raymerge.runs.plan.make import make_plan

CONFIGS = Path(__file__).parent.parent / "configs"
ALL = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
FAMILIES = (*METHOD_NAMES, "adamerging_kl")


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A copy, with the files of class names that they refer to."""
    root = tmp_path / "configs"
    shutil.copytree(CONFIGS, root)
    for path in root.rglob("*.yaml"):
        for task in yaml.safe_load(path.read_text()).get("tasks", []):
            if isinstance(task.get("classnames"), str):
                names = path.parent / task["classnames"]
                names.parent.mkdir(parents=True, exist_ok=True)
                names.write_text("one\ntwo\n")
    return root


@pytest.mark.parametrize("name", ALL)
def test_it_parses(configs: Path, name: str) -> None:
    data = yaml.safe_load((configs / name).read_text())
    if "experiment" in data:
        assert load_experiment(configs / name).output is not None
        return
    config = load_config(configs / name)
    assert config.output is not None
    assert (configs / name).read_text().startswith("# ")  # it says what it is


def test_every_method_has_one() -> None:
    assert sorted(f"methods/{name}.yaml" for name in FAMILIES) == [
        name for name in ALL if name.startswith("methods/")
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_methods_config_spells_its_defaults_and_has_the_images_it_needs(
    configs: Path, name: str
) -> None:
    """What the file gives is what the schema has by default, but where it is a recipe."""
    path = configs / "methods" / f"{name}.yaml"
    config = load_config(path)
    given = yaml.safe_load(path.read_text())["method"]
    assert config.method.name == given["name"] == name.split("_kl")[0]
    recipe = {"start", "iterations", "step_size", "oracle"} if name == "fw_hard" else set()
    for key in given.keys() - recipe:
        field = type(config.method).model_fields[key]
        assert field.is_required() or given[key] == field.default, key
    adapted = {task.adapt is not None for task in config.tasks}
    assert adapted == {needed_images(config) != "none"}


def test_the_kl_config_is_samerging(configs: Path) -> None:
    config = load_config(configs / "methods" / "adamerging_kl.yaml")
    method, given = config.method, config.optimizer
    assert isinstance(method, AdaMerging)
    assert (method.objective, method.temperature, method.init, method.clamp) == (
        "kl", 2.0, 0.0, "none"
    )  # fmt: skip
    assert (given.steps, given.images_per_step, given.lr, given.sharpness) == (100, 16, 1e-2, 0.07)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_methods_config_is_ready_to_run(configs: Path, world: World, name: str) -> None:
    """On the world's model and images instead of its own."""
    loaded = load_config(configs / "methods" / f"{name}.yaml")
    plan = make_plan(_on(world, loaded), Resources(cpus=2))
    assert plan.models == (1 if name == "joint" else 4)
    assert bool(plan.steps) == (METHODS[loaded.method.name].loop is not None)


def _on(world: World, config: Config) -> Config:
    tasks: list[dict[str, Any]] = [dict(task) for task in world.config["tasks"]]
    for task in tasks:
        if needed_images(config) == "labelled":
            task["adapt"] = task["test"]
    method = config.method.model_dump(exclude={"start", "checkpoint"})
    if config.method.name == "joint":
        method["checkpoint"] = tasks[0]["checkpoint"]
    return world.parse(tasks=tasks, method=method)


# --- what the documentation says ---------------------------------------------------------------

DOCS = CONFIGS.parent / "docs"


def _section(title: str) -> str:
    text = (DOCS / "config.md").read_text(encoding="utf-8")
    return re.split(r"^#+ ", text.split(f"\n### {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_every_option_is_documented_with_its_default(name: str) -> None:
    (cls,) = (c for c in get_args(get_args(MethodConfig)[0]) if _tag(c) == name)
    fields = {key: field for key, field in cls.model_fields.items() if key != "name"}
    if not fields:
        assert f"`{name}`" in (DOCS / "config.md").read_text(encoding="utf-8")
        return
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", _section(name), flags=re.MULTILINE))
    assert rows.keys() == fields.keys()
    for key, field in fields.items():
        if field.is_required():
            assert rows[key] == "required"
        elif field.default is not None:
            given = yaml.safe_load(rows[key].strip("`"))
            assert given == field.default, (key, rows[key], field.default)


def _tag(cls: Any) -> str:
    tag: str = get_args(cls.model_fields["name"].annotation)[0]
    return tag


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_every_method_has_its_section(name: str) -> None:
    assert f"`{name}`" in (DOCS / "methods.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["config.md", "methods.md"])
def test_links_of_the_pages_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", (DOCS / page).read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = DOCS / page if not path else DOCS / path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}

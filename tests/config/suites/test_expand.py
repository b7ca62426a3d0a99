"""`suite:` and `dataset:` in a config stand for plain tasks, or are one line saying why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from raymerge.config import Config, dump_config, load_config, parse_config
from raymerge.config.suites import SUITES, load_data_set
from raymerge.errors import ConfigError

MODEL = {"arch": "ViT-B-32-quickgelu", "pretrained": "openai"}
FILES = {"checkpoints": "ckpts/{task}/finetuned.pt", "data": "data/{task}/{split}"}
CONFIGS = Path(__file__).parents[3] / "configs"


def _parse(root: Path = Path("/root"), **sections: Any) -> Config:
    return parse_config({"model": MODEL, **sections}, root=root)


def _suite(**keys: Any) -> dict[str, Any]:
    return {"name": "vit-8", **FILES, **keys}


def _refusal(**sections: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        _parse(**sections)
    message = str(raised.value)
    assert "\n" not in message
    assert raised.value.exit_code == 2
    return message


# --- suite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_stands_for_its_tasks(name: str) -> None:
    config = _parse(suite=_suite(name=name))
    assert config.task_names == config.model_names == SUITES[name]
    for task in config.tasks:
        spec = load_data_set(task.name)
        assert (task.classnames, task.templates) == (spec.classnames, spec.templates)
        assert task.checkpoint == f"/root/ckpts/{task.name}/finetuned.pt"
        assert task.adapt == f"/root/data/{task.name}/adapt"
        assert task.test == f"/root/data/{task.name}/test"
        assert task.train is None


def test_it_is_short_for_what_one_could_write() -> None:
    spec = load_data_set("mnist")
    written = {
        "name": "mnist",
        "checkpoint": "ckpts/mnist/finetuned.pt",
        "classnames": list(spec.classnames),
        "templates": list(spec.templates),
        "adapt": "data/mnist/adapt",
        "test": "data/mnist/test",
    }
    assert _parse(suite=_suite(only=["mnist"])) == _parse(tasks=[written])


def test_without_checkpoints_the_images_are_to_train_and_to_test_on() -> None:
    config = _parse(suite={"name": "vit-8", "data": FILES["data"]})
    task = config.tasks[0]
    assert task.checkpoint is None
    assert task.adapt is None
    assert (task.train, task.test) == ("/root/data/sun397/train", "/root/data/sun397/test")


def test_a_split_of_its_own_replaces_data() -> None:
    suite = _suite(adapt="data/{task}/test", train="more/{task}", only=["dtd"])
    (task,) = _parse(suite=suite).tasks
    assert (task.adapt, task.test) == ("/root/data/dtd/test", "/root/data/dtd/test")
    assert task.train == "/root/more/dtd"
    (task,) = _parse(suite=_suite(adapt=None, only=["dtd"])).tasks
    assert (task.adapt, task.test) == (None, "/root/data/dtd/test")


def test_a_suite_without_images_is_only_merged() -> None:
    config = _parse(suite={"name": "vit-20", "checkpoints": "s3://b/{task}.pt"}, method="ties")
    assert {(task.adapt, task.test, task.train) for task in config.tasks} == {(None, None, None)}
    assert config.tasks[-1].checkpoint == "s3://b/rendered_sst2.pt"


def test_only_chooses_in_the_suites_order() -> None:
    assert _parse(suite=_suite(only=["dtd", "cars"])).task_names == ("cars", "dtd")


# --- tasks beside a suite ------------------------------------------------------------------------


def test_tasks_of_the_same_name_are_laid_over_and_others_follow() -> None:
    own = [
        {"name": "mnist", "templates": ["{}"], "checkpoint": "/mine.pt"},
        {"name": "mine", "test": "t", "classnames": ["a", "b"]},
        {"name": "svhn", "checkpoint": None, "adapt": None},
    ]
    config = _parse(suite=_suite(only=["svhn", "mnist"]), tasks=own)
    svhn, mnist, mine = config.tasks
    assert config.task_names == ("svhn", "mnist", "mine")
    assert (mnist.templates, mnist.checkpoint) == (("{}",), "/mine.pt")
    assert mnist.adapt == "/root/data/mnist/adapt"
    assert mnist.classnames == load_data_set("mnist").classnames
    assert (svhn.checkpoint, svhn.adapt, svhn.test) == (None, None, "/root/data/svhn/test")
    assert mine.test == "/root/t"


def test_a_task_may_bring_the_files_that_the_suite_has_not() -> None:
    own = [{"name": name, "checkpoint": f"/{name}.pt"} for name in ("mnist", "svhn")]
    config = _parse(suite={"name": "vit-8", "only": ["mnist", "svhn"]}, tasks=own)
    assert [task.checkpoint for task in config.tasks] == ["/svhn.pt", "/mnist.pt"]


def test_a_task_laid_over_twice_is_refused() -> None:
    own = [{"name": "mnist", "test": "a"}, {"name": "mnist", "test": "b", "dataset": "mnist"}]
    assert "task 'mnist' is listed 2 times" in _refusal(suite=_suite(), tasks=own)


# --- dataset -------------------------------------------------------------------------------------


def test_a_task_takes_class_names_and_templates_from_its_data_set() -> None:
    tasks = [
        {"name": "clothes", "dataset": "fashion_mnist", "checkpoint": "c.pt"},
        {"name": "b", "dataset": "fashion_mnist", "test": "t", "templates": ["{}"]},
        {"name": "c", "dataset": "fashion_mnist", "test": "t", "classnames": ["x", "y"]},
    ]
    first, second, third = _parse(tasks=tasks).tasks
    spec = load_data_set("fashion_mnist")
    assert (first.classnames, first.templates) == (spec.classnames, spec.templates)
    assert (second.classnames, second.templates) == (spec.classnames, ("{}",))
    assert (third.classnames, third.templates) == (("x", "y"), spec.templates)


def test_a_data_set_may_replace_that_of_a_suites_task() -> None:
    suite = _suite(name="vit-20", only=["emnist_letters"])
    config = _parse(suite=suite, tasks=[{"name": "emnist_letters", "dataset": "emnist_digits"}])
    assert config.tasks[0].classnames == load_data_set("emnist_digits").classnames


# --- files and overrides -------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL, "suite": _suite()}), encoding="utf-8")
    return path


def test_paths_are_relative_to_the_config(config: Path) -> None:
    task = load_config(config).tasks[3]
    assert task.checkpoint == str(config.parent / "ckpts/eurosat/finetuned.pt")
    assert task.test == str(config.parent / "data/eurosat/test")


def test_overrides_reach_the_suite_and_the_tasks_that_it_stands_for(config: Path) -> None:
    overrides = ["tasks.1.checkpoint=/other.pt", "suite.only=[mnist, dtd]", "suite.test=t/{task}"]
    mnist, dtd = load_config(config, overrides).tasks
    assert (mnist.name, mnist.test) == ("mnist", str(config.parent / "t/mnist"))
    assert (dtd.name, dtd.checkpoint) == ("dtd", "/other.pt")


def test_a_suite_may_come_from_an_override(tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump({"model": MODEL, "suite": "vit-8"}), encoding="utf-8")
    given = load_config(path, ["suite.checkpoints=/c/{task}.pt"])
    assert given.model_names == SUITES["vit-8"]
    path.write_text(yaml.safe_dump({"model": MODEL}), encoding="utf-8")
    overrides = ["suite=vit-14", "suite.checkpoints=/c/{task}.pt"]
    assert load_config(path, overrides).model_names == SUITES["vit-14"]


def test_the_resolved_config_is_read_back_without_the_suite(config: Path, tmp_path: Path) -> None:
    loaded = load_config(config)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(loaded), encoding="utf-8")
    assert "suite" not in yaml.safe_load(resolved.read_text(encoding="utf-8"))
    assert load_config(resolved) == loaded


def test_the_caller_keeps_its_data() -> None:
    data = {"model": MODEL, "suite": _suite(), "tasks": [{"name": "mnist", "dataset": "mnist"}]}
    before = yaml.safe_dump(data)
    parse_config(data, root=Path("/root"))
    assert yaml.safe_dump(data) == before


@pytest.mark.parametrize("model", ["b32", "b16", "l14"])
@pytest.mark.parametrize("count", [8, 14, 20])
def test_the_shipped_configs_are_the_suites(model: str, count: int) -> None:
    arch = f"ViT-{model[0].upper()}-{model[1:]}"
    config = load_config(CONFIGS / f"vit_{model}_{count}tasks.yaml")
    assert config.model.arch == f"{arch}-quickgelu"
    assert config.model_names == SUITES[f"vit-{count}"]
    for task in config.tasks:
        assert task.checkpoint == str(CONFIGS / "ckpts" / arch / task.name / "finetuned.pt")
        assert task.adapt == str(CONFIGS / "data" / task.name / "adapt")


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suite", "says"),
    [
        ("vit-9", "config: suite.name: 'vit-9' is unknown; did you mean vit-8? (known: vit-8, "),
        (_suite(name="vit-9"), "config: suite.name: 'vit-9' is unknown"),
        (
            "vit-8",
            "config: suite.checkpoints: missing; task 'sun397' has neither a checkpoint nor "
            "images; give suite.checkpoints, or suite.data, with {task} for the task's name",
        ),
        (8, "config: suite: expected a name or a mapping with name, checkpoints, data; got 8"),
        (["vit-8"], "config: suite: expected a name or a mapping"),
        ({}, "config: suite.name: missing"),
        (FILES, "config: suite.name: missing"),
        (_suite(checkpoint="x/{task}"), "config: suite.checkpoint: unknown key; did you mean chec"),
        (_suite(only=["mnits"]), "config: suite.only: 'mnits' is unknown; did you mean mnist?"),
        (_suite(only=["stl10"]), "config: suite.only: 'stl10' is unknown"),
        (_suite(only=[]), "config: suite.only: "),
        (_suite(only="mnist"), "config: suite.only: "),
        (
            _suite(checkpoints="{Task}.pt"),
            "config: suite.checkpoints: {Task} in '{Task}.pt' is unknown (known here: {task})",
        ),
        (_suite(checkpoints="{task}/{split}.pt"), "suite.checkpoints: {split} in '{task}/{split}"),
        (_suite(checkpoints="all.pt"), "suite.checkpoints: 'all.pt' has no {task}"),
        (_suite(data="data/{task}"), "config: suite.data: 'data/{task}' has no {split}"),
        (_suite(data="{task}/{split}/{x}"), "suite.data: {x} in '{task}/{split}/{x}' is unknown"),
        (_suite(test=""), "config: suite.test: "),
        (_suite(test=3), "config: suite.test: "),
    ],
)
def test_a_wrong_suite_is_refused(suite: Any, says: str) -> None:
    assert says in _refusal(suite=suite)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (
            {"name": "a", "dataset": "eurosta", "test": "t"},
            "config: tasks[0].dataset: 'eurosta' is unknown; did you mean eurosat? (known: cars, ",
        ),
        ({"name": "a", "dataset": None, "test": "t"}, "config: tasks[0].dataset: None is unknown"),
        ({"name": "a", "dataset": ["mnist"], "test": "t"}, "tasks[0].dataset: ['mnist'] is unkno"),
        ({"name": "a", "data_set": "mnist"}, "tasks[0].data_set: unknown key; did you mean datas"),
    ],
)
def test_a_wrong_data_set_is_refused(task: dict[str, Any], says: str) -> None:
    assert says in _refusal(tasks=[task])


@pytest.mark.parametrize("tasks", ["mnist", {"mnist": 1}, ["mnist"], [{"test": "t"}]])
def test_wrong_tasks_beside_a_suite_are_refused(tasks: Any) -> None:
    assert "config: tasks" in _refusal(suite=_suite(), tasks=tasks)


def test_a_misspelled_section_is_guessed() -> None:
    tasks = [{"name": "a", "checkpoint": "a.pt"}]
    assert "suit: unknown key; did you mean suite?" in _refusal(suit="vit-8", tasks=tasks)

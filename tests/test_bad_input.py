"""Wrong input: one line on stderr that names what and the remedy, exit code 2, nothing touched."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from commands import (
    CommandResult,
    Commands,
    cache_tokenizer,
    config_data,
    process,
    refused,
    script,
    tree,
    write_config,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from world import CLASSES, MODEL_CFG, RESNET, World, write_image, write_model

from raymerge.config import METHOD_NAMES

METHODS: dict[str, dict[str, Any]] = {
    "zero_shot": {"name": "zero_shot"},
    "individual": {"name": "individual"},
    "average": {"name": "average"},
    "task_arithmetic": {"name": "task_arithmetic"},
    "ties-sum": {"name": "ties"},
    "ties-mean-full": {"name": "ties", "merge": "mean", "trim_scope": "full"},
    "ties-tensor": {"name": "ties", "trim_scope": "tensor"},
    "adamerging": {"name": "adamerging"},
    "adamerging_pp": {"name": "adamerging", "task_vectors": "ties"},
    "adamerging_kl": {"name": "adamerging", "objective": "kl"},
    "dare": {"name": "dare"},
    "tsv": {"name": "tsv"},
    "iso_c": {"name": "iso_c"},
    "wudi": {"name": "wudi", "iterations": 2},
    "fisher": {"name": "fisher", "images": 2},
    "regmean": {"name": "regmean", "images": 2},
    "regmean_pp": {"name": "regmean_pp", "images": 2},
    "fw_hard": {"name": "fw_hard", "objective": "entropy", "iterations": 1},
    "fw_soft": {"name": "fw_soft", "objective": "entropy", "iterations": 1},
}


DATA_METHODS = ("fisher", "regmean", "regmean_pp", "adamerging", "fw_hard", "fw_soft")


@pytest.fixture(autouse=True)
def _this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of the session may have a Ray open, which a merge would ask instead."""
    monkeypatch.setattr("raymerge.runs.workers._uses_cluster", lambda config: False)


@dataclass
class Attempt:
    """A config that a test spoils, and the command that must refuse it without a trace."""

    raymerge: Commands
    world: World
    folder: Path
    data: dict[str, Any]

    @property
    def task(self) -> dict[str, Any]:
        task: dict[str, Any] = self.data["tasks"][0]
        return task

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def refused(
        self, *mentions: str, command: str = "merge", argv: tuple[str, ...] = ()
    ) -> CommandResult:
        config = write_config(self.folder / "config.yaml", self.data)
        output = ("--output", str(self.output)) if command == "merge" else ()
        before = tree(self.folder, self.world.root)
        ran = self.raymerge(command, config, *output, *argv)
        refused(ran, *mentions)
        assert tree(self.folder, self.world.root) == before
        return ran

    def images(self, key: str) -> Path:
        """A private copy of the first task's ``adapt`` or ``test`` images."""
        copy = self.folder / key
        shutil.copytree(self.task[key], copy)
        self.task[key] = str(copy)
        return copy

    def expert(self, name: str = "expert.safetensors") -> Path:
        """Where the first task's checkpoint is expected now; not there yet."""
        self.task["checkpoint"] = str(self.folder / name)
        return self.folder / name

    def expert_state(self) -> dict[str, torch.Tensor]:
        return load_file(self.world.config["tasks"][0]["checkpoint"])

    def pretrained_state(self) -> dict[str, torch.Tensor]:
        return load_file(self.world.root / "pretrained" / "open_clip_model.safetensors")

    def pretrained(self, state: dict[str, torch.Tensor] | None = None) -> Path:
        """A private pretrained folder, without weights unless given."""
        folder = self.folder / "pretrained"
        folder.mkdir()
        shutil.copy(self.world.root / "pretrained" / "open_clip_config.json", folder)
        if state is not None:
            save_file(state, folder / "open_clip_model.safetensors")
        self.data["model"] = f"local-dir:{folder}"
        return folder


@pytest.fixture
def attempt(
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Attempt:
    cache_tokenizer(monkeypatch)
    return Attempt(Commands(capsys), world, tmp_path, config_data(world))


# --- the config file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "key", "guess"),
    [
        ((), "modle", "model"),
        (("tasks", 0), "adpat", "adapt"),
        (("method",), "granulaity", "granularity"),
        (("optimizer",), "batchsize", "batch_size"),
        (("cluster",), "worker", "workers"),
        (("state",), "every_step", "every_steps"),
    ],
)
def test_unknown_key_is_named_with_a_guess(
    attempt: Attempt, section: tuple[Any, ...], key: str, guess: str
) -> None:
    attempt.data["state"] = {}
    node = functools.reduce(lambda node, part: node[part], section, attempt.data)
    node[key] = 1
    attempt.refused("config.yaml", key, f"did you mean {guess}?")


def test_unknown_key_of_the_model_section(attempt: Attempt) -> None:
    attempt.data["model"] = {"arch": attempt.data["model"], "pretraned": "openai"}
    attempt.refused("config.yaml", "model.pretraned", "did you mean pretrained?")


@pytest.mark.parametrize(
    ("content", "mention"),
    [
        (b"", "expected keys"),
        (b"- model\n- tasks\n", "expected keys"),
        (b"just words", "expected keys"),
        (b"model: [1, 2\ntasks: {", "not valid YAML"),
        (b"\tmodel: x", "not valid YAML"),
        (b"\xff\xfe\x00m", "not UTF-8"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"1: x\nmodel: a\ntasks: []\n", "config.yaml"),
        (b"true: x\nmodel: a\ntasks: []\n", "config.yaml"),
        (b"[" * 2000, "not valid YAML"),
        (b"preset: [official]\nmodel: a\ntasks: []\n", "preset"),
        (b"preset: offical\nmodel: a\ntasks: []\n", "official"),
    ],
)
def test_a_file_that_is_no_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, mention: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_bytes(content)
    before = tree(tmp_path)
    refused(Commands(capsys)("merge", config), "config.yaml", mention)
    assert tree(tmp_path) == before


def test_config_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raymerge = Commands(capsys)
    for command in ("plan", "merge", "eval"):
        refused(raymerge(command, tmp_path / "nowhere.yaml"), "nowhere.yaml", "No such file")
    refused(raymerge("merge", tmp_path), str(tmp_path), "directory")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("names", [[1, 2, 3], [True, False], ["a", 2.5]])
def test_class_name_that_yaml_takes_for_something_else(
    attempt: Attempt, names: list[object]
) -> None:
    attempt.task["classnames"] = names
    attempt.refused("tasks[0].classnames[", "put it in quotes")


@pytest.mark.parametrize("value", ["", "a\0b"])
@pytest.mark.parametrize("key", ["checkpoint", "adapt", "test", "output"])
def test_path_that_is_none(attempt: Attempt, key: str, value: str) -> None:
    """An empty one is not the config's own folder."""
    (attempt.data if key == "output" else attempt.task)[key] = value
    attempt.refused(key, "string should")


@pytest.mark.parametrize("key", ["checkpoint", "adapt", "test"])
@pytest.mark.parametrize("error", [PermissionError, OSError])
def test_path_that_the_system_refuses(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch, key: str, error: type[OSError]
) -> None:
    path = str(attempt.folder / ("x" * 300 if error is OSError else "locked"))
    if error is PermissionError:  # root may read anything
        stat = os.stat

        def locked(target: Any, **kwargs: Any) -> os.stat_result:
            if str(target) == path:
                raise PermissionError(13, "Permission denied", path)
            return stat(target, **kwargs)

        monkeypatch.setattr(os, "stat", locked)
        monkeypatch.setattr(Path, "stat", lambda self, **kwargs: locked(self, **kwargs))
    attempt.task[key] = path
    attempt.refused(path, "denied" if error is PermissionError else "File name too long")


@pytest.mark.parametrize("value", [[], None, "x", {}, [1], [None]])
def test_no_tasks(attempt: Attempt, value: object) -> None:
    attempt.data["tasks"] = value
    attempt.refused("config.yaml", "tasks")


@pytest.mark.parametrize("key", ["model", "tasks"])
def test_required_key_is_missing(attempt: Attempt, key: str) -> None:
    del attempt.data[key]
    attempt.refused("config.yaml", f"{key}: missing")


@pytest.mark.parametrize(
    ("keys", "mentions"),
    [
        (("name",), ("tasks[2].name: missing",)),
        (("classnames",), ("tasks[2]", "'tone'", "no classnames", "list its classes")),
        (("checkpoint",), ("tasks[2]", "'tone'", "no checkpoint", "remove adapt")),
        (("checkpoint", "test"), ("tasks[2]", "'tone'", "no checkpoint", "remove adapt")),
        (("checkpoint", "adapt", "test"), ("tasks[2]", "'tone'", "neither a checkpoint")),
    ],
)
def test_required_key_of_a_task_is_missing(
    attempt: Attempt, keys: tuple[str, ...], mentions: tuple[str, ...]
) -> None:
    for key in keys:
        del attempt.data["tasks"][2][key]
    attempt.refused(*mentions)


@pytest.mark.parametrize("method", METHODS)
def test_no_checkpoint_anywhere(attempt: Attempt, method: str) -> None:
    attempt.data["method"] = METHODS[method]
    for task in attempt.data["tasks"]:
        del task["checkpoint"], task["adapt"]
    attempt.refused("no task has a checkpoint", "at least one")


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/abs", "", "a b", "a\nb", "ä", "-o\x00"])
def test_task_name_that_is_no_plain_word(attempt: Attempt, name: str) -> None:
    attempt.task["name"] = name
    attempt.refused("tasks[0].name", "letters, digits")


def test_task_listed_twice(attempt: Attempt) -> None:
    attempt.data["tasks"].append(attempt.data["tasks"][1])
    attempt.refused("'shade'", "listed 2 times", "unique")


def test_fewer_than_two_classes(attempt: Attempt) -> None:
    attempt.task["classnames"] = ["only"]
    attempt.refused("tasks[0].classnames", "at least 2")
    attempt.task["classnames"] = []
    attempt.refused("tasks[0]", "'colour' has images but no classnames")


@pytest.mark.parametrize(
    ("content", "mention"), [("", "has no lines"), (None, "cannot be read"), ("one", "at least 2")]
)
def test_class_name_file(attempt: Attempt, content: str | None, mention: str) -> None:
    names = attempt.folder / "names.txt"
    if content is not None:
        names.write_text(content)
    attempt.task["classnames"] = "names.txt"
    attempt.refused("tasks[0].classnames", mention)


@pytest.mark.parametrize(
    "template",
    ["a photo", "", "{} and {}", "{0}", "{name}", "{} of {x}", "{} {", "{} {0}", "{} {}}"],
)
def test_template_without_one_place_for_the_class(attempt: Attempt, template: str) -> None:
    attempt.task["templates"] = ["a photo of a {}.", template]
    attempt.refused("tasks[0].templates", repr(template))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("optimizer", "steps", -1),
        ("optimizer", "steps", 0),
        ("optimizer", "steps", 1.5),
        ("optimizer", "steps", "many"),
        ("optimizer", "lr", float("nan")),
        ("optimizer", "lr", float("inf")),
        ("optimizer", "lr", 0),
        ("optimizer", "lr", -0.1),
        ("optimizer", "batch_size", 0),
        ("optimizer", "betas", [0.9, 1.0]),
        ("optimizer", "betas", [0.9]),
        ("optimizer", "name", "adamw"),
        ("method", "granularity", "layer"),
        ("method", "init", float("nan")),
        ("method", "density", 0),
        ("method", "clamp", "sometimes"),
        ("cluster", "workers", -1),
        ("cluster", "workers", "all"),
        ("cluster", "shards", 0),
        ("cluster", "micro_batch", 0),
        ("cluster", "step_timeout_s", 0),
        ("state", "every_steps", 0),
    ],
)
def test_value_out_of_range_is_named_with_what_was_given(
    attempt: Attempt, section: str, key: str, value: object
) -> None:
    attempt.data.setdefault(section, {})[key] = value
    attempt.refused("config.yaml", f"{section}.{key}")


@pytest.mark.parametrize(
    ("key", "value"), [("precision", "float16"), ("seed", -1), ("seed", "x"), ("output", 3)]
)
def test_top_level_value_out_of_range(attempt: Attempt, key: str, value: object) -> None:
    attempt.data[key] = value
    attempt.refused("config.yaml", f"{key}: ")


@pytest.mark.parametrize("value", [None, 3, ["ties"], "optimise", {"steps": None}])
def test_section_of_the_wrong_kind(attempt: Attempt, value: object) -> None:
    attempt.data["optimizer"] = value
    attempt.refused("config.yaml", "optimizer")
    if value:  # a preset is not misled by it
        attempt.data["preset"] = "official"
        attempt.refused("config.yaml", "optimizer")


@pytest.mark.parametrize("value", ["adamergin", {"name": "adamergin"}])
def test_unknown_method_with_a_guess(attempt: Attempt, value: object) -> None:
    attempt.data["method"] = value
    attempt.refused("method.name", "'adamergin'", "did you mean adamerging?")


@pytest.mark.parametrize("value", [{}, None, 3, [], {"name": None}, {"name": ["ties"]}])
def test_method_without_a_name(attempt: Attempt, value: object) -> None:
    attempt.data["method"] = value
    attempt.refused("method")


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_option_that_a_method_does_not_have(attempt: Attempt, name: str) -> None:
    attempt.data["method"] = {"name": name, "checkpoint": "x", "nonsense": 1}
    if name != "joint":
        del attempt.data["method"]["checkpoint"]
    attempt.refused("config.yaml", "method.nonsense: unknown key", "known here: ", "name")


@pytest.mark.parametrize(
    ("method", "key", "value", "mention"),
    [
        ("task_arithmetic", "scaling", "big", "valid number"),
        ("task_arithmetic", "scaling", float("nan"), "finite"),
        ("ties", "density", 1.5, "less than or equal to 1; got 1.5"),
        ("ties", "merge", "max", "'sum' or 'mean'; got 'max'"),
        ("ties", "trim_scope", "layer", "'visual', 'full' or 'tensor'"),
        ("dare", "density", 0, "greater than 0; got 0"),
        ("dare", "elect_sign", "maybe", "valid boolean"),
        ("tsv", "scaling", None, "valid number"),
        ("iso_c", "scaling", [1.3], "valid number"),
        ("iso_cts", "common_fraction", 1.1, "less than or equal to 1"),
        ("wudi", "iterations", 0, "greater than or equal to 1; got 0"),
        ("wudi", "lr", 0, "greater than 0; got 0"),
        ("swudi", "time", 0, "greater than 0; got 0"),
        ("swudi", "fraction", 1.1, "less than or equal to 1"),
        ("aswudi", "scaling", "big", "valid number"),
        ("fisher", "images", 0, "greater than or equal to 1"),
        ("fisher", "samples", 0, "'exact' or greater than or equal to 1; got 0"),
        ("fisher", "samples", "all", "'exact' or a valid integer"),
        ("regmean", "alpha", 1.01, "less than or equal to 1"),
        ("regmean_pp", "alpha", -0.1, "greater than or equal to 0"),
        ("joint", "checkpoint", "", "at least 1 character"),
        ("adamerging", "objective", "accuracy", "'infomax'"),
        ("adamerging", "task_vectors", "wudi", "'raw', 'ties', 'dare', 'tsv', 'iso', 'swudi' or"),
        ("adamerging", "temperature", 0, "greater than 0"),
        ("adamerging", "filter", 0, "greater than 0"),
        ("adamerging", "normalise", 2, "valid boolean"),
        ("adamerging", "collapse", "halt", "'ignore', 'warn', 'stop' or 'restore'"),
        ("fw_hard", "granularity", "block", "'task' or 'tensor'"),
        ("fw_hard", "oracle", "true", "'inner' or 'cosine'"),
        ("fw_hard", "objective", "kl", "'cross_entropy' or 'entropy'"),
        ("fw_hard", "step_size", 0, "greater than 0"),
        ("fw_hard", "scaling", -1, "greater than 0"),
        ("fw_hard", "gap", -1e-9, "greater than or equal to 0"),
        ("fw_hard", "images", 0, "greater than or equal to 1"),
        ("fw_soft", "iterations", 0, "greater than or equal to 1"),
        ("fw_soft", "later_init", float("inf"), "finite"),
        ("fw_soft", "start", "", "at least 1 character"),
    ],
)
def test_method_option_out_of_range(
    attempt: Attempt, method: str, key: str, value: object, mention: str
) -> None:
    attempt.data["method"] = {"name": method, "checkpoint": "x", key: value}
    if method != "joint":
        del attempt.data["method"]["checkpoint"]
    attempt.refused("config.yaml", f"method.{key}: ", mention)


def test_sharpness_below_zero(attempt: Attempt) -> None:
    attempt.data["optimizer"]["sharpness"] = -0.1
    attempt.refused("optimizer.sharpness", "greater than or equal to 0; got -0.1")


def test_key_of_another_method(attempt: Attempt) -> None:
    attempt.data["method"] = {"name": "task_arithmetic", "density": 0.2}
    attempt.refused("method.density", "unknown key")


@pytest.mark.parametrize(
    ("override", "mention"),
    [
        ("nonsense", "key.path=value"),
        ("=3", "key.path=value"),
        ("tasks.9.name=x", "items 0 to 3"),
        ("tasks.x.name=y", "items 0 to 3"),
        ("seed.deep=1", "plain value"),
        ("optimizer.steps=[", "not a YAML value"),
        ("optimizer.steps=", "optimizer.steps"),
        ("optimizer.stesp=3", "did you mean steps?"),
        ("optimizer..steps=3", "optimizer"),
        ("tasks=3", "tasks"),
    ],
)
def test_bad_override(attempt: Attempt, override: str, mention: str) -> None:
    attempt.refused(mention, argv=("-o", override))


def test_no_output_named(attempt: Attempt) -> None:
    config = write_config(attempt.folder / "config.yaml", attempt.data)
    refused(attempt.raymerge("merge", config), "output", "--output")


# --- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "mention"),
    [
        (["mrege"], "mrege"),
        (["merge"], "config"),
        (["merge", "a.yaml", "--resmue"], "--resmue"),
        (["merge", "a.yaml", "--resume", "--overwrite"], "not allowed with"),
        (["inspect"], "checkpoint"),
        (["plan", "a.yaml", "b.yaml"], "b.yaml"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_command_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], mention: str
) -> None:
    refused(Commands(capsys)(*argv), mention, "--help")


# --- the model ---------------------------------------------------------------------------------


def test_pretrained_folder_that_is_not_there(attempt: Attempt) -> None:
    attempt.data["model"] = "local-dir:nowhere"
    attempt.refused(str(attempt.folder / "nowhere"), "no such folder; check the path")


def test_pretrained_folder_without_weights(attempt: Attempt) -> None:
    folder = attempt.pretrained()
    attempt.refused(str(folder), "open_clip_model.safetensors")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model_cfg": 3}', '{"model_cfg": {}}', '{"vision_cfg": 1}']
)
def test_pretrained_folder_with_a_broken_config(attempt: Attempt, content: str) -> None:
    folder = attempt.pretrained(attempt.pretrained_state())
    (folder / "open_clip_config.json").write_text(content)
    attempt.refused(str(folder))


def test_pretrained_weights_of_another_architecture(attempt: Attempt) -> None:
    other = {**MODEL_CFG, "vision_cfg": {**MODEL_CFG["vision_cfg"], "layers": 3}}
    write_model(attempt.folder / "other", other)
    attempt.data["model"] = f"local-dir:{attempt.folder / 'other'}"
    attempt.refused("colour.safetensors", "missing", "resblocks.2")


def test_pretrained_weights_that_do_not_fit_their_config(attempt: Attempt) -> None:
    state = attempt.pretrained_state()
    del state["visual.proj"]
    attempt.pretrained(state)
    attempt.refused("visual.proj", "1 missing (visual.proj)")


def test_visual_tower_alone_is_no_pretrained_model(attempt: Attempt) -> None:
    attempt.pretrained(attempt.expert_state())
    attempt.refused("pretrained", "text tower")


def test_unknown_architecture_with_a_guess(attempt: Attempt) -> None:
    attempt.data["model"] = {"arch": "ViT-B-23", "pretrained": "openai"}
    attempt.refused("model.arch", "'ViT-B-23'", "did you mean", "ViT-B-32")


def test_architecture_that_resembles_nothing(attempt: Attempt) -> None:
    attempt.data["model"] = {"arch": "qqqq", "pretrained": "openai"}
    attempt.refused("model.arch", "'qqqq'", "list_models")


def test_unknown_pretrained_tag_lists_the_known_ones(attempt: Attempt) -> None:
    attempt.data["model"] = {"arch": "ViT-B-32", "pretrained": "opnai"}
    attempt.refused("model.pretrained", "'opnai'", "laion2b_s34b_b79k")


def test_pretrained_file_that_is_not_there(attempt: Attempt) -> None:
    attempt.data["model"] = {"arch": "ViT-B-32", "pretrained": "weights/none.pt"}
    attempt.refused(str(attempt.folder / "weights" / "none.pt"), "no such file")


def test_architecture_without_weights(attempt: Attempt) -> None:
    attempt.data["model"] = "ViT-B-32"
    attempt.refused("model", "needs model.pretrained")


def test_folder_and_tag_at_once(attempt: Attempt) -> None:
    attempt.data["model"] = {"arch": attempt.data["model"], "pretrained": "openai"}
    attempt.refused("model", "remove model.pretrained=openai")


@pytest.mark.parametrize(
    ("arch", "tag", "right"),
    [
        ("ViT-B-32", "openai", "ViT-B-32-quickgelu"),
        ("ViT-L-14", "openai", "ViT-L-14-quickgelu"),
        ("ViT-B/32", "openai", "ViT-B-32-quickgelu"),
    ],
)
def test_openai_weights_without_quickgelu_are_refused_before_any_download(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch, arch: str, tag: str, right: str
) -> None:
    def download(*args: object, **kwargs: object) -> None:
        raise AssertionError("downloaded")

    monkeypatch.setattr("open_clip.pretrained.download_pretrained", download)
    attempt.data["model"] = {"arch": arch, "pretrained": tag}
    for command in ("plan", "merge"):
        attempt.refused("model.arch", "QuickGELU", right, command=command)


def test_hub_model_without_a_network(attempt: Attempt) -> None:
    attempt.data["model"] = "hf-hub:nobody/nothing-of-this-name"
    attempt.refused("hf-hub:nobody/nothing-of-this-name", "cannot be fetched")


# --- checkpoints -------------------------------------------------------------------------------


def test_checkpoint_that_is_not_there(attempt: Attempt) -> None:
    path = attempt.expert()
    attempt.refused("tasks[0] (colour)", str(path), "no such file")


def test_checkpoint_folder_without_weights(attempt: Attempt) -> None:
    attempt.expert("empty").mkdir()
    attempt.refused("tasks[0] (colour)", "open_clip_model.safetensors")


def _safetensors(path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, path)


def _torch_legacy(path: Path, state: dict[str, torch.Tensor]) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


WRITERS: dict[str, Callable[[Path, dict[str, torch.Tensor]], None]] = {
    "x.safetensors": _safetensors,
    "zip.pt": lambda path, state: torch.save(state, path),
    "legacy.pt": _torch_legacy,
}


@pytest.mark.parametrize("name", WRITERS)
def test_truncated_checkpoint_at_any_length(attempt: Attempt, name: str) -> None:
    path = attempt.expert(name)
    WRITERS[name](path, attempt.expert_state())
    whole = path.read_bytes()
    ends = [len(whole) - 1, len(whole) // 2, 77, 8, 0]
    for length in ends:
        path.write_bytes(whole[:length])
        attempt.refused("tasks[0] (colour)", str(path), command="plan")


def test_every_short_prefix_of_every_format_is_a_checkpoint_error(tmp_path: Path) -> None:
    from raymerge.errors import CheckpointError
    from raymerge.models.checkpoints.opening import open_checkpoint

    state = {"a": torch.randn(20, 20), "b": torch.randn(7)}
    for name, write in WRITERS.items():
        path = tmp_path / name
        write(path, state)
        whole = path.read_bytes()
        for length in (*range(60), *range(60, len(whole), 29)):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError) as caught:
                open_checkpoint(path)
            assert "\n" not in str(caught.value), (name, length)


CORRUPT = {
    "header.safetensors": struct.pack("<Q", 50) + b'{"a": nonsense' + bytes(50),
    "huge.safetensors": struct.pack("<Q", 1 << 60) + b"{}",
    "zeros.safetensors": bytes(1000),
    "words.pt": b"this is a text file, not a checkpoint\n" * 20,
    "html.pt": b"<!doctype html><html>404</html>",
    "lfs.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zeros.pt": bytes(1000),
    "zip.pt": b"PK\x03\x04" + bytes(500),
    "pickle.pt": pickle.dumps([1, 2, 3]),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_checkpoint(attempt: Attempt, name: str) -> None:
    path = attempt.expert(name)
    path.write_bytes(CORRUPT[name])
    attempt.refused("tasks[0] (colour)", str(path))


class _Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (self.command,))


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
@pytest.mark.parametrize("inside", [True, False])
def test_pickle_that_would_run_code_is_refused_and_does_not_run(
    attempt: Attempt, writer: str, inside: bool
) -> None:
    trace = attempt.folder / "it-ran"
    payload: Any = _Payload(f"touch {trace}")
    loot = {**attempt.expert_state(), "visual.extra": payload} if inside else payload
    path = attempt.expert("loot.pt")
    if writer == "pickle":
        path.write_bytes(pickle.dumps(loot if not inside else {"visual.extra": payload}))
    else:
        torch.save(loot, path, _use_new_zipfile_serialization=writer == "torch")
    what = "refused" if writer == "pickle" else "posix.system"
    attempt.refused("tasks[0] (colour)", str(path), what, "unsafe", "state_dict")
    refused(attempt.raymerge("inspect", path), "unsafe")
    assert not trace.exists()
    pickle.loads(pickle.dumps(payload))
    assert trace.exists()  # so the payload was live


class _Encoder(torch.nn.Linear):
    """Of a module that no release has."""


def test_pickled_module_of_an_unknown_package_is_refused_with_the_remedy(attempt: Attempt) -> None:
    path = attempt.expert("module.pt")
    torch.save(_Encoder(2, 2), path)
    attempt.refused(str(path), "_Encoder", "save its state_dict")
    torch.save(torch.nn.Linear(2, 2), path)  # opens, and is no encoder
    attempt.refused(str(path), "it holds 'bias', 'weight'")


@pytest.mark.parametrize("content", [{}, {"a": 1}, [torch.zeros(1)], torch.zeros(3)])
def test_torch_file_that_is_no_state_dict(attempt: Attempt, content: object) -> None:
    torch.save(content, attempt.expert("odd.pt"))
    attempt.refused("odd.pt", "state dict")


def _without(state: dict[str, torch.Tensor]) -> None:
    del state["visual.ln_post.weight"]


def _extra(state: dict[str, torch.Tensor]) -> None:
    state["visual.extra.weight"] = torch.zeros(3)


def _shape(state: dict[str, torch.Tensor]) -> None:
    state["visual.proj"] = state["visual.proj"][:, :-1].contiguous()


def _transposed(state: dict[str, torch.Tensor]) -> None:
    state["visual.proj"] = state["visual.proj"].t().contiguous()


def _integers(state: dict[str, torch.Tensor]) -> None:
    state["visual.proj"] = state["visual.proj"].int()


def _stranger(state: dict[str, torch.Tensor]) -> None:
    keys = list(state)
    for key in keys:
        state[key.replace("visual.", "encoder/")] = state.pop(key)


@pytest.mark.parametrize(
    ("spoil", "mentions"),
    [
        (_without, ("1 missing", "visual.ln_post.weight")),
        (_extra, ("1 unexpected", "visual.extra.weight")),
        (_shape, ("visual.proj", "[64, 23]", "[64, 24]")),
        (_transposed, ("visual.proj", "[24, 64]", "[64, 24]")),
        (_integers, ("visual.proj", "cannot be merged; save it as float32")),
        (_stranger, ("none of the model's", "encoder/")),
    ],
)
def test_expert_that_does_not_fit(
    attempt: Attempt, spoil: Callable[[dict[str, torch.Tensor]], None], mentions: tuple[str, ...]
) -> None:
    state = attempt.expert_state()
    spoil(state)
    save_file(state, attempt.expert())
    for command in ("plan", "merge"):
        attempt.refused("tasks[0] (colour)", "expert.safetensors", *mentions, command=command)


def test_several_bad_experts_are_counted_and_plan_lists_each(attempt: Attempt) -> None:
    for task in attempt.data["tasks"][:3]:
        task["checkpoint"] = str(attempt.folder / f"no-{task['name']}.pt")
    attempt.refused("no-colour.pt", "2 more", "raymerge plan")
    config = write_config(attempt.folder / "config.yaml", attempt.data)
    ran = attempt.raymerge("plan", config)
    lines = ran.err.splitlines()
    assert (ran.code, len(lines), ran.out) == (2, 3, "")
    assert all(line.startswith("raymerge: error: ") for line in lines)


@pytest.mark.parametrize(
    ("method", "value"),
    [
        *((method, float("nan")) for method in METHODS),
        ("average", float("inf")),
        ("ties-sum", float("-inf")),
        ("adamerging", float("inf")),
    ],
)
def test_expert_with_a_nan_or_inf_is_never_merged(
    attempt: Attempt, method: str, value: float
) -> None:
    state = attempt.expert_state()
    state["visual.ln_post.bias"][-1] = value
    save_file(state, attempt.expert())
    attempt.data["method"] = METHODS[method]
    attempt.refused("expert.safetensors", "visual.ln_post.bias", "1 NaN or Inf value;")


@pytest.mark.parametrize(
    ("method", "key"),
    [
        *((method, "visual.conv1.weight") for method in METHODS if method != "individual"),
        *((method, "token_embedding.weight") for method in ("individual", "average", "adamerging")),
    ],
)
def test_pretrained_model_with_a_nan_is_never_merged(
    attempt: Attempt, method: str, key: str
) -> None:
    state = attempt.pretrained_state()
    state[key].flatten()[7] = float("nan")
    attempt.pretrained(state)
    attempt.data["method"] = METHODS[method]
    attempt.refused("open_clip_model.safetensors", key, "1 NaN or Inf value;")


@pytest.mark.parametrize("method", ["individual", "ties-sum", "adamerging"])
def test_a_nan_leaves_the_run_that_was_to_be_replaced_as_it_was(
    attempt: Attempt, method: str
) -> None:
    config = write_config(attempt.folder / "config.yaml", attempt.data | {"method": "average"})
    attempt.raymerge.ok("merge", config, "--output", attempt.output)
    state = attempt.expert_state()
    state["visual.ln_post.bias"][-1] = float("nan")
    save_file(state, attempt.expert())
    attempt.data["method"] = METHODS[method]
    attempt.refused("expert.safetensors", "1 NaN or Inf value;", argv=("--overwrite",))


def test_a_merge_that_overflows(attempt: Attempt) -> None:
    attempt.data["method"] = {"name": "task_arithmetic", "scaling": 1e300}
    attempt.refused("overflow", "coefficients")


def test_expert_on_the_hub_without_a_network(attempt: Attempt) -> None:
    attempt.task["checkpoint"] = "hf-hub:nobody/nothing-of-this-name"
    attempt.refused("hf-hub:nobody/nothing-of-this-name", "cannot be fetched")


def test_eval_refuses_a_model_with_a_nan(attempt: Attempt) -> None:
    state = attempt.expert_state()
    state["visual.proj"][3, 3] = float("nan")
    path = attempt.folder / "bad.safetensors"
    save_file(state, path)
    attempt.refused("bad.safetensors", "NaN", command="eval", argv=("--model", str(path)))


def test_eval_of_a_model_that_is_not_there(attempt: Attempt) -> None:
    attempt.refused("nowhere", "no such file", command="eval", argv=("--model", "nowhere"))


# --- images ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["adapt", "test"])
def test_image_folder_that_is_not_there(attempt: Attempt, key: str) -> None:
    attempt.task[key] = "nowhere"
    attempt.refused(f"tasks[0].{key}", str(attempt.folder / "nowhere"), "no such folder")


@pytest.mark.parametrize("leave", ["nothing", "text", "hidden"])
def test_adapt_folder_without_images(attempt: Attempt, leave: str) -> None:
    folder = attempt.folder / "bare"
    folder.mkdir()
    if leave == "text":
        (folder / "readme.txt").write_text("soon")
    if leave == "hidden":
        write_image(folder / ".hidden.png", np.random.default_rng(0))
    attempt.task["adapt"] = str(folder)
    attempt.refused("tasks[0].adapt", str(folder), "holds no image")


def test_test_folder_without_images(attempt: Attempt) -> None:
    folder = attempt.images("test")
    for image in folder.rglob("*.png"):
        image.unlink()
    attempt.refused("tasks[0].test", str(folder), "no class folder holds an image")


def test_class_folders_are_exactly_the_classes(attempt: Attempt) -> None:
    test = attempt.images("test")
    (test / "green").rename(test / "grue")
    attempt.refused("tasks[0].test", "no folder for 'green'", "no class for folder 'grue'")


def test_flat_test_folder(attempt: Attempt) -> None:
    attempt.task["test"] = attempt.task["adapt"]
    attempt.refused("tasks[0].test", "0 class folders for 3 class names")


def test_class_listed_twice(attempt: Attempt) -> None:
    attempt.task["classnames"] = [*CLASSES["colour"], "red"]
    attempt.refused("tasks[0].test", "'red' is there twice")


def _halve(path: Path) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def _truncated(suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        # Noise does not compress, so half of the file is half of the pixels.
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        path = folder / f"000{suffix}"
        Image.fromarray(noise).save(path)
        return _halve(path)

    return write


def _text(folder: Path) -> Path:
    path = folder / "000.png"
    path.write_text("not a picture\n" * 10)
    return path


def _empty(folder: Path) -> Path:
    path = folder / "000.png"
    path.write_bytes(b"")
    return path


def _flipped_bits(folder: Path) -> Path:
    path = folder / "000.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return path


BROKEN = {
    "truncated png": _truncated(".png"),
    "truncated jpeg": _truncated(".jpg"),
    "truncated gif": _truncated(".gif"),
    "truncated bmp": _truncated(".bmp"),
    "truncated tiff": _truncated(".tiff"),
    "truncated webp": _truncated(".webp"),
    "truncated ppm": _truncated(".ppm"),
    "text": _text,
    "empty": _empty,
    "flipped bits": _flipped_bits,
}


@pytest.mark.parametrize("spoil", BROKEN)
@pytest.mark.parametrize("key", ["adapt", "test"])
def test_image_that_does_not_decode(attempt: Attempt, key: str, spoil: str) -> None:
    folder = attempt.images(key) / ("red" if key == "test" else "")
    path = BROKEN[spoil](folder)
    attempt.refused(str(path), "does not decode", "replace or remove it")


def test_several_broken_images_are_counted(attempt: Attempt) -> None:
    for path in sorted(attempt.images("adapt").iterdir())[3:6]:
        _halve(path)
    attempt.refused("003.png", "2 more images")


@pytest.mark.parametrize(
    "method", [name for name in METHODS if METHODS[name]["name"] in DATA_METHODS]
)
def test_methods_of_data_need_adapt_folders(attempt: Attempt, method: str) -> None:
    attempt.data["method"] = METHODS[method]
    del attempt.data["tasks"][1]["adapt"]
    if not method.startswith("fw_"):  # which takes a model without images as a candidate
        attempt.refused(f"method {METHODS[method]['name']}", "shade", "tasks[].adapt")
    for k in (0, 2, 3):
        del attempt.data["tasks"][k]["adapt"]
    for command in ("plan", "merge"):
        names = f"task {', '.join(CLASSES)} has no adapt folder"
        attempt.refused(f"method {METHODS[method]['name']}", names, command=command)


@pytest.mark.parametrize("method", ["adamerging", "fw_hard", "fw_soft"])
def test_cross_entropy_needs_labels(attempt: Attempt, method: str) -> None:
    attempt.data["method"] = {"name": method, "objective": "cross_entropy"}
    for task in attempt.data["tasks"][1:]:
        task["adapt"] = task["test"]
    remedy = ("method.objective: cross_entropy needs one folder per class", "objective: entropy")
    for command in ("plan", "merge"):
        words = ("tasks[0].adapt", "0 class folders for 3 class names", *remedy)
        attempt.refused(*words, command=command)
    attempt.task["adapt"] = attempt.task["test"]
    folder = attempt.images("adapt")
    for name in ("one.png", "two.png"):
        write_image(folder / name, np.random.default_rng(0))
    attempt.refused("tasks[0].adapt", str(folder), "2 images lie in no class folder", *remedy)


@pytest.mark.parametrize("workers", [0, "auto"])
def test_learning_needs_unlabeled_images(attempt: Attempt, workers: object) -> None:
    attempt.data["cluster"]["workers"] = workers
    del attempt.data["tasks"][1]["adapt"]
    del attempt.data["tasks"][3]["adapt"]
    attempt.refused("adamerging", "shade, shape", "adapt")


def test_a_method_that_merges_nothing_needs_test_images(attempt: Attempt) -> None:
    attempt.data["method"] = "individual"
    for task in attempt.data["tasks"]:
        del task["test"]
    attempt.refused("individual", "test folder")


def test_eval_needs_test_images(attempt: Attempt) -> None:
    for task in attempt.data["tasks"]:
        del task["test"]
    attempt.refused("test folder", command="eval")


# --- what a method goes on from, and what it runs on -------------------------------------------


def test_joint_without_a_checkpoint(attempt: Attempt) -> None:
    attempt.data["method"] = {"name": "joint"}
    attempt.refused("config.yaml", "method.checkpoint: missing")


def test_joint_with_a_checkpoint_that_does_not_fit(attempt: Attempt) -> None:
    path = attempt.folder / "joint.safetensors"
    attempt.data["method"] = {"name": "joint", "checkpoint": str(path)}
    attempt.refused("method.checkpoint: ", str(path), "no such file")
    state = attempt.expert_state()
    del state["visual.ln_post.weight"]
    save_file(state, path)
    for command in ("plan", "merge"):
        words = ("method.checkpoint: ", str(path), "1 missing (visual.ln_post.weight)")
        attempt.refused(*words, command=command)
    state["visual.ln_post.weight"] = torch.full((64,), float("nan"))
    save_file(state, path)
    attempt.refused(str(path), "visual.ln_post.weight", "64 NaN or Inf values")


def _lambdas(attempt: Attempt, name: str = "start", **changes: Any) -> dict[str, Any]:
    """A ``lambdas.json`` that fits the world but for ``changes``; None removes a key."""
    layers = [
        key.removeprefix("visual.") for key in attempt.expert_state() if key.startswith("visual.")
    ]
    data = {"tasks": list(CLASSES), "layers": layers, "values": [[0.3] * len(layers)] * 4}
    (attempt.folder / name).mkdir()
    data = {key: value for key, value in (data | changes).items() if value is not None}
    (attempt.folder / name / "lambdas.json").write_text(json.dumps(data))
    return {"method": {"name": "fw_hard", "objective": "entropy", "start": name}}


@pytest.mark.parametrize(
    ("changes", "mention"),
    [
        ({"tasks": ["colour", "shade", "tone", "other"]}, "has 4 models, but not 'shape' of this"),
        ({"tasks": ["a", "b", "c", "d"]}, "not 'colour' and 3 more of this merge's 4"),
        ({"layers": ["all"], "values": [[0.3]] * 4}, "has 1 layers, but not"),
        ({"values": [[0.3] * 32] * 3}, "is not a lambdas.json"),
        ({"values": [[0.3] * 5] * 4}, "is not a lambdas.json"),
        ({"values": [[0.3], [0.3, 0.3]]}, "is not a lambdas.json"),
        ({"values": "none"}, "is not a lambdas.json"),
        ({"values": None}, "is not a lambdas.json"),
        ({"tasks": 4}, "is not a lambdas.json"),
        ({"values": [[float("nan")] * 32] * 4}, "holds NaN or Inf"),
    ],
)
def test_start_that_does_not_fit(attempt: Attempt, changes: dict[str, Any], mention: str) -> None:
    attempt.data |= _lambdas(attempt, **changes)
    for command in ("plan", "merge"):
        words = ("method.start: ", str(attempt.folder / "start" / "lambdas.json"), mention)
        attempt.refused(*words, "layer-wise AdaMerging or Frank-Wolfe run", command=command)


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_start_that_is_no_run(attempt: Attempt, content: str) -> None:
    attempt.data["method"] = {"name": "fw_soft", "objective": "entropy", "start": "start"}
    attempt.refused("method.start: ", "No such file", "give the folder of")
    (attempt.folder / "start").write_text(content)
    attempt.refused("method.start: ", "is not a lambdas.json", "give the folder of")


def test_start_over_other_vectors(attempt: Attempt) -> None:
    attempt.data |= _lambdas(attempt)
    config = {"method": {"name": "adamerging", "task_vectors": "tsv"}}
    write_config(attempt.folder / "start" / "config.yaml", config)
    attempt.refused("method.start: ", "multiplies tsv vectors", "method.task_vectors: raw")


@pytest.mark.parametrize("method", ["fw_hard", "fw_soft"])
@pytest.mark.parametrize(("workers", "shards", "groups"), [(2, 1, 2), (4, 2, 2)])
def test_cosines_of_a_gradient_in_parts(
    attempt: Attempt, method: str, workers: int, shards: int, groups: int
) -> None:
    attempt.data["method"] = {"name": method, "objective": "entropy", "oracle": "cosine"}
    attempt.data["cluster"] = {"workers": workers, "shards": shards, "cpus_per_worker": 1}
    for command in ("plan", "merge"):
        words = (f"{workers} workers with cluster.shards={shards} are {groups} groups",)
        remedy = (f"set cluster.shards: {workers}", "method.oracle: inner")
        attempt.refused("method.oracle: cosine", *words, *remedy, command=command)


@pytest.mark.parametrize("method", ["regmean", "regmean_pp"])
def test_regmean_of_a_tower_without_transformer_blocks(attempt: Attempt, method: str) -> None:
    write_model(attempt.folder / "resnet", RESNET)
    attempt.data["model"] = f"local-dir:{attempt.folder / 'resnet'}"
    for task in attempt.data["tasks"]:
        task["checkpoint"] = str(attempt.folder / "resnet")
    attempt.data["method"] = METHODS[method]
    for command in ("plan", "merge"):
        words = ("vision transformers", "choose another method, such as fisher")
        attempt.refused(f"method.name: {method}", *words, command=command)


# --- what does not fit the machine -------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_more_workers_than_images_in_a_step(attempt: Attempt, command: str) -> None:
    attempt.data["cluster"] = {"workers": 17, "cpus_per_worker": 1}
    attempt.refused("17 workers", "16 images", "at most 16", command=command)


@pytest.mark.parametrize(("workers", "shards"), [(3, 2), (1, 2), (4, 3), (0, 2)])
def test_shards_that_do_not_divide_the_workers(attempt: Attempt, workers: int, shards: int) -> None:
    attempt.data["cluster"] = {"workers": workers, "shards": shards}
    attempt.refused("cluster", f"workers={workers}", f"{shards}")


def test_workers_that_do_not_fit_into_memory(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Process:
        def memory_info(self) -> Process:
            return self

        rss = 100_000_000

    class Memory:
        total = 400_000_000

    monkeypatch.setattr(psutil, "Process", Process)
    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    attempt.data["cluster"]["workers"] = 2
    config = write_config(attempt.folder / "config.yaml", attempt.data)
    attempt.raymerge.ok("plan", config)  # two fit, four do not
    attempt.data["cluster"]["workers"] = 4
    for command in ("plan", "merge"):
        words = ("4 workers x", "400.0 MB", "cluster.shards", "vectors.dtype", "vectors.location")
        attempt.refused(*words, command=command)


@pytest.mark.parametrize("folder", ["gone", "file"])
def test_vectors_folder_that_is_none(attempt: Attempt, folder: str) -> None:
    (attempt.folder / "file").write_text("")
    path = str(attempt.folder / folder)
    attempt.data["vectors"] = {"location": "disk", "folder": path}
    for command in ("plan", "merge"):
        attempt.refused("vectors.folder", path, "is not a writable folder", command=command)


def test_vectors_folder_without_room(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)  # for four vectors of 630 kB
    full = attempt.folder / "full"
    full.mkdir()
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage if Path(path) == full else disk_usage(path)
    )
    attempt.data["vectors"] = {
        "dtype": "float32",
        "location": "disk",
        "folder": str(full),
    }
    attempt.refused("vectors.folder", "1.0 MB free", "2.5 MB", "vectors.dtype: bfloat16")


def test_more_gpus_than_there_are(attempt: Attempt) -> None:
    attempt.data["cluster"] = {"workers": 2, "gpus_per_worker": 64}
    attempt.refused("cluster.workers", "GPUs", "cluster.gpus_per_worker")


# --- the output folder -------------------------------------------------------------------------


def test_output_that_is_a_file(attempt: Attempt) -> None:
    attempt.output.write_text("precious")
    for argv in ((), ("--resume",), ("--overwrite",)):
        attempt.refused(str(attempt.output), "is a file", argv=argv)


def test_output_below_a_file(attempt: Attempt) -> None:
    (attempt.folder / "file").write_text("precious")
    attempt.refused("file", "not writable", argv=("--output", str(attempt.folder / "file" / "out")))


def test_output_with_an_impossible_name(attempt: Attempt) -> None:
    output = str(attempt.folder / ("x" * 300))
    attempt.refused(output, "File name too long", argv=("--output", output))


def test_output_in_use(attempt: Attempt) -> None:
    attempt.output.mkdir()
    (attempt.output / "config.yaml").write_text("model: x")
    attempt.refused(str(attempt.output), "in use", "--resume", "--overwrite")


@pytest.mark.parametrize("argv", [(), ("--overwrite",), ("--resume",)])
def test_folder_that_is_no_run(attempt: Attempt, argv: tuple[str, ...]) -> None:
    attempt.output.mkdir()
    (attempt.output / "open_clip_model.safetensors").write_text("precious")
    attempt.refused(
        str(attempt.output), "in use", "not written by `raymerge merge`", "no config.yaml",
        argv=argv,
    )  # fmt: skip


def test_output_that_is_not_writable(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the answer of the system is faked.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != attempt.folder)
    attempt.refused(str(attempt.output), f"{attempt.folder} is not writable")


def test_output_on_a_full_disk(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    attempt.refused(str(attempt.output), "6.8 MB", "1.0 KB free")


def test_a_merge_never_replaces_its_own_pretrained_model(attempt: Attempt) -> None:
    folder = attempt.pretrained(attempt.pretrained_state())
    (folder / "config.yaml").write_text("model: x\n")  # as if it were a run of raymerge
    attempt.refused("in use", argv=("--output", str(folder)))
    attempt.refused(
        "open_clip_model.safetensors", "reads", argv=("--output", str(folder), "--overwrite")
    )


def test_a_merge_never_replaces_an_expert(attempt: Attempt) -> None:
    folder = attempt.expert("earlier-run")
    folder.mkdir()
    save_file(attempt.expert_state(), folder / "open_clip_model.safetensors")
    (folder / "config.yaml").write_text("model: x\n")
    attempt.refused(
        "open_clip_model.safetensors", "reads", argv=("--output", str(folder), "--overwrite")
    )


# --- as a process ------------------------------------------------------------------------------


def test_the_console_script_says_it_in_one_line_too(world: World, tmp_path: Path) -> None:
    """With real logging and real streams: nothing that torch or open_clip say gets through."""
    state = load_file(world.config["tasks"][0]["checkpoint"])
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, tmp_path / "expert.safetensors")
    data = config_data(world, method={"name": "average"}, output="out")
    data["tasks"][0]["checkpoint"] = "expert.safetensors"
    config = write_config(tmp_path / "config.yaml", data)
    before = tree(tmp_path)
    ran = process([script(), "merge", config])
    refused(CommandResult(ran.returncode, ran.stdout, ran.stderr), "expert.safetensors", "NaN")
    assert tree(tmp_path) == before

"""The output folder: permission to write it, replacing a run, and the record of the steps."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import cache_tokenizer, read_steps, tree
from safetensors.torch import load_file, save_file
from world import World

from raymerge.config import load_config
from raymerge.engine.driver.loop import StepRecord
from raymerge.engine.driver.state import LearningState
from raymerge.errors import ConfigError, RunError, UserError
from raymerge.merging.optimizer import AdamState
from raymerge.runs.folder import Recorder, RunFolder
from raymerge.runs.merge import merge, score
from raymerge.runs.state import StateStore, learning_states

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture(autouse=True)
def only_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not draw plots, which takes longer than these merges and is tested elsewhere."""
    cache_tokenizer(monkeypatch)
    monkeypatch.setattr("raymerge.runs.folder.write_plots", lambda folder: None)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "out")


def _local(world: World, output: Path, **changes: Any) -> Any:
    return world.parse(output=output, cluster={"cpus_per_worker": 1}, **changes)


# --- who may write -----------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("state", ["absent", "empty", "hidden files"])
def test_an_unused_folder_is_free(
    world: World, folder: RunFolder, flags: tuple[bool, bool], state: str
) -> None:
    if state != "absent":
        folder.path.mkdir()
    if state == "hidden files":  # as a run killed while it wrote its first file leaves behind
        (folder.path / ".config.yaml.x1.tmp").write_text("mode")
    before = tree(folder.path)
    folder.check(world.parse(), resume=flags[0], overwrite=flags[1])
    assert tree(folder.path) == before


def test_a_folder_in_use_needs_a_flag(world: World, folder: RunFolder) -> None:
    config = world.parse(output=folder.path)
    folder.prepare(config, resume=False)
    with pytest.raises(
        UserError, match=r"--resume to continue that run or --overwrite to replace it"
    ):
        folder.check(config, resume=False, overwrite=False)
    folder.check(config, resume=True, overwrite=False)
    folder.check(config, resume=False, overwrite=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"optimizer": {"lr": 0.02}},
        {"optimizer": {"batch_size": 5}},
        {"method": {"granularity": "task"}},
        {"method": {"clamp": "none"}},
        {"precision": "bfloat16"},
        {"model": "local-dir:/elsewhere"},
    ],
)
def test_resume_needs_the_config_that_decides_lambda(
    world: World, folder: RunFolder, changes: dict[str, Any]
) -> None:
    folder.prepare(world.parse(output=folder.path), resume=False)
    with pytest.raises(UserError, match="config differs"):
        folder.check(world.parse(output=folder.path, **changes), resume=True, overwrite=False)


def test_resume_needs_the_same_tasks_in_the_same_order(world: World, folder: RunFolder) -> None:
    folder.prepare(world.parse(output=folder.path), resume=False)
    for tasks in (world.config["tasks"][::-1], world.config["tasks"][:3]):
        with pytest.raises(UserError, match="config differs"):
            folder.check(world.parse(tasks=tasks), resume=True, overwrite=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"steps": 50}},
        {"cluster": {"workers": 4, "shards": 2, "micro_batch": 3}},
        {"state": {"every_steps": 1, "keep": 9}},
    ],
)
def test_resume_may_change_what_does_not_decide_lambda(
    world: World, folder: RunFolder, changes: dict[str, Any]
) -> None:
    folder.prepare(world.parse(output=folder.path), resume=False)
    folder.check(world.parse(output=folder.path, **changes), resume=True, overwrite=False)


def test_resume_names_a_recorded_config_that_cannot_be_read(
    world: World, folder: RunFolder
) -> None:
    folder.path.mkdir()
    (folder.path / "config.yaml").write_text("{")
    with pytest.raises(ConfigError, match=str(folder.path / "config.yaml")):
        folder.check(world.parse(), resume=True, overwrite=False)


def test_the_recorded_config_is_the_config(world: World, folder: RunFolder) -> None:
    config = world.parse(output=folder.path, state={"keep": 2}, precision="bfloat16")
    folder.prepare(config, resume=False)
    assert load_config(folder.path / "config.yaml") == config


# --- what is replaced, what stays --------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_run_was_writing_is_removed_but_not_a_living_ones(
    world: World, folder: RunFolder, resume: bool
) -> None:
    folder.path.mkdir()
    ended = subprocess.Popen(["true"])
    ended.wait()
    machine = re.sub(r"\W", "", socket.gethostname())[:32]
    left, own, other = (
        folder.path / f".weights.{place}.x.tmp"
        for place in (f"{machine}-{ended.pid}", f"{machine}-{os.getpid()}", f"another-{ended.pid}")
    )
    for path in (left, own, other):
        path.write_text("")
    folder.prepare(world.parse(), resume=resume)
    assert not left.exists()
    assert own.exists()
    assert other.exists()


@pytest.mark.parametrize("method", ["average", "adamerging"])
def test_a_replaced_run_stays_until_the_new_one_is_whole(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    out = tmp_path / "out"
    merge(_local(world, out, method={"name": "task_arithmetic"}))
    old = {name: (out / name).read_bytes() for name in ("results.json", "config.yaml", WEIGHTS)}

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    config = _local(world, out, method={"name": method}, optimizer={"steps": 2})
    with monkeypatch.context() as patch:
        patch.setattr("raymerge.runs.merge.score", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(config, overwrite=True)
    assert {name: (out / ".previous" / name).read_bytes() for name in old} == old
    merge(config, overwrite=True)
    assert not (out / ".previous").exists()
    assert load_config(out / "config.yaml").method.name == method


def test_of_two_runs_in_one_folder_the_older_writes_nothing_more(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge without steps is fenced as a learning one is."""
    out, config = tmp_path / "out", _local(world, tmp_path / "out", method={"name": "average"})
    calls = []

    def interleaved(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            other = _local(world, out, method={"name": "task_arithmetic"})
            merge(other, overwrite=True)
        return original(*arguments)

    original = score
    monkeypatch.setattr("raymerge.runs.merge.score", interleaved)
    with pytest.raises(RunError, match="another run has taken it over"):
        merge(config)
    assert load_config(out / "config.yaml").method.name == "task_arithmetic"
    assert json.loads((out / "results.json").read_text())["method"] == "task_arithmetic"


def test_overwrite_replaces_only_what_raymerge_wrote(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(_local(world, out, optimizer={"steps": 2}))
    mine = out / "notes" / "thesis.tex"
    mine.parent.mkdir()
    mine.write_text("precious")
    (out / "figure.png").write_text("mine too")
    written = {path.name for path in out.iterdir()}
    merge(_local(world, out, method={"name": "individual"}), overwrite=True)
    assert mine.read_text() == "precious"
    assert (out / "figure.png").read_text() == "mine too"
    left = {path.name for path in out.iterdir()}
    # Nothing of the replaced run stands beside the results of the new one.
    gone = {"open_clip_model.safetensors", "open_clip_config.json", "lambdas.json", "metrics.jsonl"}
    assert written - left == gone | {"README.md"}
    assert [path.name for path in (out / "state").iterdir()] == ["attempt-0001"]  # fences


def test_a_run_that_replaces_another_shares_nothing_with_it(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(_local(world, out, optimizer={"steps": 4}))
    merge(_local(world, out, optimizer={"steps": 2, "lr": 0.5}), overwrite=True)
    assert read_steps(out / "metrics.jsonl") == [1, 2]
    assert [path.name for path in (out / "state").glob("step-*")] == ["step-00000002"]


def _nan(state: dict[str, torch.Tensor]) -> None:
    state["visual.proj"][0, 0] = float("nan")


def _misfit(state: dict[str, torch.Tensor]) -> None:
    state["visual.extra"] = torch.zeros(1)


@pytest.mark.parametrize("spoil", [_nan, _misfit])
@pytest.mark.parametrize("method", ["adamerging", "average", "ties", "individual"])
def test_a_refused_merge_leaves_the_run_it_would_replace(
    world: World,
    tmp_path: Path,
    finished: Path,
    method: str,
    spoil: Callable[[dict[str, torch.Tensor]], None],
) -> None:
    tasks = [dict(task) for task in world.config["tasks"]]
    state = load_file(tasks[3]["checkpoint"])
    spoil(state)
    save_file(state, tmp_path / "bad.safetensors")
    tasks[3]["checkpoint"] = str(tmp_path / "bad.safetensors")
    before = tree(finished)
    with pytest.raises(UserError, match=r"bad\.safetensors"):
        merge(_local(world, finished, tasks=tasks, method={"name": method}), overwrite=True)
    assert tree(finished) == before


def test_a_refused_resume_leaves_the_run(world: World, finished: Path) -> None:
    before = tree(finished)
    for changes in ({"seed": 7}, {"method": {"name": "average"}}):
        with pytest.raises(UserError, match="config differs"):
            merge(_local(world, finished, **changes), resume=True)
        with pytest.raises(UserError, match="in use"):
            merge(_local(world, finished, **changes))
    assert tree(finished) == before


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no test here may change."""
    out = tmp_path_factory.mktemp("finished") / "out"
    merge(_local(world, out, optimizer={"steps": 2}))
    return out


# --- the recorder ------------------------------------------------------------------------------


def _state(step: int) -> LearningState:
    values = torch.full((2, 3), float(step), dtype=torch.float64)
    return LearningState(AdamState(values, values + 0.1, values + 0.2, step))


def _record(step: int) -> StepRecord:
    entropy, lambdas, marginal = {"a": 0.25, "b": 0.75}, {"a": 0.3, "b": 0.3}, {"a": 1.0, "b": 0.9}
    return StepRecord(step, 0.5, entropy, lambdas, marginal, 0.01, {})


class _StoppedError(Exception):
    pass


@pytest.fixture
def store(folder: RunFolder) -> StateStore[AdamState]:
    folder.path.mkdir()
    store = learning_states(folder.state, "fingerprint", ("a", "b"), ("x", "y", "z"), keep=3)
    store.claim()
    return store


def _observe(
    folder: RunFolder,
    store: StateStore[AdamState],
    steps: range,
    *,
    every: int = 4,
    fail: bool = False,
) -> None:
    with Recorder(folder, store, every, _state(steps.start - 1), 100) as recorder:
        for step in steps:
            recorder.observe(_record(step), _state(step))
        if fail:
            raise _StoppedError


def test_a_line_of_metrics_is_written_with_its_step(
    folder: RunFolder, store: StateStore[AdamState]
) -> None:
    with Recorder(folder, store, 10, _state(0), 3) as recorder:
        for step in (1, 2, 3):
            recorder.observe(_record(step), _state(step))
            assert read_steps(folder.metrics) == list(range(1, step + 1))
    line = json.loads(folder.metrics.read_text().splitlines()[0])
    assert line["entropy"] == {"a": 0.25, "b": 0.75}
    assert line["marginal_entropy"] == {"a": 1.0, "b": 0.9}
    assert {"step", "loss", "entropy", "seconds"} <= set(line)


def test_every_step_is_saved_while_a_preemption_is_pending(
    folder: RunFolder, store: StateStore[AdamState]
) -> None:
    leaving = [False, True, True, False]
    with Recorder(folder, store, 100, _state(0), 4, lambda: leaving[step - 1]) as recorder:
        for step in (1, 2, 3, 4):
            recorder.observe(_record(step), _state(step))
        assert store.steps() == [2, 3]


def test_states_are_saved_at_intervals_and_at_the_end(
    folder: RunFolder, store: StateStore[AdamState]
) -> None:
    _observe(folder, store, range(1, 11))
    assert store.steps() == [4, 8, 10]


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_an_interrupted_run_loses_no_step(
    folder: RunFolder, store: StateStore[AdamState], stop: int
) -> None:
    with pytest.raises(_StoppedError):
        _observe(folder, store, range(1, stop + 1), fail=True)
    newest = store.newest()
    assert newest is not None
    assert newest.step == stop
    assert torch.equal(newest.adam.square, _state(stop).adam.square)


def test_a_run_without_a_step_leaves_no_state(
    folder: RunFolder, store: StateStore[AdamState]
) -> None:
    with pytest.raises(_StoppedError):
        _observe(folder, store, range(1, 1), fail=True)
    assert store.steps() == []


@pytest.mark.parametrize(
    "torn", ["", '{"step": 6, "lo', "garbage\n", "[]\n", '{"no": 1}\n', "\n\n", "3\n", "null\n"]
)
def test_each_step_has_one_line_after_a_resume(
    folder: RunFolder, store: StateStore[AdamState], torn: str
) -> None:
    """Lines of steps after the saved state are removed, and so is a torn last line."""
    _observe(folder, store, range(1, 8))
    with folder.metrics.open("a") as file:
        file.write(torn)
    _observe(folder, store, range(5, 11))
    assert read_steps(folder.metrics) == list(range(1, 11))
    assert folder.metrics.read_text().endswith("\n")


def test_metrics_that_cannot_be_written_fail_the_run_with_its_state_kept(
    folder: RunFolder, store: StateStore[AdamState]
) -> None:
    def run() -> None:
        with Recorder(folder, store, 100, _state(0), 5) as recorder:
            recorder.observe(_record(1), _state(1))
            recorder._metrics.close()
            recorder._metrics = Path("/dev/full").open("w")  # noqa: SIM115
            recorder.observe(_record(2), _state(2))

    with pytest.raises(RunError, match=r"metrics\.jsonl: cannot be written: No space left"):
        run()
    newest = store.newest()
    assert newest is not None
    assert newest.step == 1, "a state goes no further than its lines"


def test_an_interrupt_while_a_line_is_written_leaves_no_state_without_its_line(
    folder: RunFolder, store: StateStore[AdamState], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(record: StepRecord) -> None:
        raise KeyboardInterrupt

    def run() -> None:
        with Recorder(folder, store, 100, _state(0), 5) as recorder:
            recorder.observe(_record(1), _state(1))
            monkeypatch.setattr("raymerge.runs.folder.asdict", interrupted)
            recorder.observe(_record(2), _state(2))

    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    newest = store.newest()
    assert newest is not None
    _observe(folder, store, range(newest.step + 1, 4))
    assert read_steps(folder.metrics) == [1, 2, 3]


def test_a_state_that_cannot_be_saved_does_not_hide_why_the_run_ended(
    folder: RunFolder, store: StateStore[AdamState], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(state: LearningState) -> None:
        raise RunError("state not saved")

    monkeypatch.setattr(store, "save", save)
    with pytest.raises(_StoppedError):
        _observe(folder, store, range(1, 3), fail=True)
    with pytest.raises(RunError, match="state not saved"):
        _observe(folder, store, range(1, 3))


def test_lambdas_are_rows_of_tasks(folder: RunFolder) -> None:
    folder.path.mkdir()
    values = torch.tensor(np.arange(6.0).reshape(2, 3))
    folder.write_lambdas(("a", "b"), ("x", "y", "z"), values)
    assert json.loads((folder.path / "lambdas.json").read_text()) == {
        "tasks": ["a", "b"],
        "layers": ["x", "y", "z"],
        "values": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]],
    }


def test_a_disk_that_is_full_at_a_further_format_loses_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    merge(_local(world, out, method={"name": "average"}))
    old = (out / WEIGHTS).read_bytes()

    def save(state: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", save)
    config = _local(world, out, method={"name": "task_arithmetic"})
    with pytest.raises(RunError, match=r"state_dict\.pt: cannot be written: .*free space"):
        merge(config, overwrite=True, also=["state_dict"])
    assert (out / ".previous" / WEIGHTS).read_bytes() == old
    assert load_file(out / WEIGHTS)
    assert not list(out.glob("*.tmp")) + list(out.glob(".*.tmp"))

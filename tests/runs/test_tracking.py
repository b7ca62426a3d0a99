"""Trackers of a run: real event files, a real offline run of Weights & Biases."""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import process, script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from world import World

from raymerge.config import TrackingConfig, WandbConfig
from raymerge.engine.driver.loop import StepRecord
from raymerge.engine.messages import Incident
from raymerge.engine.scores import TaskScore
from raymerge.errors import UserError
from raymerge.runs import tracking
from raymerge.runs.merge import merge
from raymerge.runs.state import fingerprint
from raymerge.runs.tracking import TensorBoard, Tracking, require_trackers, scalars

BOTH: dict[str, Any] = {"tensorboard": True, "wandb": {"mode": "offline"}}
LOST = Incident("step 2", "worker", (1,), "died", 0.1, 4.0, 2)


def _record(step: int, loss: float | None = 1.5) -> StepRecord:
    return StepRecord(step, loss, {"a": 0.5}, {"a": 0.3}, {"a": 1.0}, 0.2, {"compute": 0.1})


def _events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def _steps(events: EventAccumulator, name: str) -> list[int]:
    return [event.step for event in events.Scalars(name)]


def test_a_record_gives_scalars_by_name_and_a_skipped_step_has_no_loss() -> None:
    assert scalars(_record(1), 2) == {
        "seconds/step": 0.2,
        "workers": 2.0,
        "loss": 1.5,
        "entropy/a": 0.5,
        "marginal_entropy/a": 1.0,
        "lambda/a": 0.3,
        "seconds/compute": 0.1,
    }
    assert "loss" not in scalars(_record(1, loss=None), 2)


def test_repeated_steps_are_logged_once(tmp_path: Path) -> None:
    for first, last in ((1, 5), (4, 7)):
        writer = TensorBoard(tmp_path, first - 1)
        for step in range(first, last + 1):
            writer.observe(_record(step), 2, [LOST] if step == 2 else [])
        writer.close(failed=True)
    events = _events(tmp_path)
    assert _steps(events, "loss") == list(range(1, 8))
    assert _steps(events, "failures/worker") == [2]


def test_a_merge_with_trackers_is_the_same_merge(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """λ to the bit; every step and the scores are told; no name of this machine is among it, and
    the key stays where it was."""
    key = secrets.token_hex(20)
    monkeypatch.setenv("WANDB_API_KEY", key)
    told = merge(world.parse(tmp_path / "told", tracking=BOTH))
    alone = merge(world.parse(tmp_path / "alone"))
    assert told.lambdas is not None
    assert alone.lambdas is not None
    assert torch.equal(told.lambdas, alone.lambdas)
    events = _events(tmp_path / "told" / "tensorboard")
    assert _steps(events, "entropy/colour") == [1, 2, 3, 4, 5]
    assert events.Scalars("top1")[0].value == pytest.approx(told.top1)
    (run,) = (tmp_path / "told" / "wandb").glob("offline-run-*/*.wandb")
    sent = run.read_bytes()
    for name in (b"entropy/colour", b"top1/shade", b"adamerging"):
        assert name in sent
    for private in (str(tmp_path), str(world.root), socket.gethostname()):
        assert private.encode() not in sent
    for file in (tmp_path / "told").rglob("*"):
        assert not file.is_file() or key.encode() not in file.read_bytes(), file


def test_a_resumed_run_keeps_its_id_and_a_replacing_one_has_its_own(
    world: World, tmp_path: Path
) -> None:
    def run(**how: bool) -> str:
        merge(world.parse(tmp_path / "out", tracking=BOTH), **how)
        return (tmp_path / "out" / "wandb" / "raymerge-run-id").read_text()

    first = run()
    assert run(resume=True) == first
    assert run(overwrite=True) != first
    assert _steps(_events(tmp_path / "out" / "tensorboard"), "loss") == [1, 2, 3, 4, 5]


def test_a_merge_without_steps_logs_nothing(world: World, tmp_path: Path) -> None:
    method = {"name": "task_arithmetic"}
    config = world.parse(tmp_path / "out", tracking=BOTH)
    merge(config.model_copy(update={"method": world.parse(method=method).method}))
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_a_failing_tracker_is_dropped_and_the_run_continues(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: TensorBoard, record: StepRecord, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoard, "observe", full)
    with caplog.at_level(logging.WARNING, "raymerge"):
        result = merge(world.parse(tmp_path / "out", tracking={"tensorboard": True}))
    assert result.scores
    told = [message for message in caplog.messages if "tracking.tensorboard" in message]
    assert told == [
        "tracking.tensorboard: OSError: [Errno 28] No space left on device; the run continues "
        "without it"
    ]


def test_each_failure_is_logged_once(world: World, tmp_path: Path) -> None:
    class Group:
        workers = 2
        incidents: Sequence[Incident] = ()

        def step(self, request: object) -> list[Any]:
            return []

    class Listener:
        def __init__(self) -> None:
            self.heard: list[Incident] = []

        def observe(self, record: StepRecord, workers: int, new: Sequence[Incident]) -> None:
            self.heard += new

        def finish(self, scores: object) -> None: ...

        def close(self, *, failed: bool) -> None: ...

    group, listener = Group(), Listener()
    group.incidents = (LOST,)  # in a merge before, with the same group
    told = Tracking(world.parse(tmp_path), tmp_path, group, 3)
    told._trackers["it"] = listener
    for count in (1, 2, 2, 3):
        group.incidents = (LOST,) * count
        told.observe(_record(1))
    assert listener.heard == [LOST, LOST]


def test_tracking_does_not_change_the_fingerprint(world: World) -> None:
    assert fingerprint(world.parse(tracking=BOTH)) == fingerprint(world.parse())


@pytest.mark.parametrize(
    ("given", "extra"),
    [
        (TrackingConfig(tensorboard=True), "tensorboard"),
        (TrackingConfig(wandb=WandbConfig(mode="offline")), "wandb"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    given: TrackingConfig, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"tracking\.{extra}: .*pip install 'raymerge\[{extra}\]'"):
        require_trackers(given)


def test_without_a_key_the_run_does_not_start(world: World, tmp_path: Path) -> None:
    config = world.write(
        tmp_path / "merge.yaml", tracking={"wandb": {}}, output=str(tmp_path / "out")
    )
    argv = (script(), "merge", config)
    planned = process((script(), "plan", config), HOME=str(tmp_path), WANDB_API_KEY="", NETRC="/no")
    assert (planned.returncode, planned.stdout) == (2, "")
    assert planned.stderr.splitlines()[-1].startswith("raymerge: error: tracking.wandb: not logged")
    done = process(argv, HOME=str(tmp_path), WANDB_API_KEY="", NETRC="/nonexistent")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("raymerge: error: tracking.wandb: not logged in")
    assert not (tmp_path / "out").exists()


def test_an_invalid_key_is_one_line(world: World, tmp_path: Path) -> None:
    config = world.write(tmp_path / "merge.yaml", tracking={"wandb": {}})
    done = process((script(), "plan", config), HOME=str(tmp_path), WANDB_API_KEY="abc")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("raymerge: error: tracking.wandb: ")


def test_a_run_that_the_caller_has_open_is_left_alone(world: World, tmp_path: Path) -> None:
    import wandb

    mine = wandb.init(project="mine", mode="offline", dir=str(tmp_path))
    try:
        merge(world.parse(tmp_path / "out", tracking={"wandb": {"mode": "offline"}}))
        assert wandb.run is mine
        mine.log({"still": 1})
        assert "top1" not in dict(mine.summary)
    finally:
        mine.finish()


def test_scores_have_their_mean() -> None:
    scores = {"a": TaskScore(0.5, 1.0, 1.0, 4), "b": TaskScore(1.0, 1.0, 1.0, 4)}
    assert tracking._results(scores) == {"top1": 0.75, "top1/a": 0.5, "top1/b": 1.0}
    assert tracking._results({}) == {}

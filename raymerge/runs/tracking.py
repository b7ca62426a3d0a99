"""Logging a run's steps to Ray's metrics, TensorBoard and Weights & Biases.

A tracker never affects the run: one that fails is dropped with a warning and the run continues. The
record of a run is its own ``metrics.jsonl``, which :mod:`raymerge.runs.folder` writes.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from raymerge.config import Config, TrackingConfig, WandbConfig
from raymerge.distributed.placement import on_ray
from raymerge.engine.driver.groups import Stepper
from raymerge.engine.driver.loop import StepRecord
from raymerge.engine.messages import Incident
from raymerge.engine.scores import TaskScore
from raymerge.errors import UserError
from raymerge.runs.redacted_copy import redacted_config

logger = logging.getLogger(__name__)

_TENSORBOARD, _WANDB = "tensorboard", "wandb"
_RUN_ID = "raymerge-run-id"
_FLUSH_S = 10


class Tracker(Protocol):
    """A destination for the scalars of a run."""

    def observe(self, record: StepRecord, workers: int, incidents: Sequence[Incident]) -> None:
        """Log one step and the worker failures since the previous step."""
        ...

    def finish(self, scores: Mapping[str, TaskScore]) -> None:
        """Log the scores of the finished run."""
        ...

    def close(self, *, failed: bool) -> None: ...


def require_trackers(config: TrackingConfig) -> None:
    """Raise :class:`UserError` if a tracker's package or login is missing. Opens no tracker."""
    if config.tensorboard:
        _require_package("tracking.tensorboard", _TENSORBOARD)
    if config.wandb is not None:
        _require_package("tracking.wandb", _WANDB)
        if config.wandb.mode == "online":
            _require_login()


def _require_package(key: str, name: str) -> None:
    if find_spec(name) is None:
        raise UserError(
            f"{key}: the package {name} is not installed; pip install 'raymerge[{name}]'"
        )


def _require_login() -> None:
    """Raise :class:`UserError` without a key: wandb would prompt for one and wait."""
    import wandb

    remedy = "run `wandb login`, set WANDB_API_KEY, or set tracking.wandb.mode: offline"
    try:
        is_logged_in = wandb.login(prompt=False)
    except wandb.Error as error:
        raise UserError(f"tracking.wandb: {_line(error)}; {remedy}") from None
    if not is_logged_in:
        raise UserError(f"tracking.wandb: not logged in; {remedy}")


def tracking_files(output: Path) -> list[Path]:
    """Return a run's event files and its id, which a run that replaces it does not use again."""
    files = [*(output / _TENSORBOARD).glob("events.out.tfevents.*"), output / _WANDB / _RUN_ID]
    return [file for file in files if file.exists()]


class Tracking:
    """All trackers of one run: those of the config, and Ray's metrics if the run is on Ray.

    ``start`` opens them once the output folder is prepared; leaving the context closes them.
    """

    def __init__(self, config: Config, output: Path, group: Stepper | None, steps: int) -> None:
        self._config, self._output, self._group, self._steps = config, output, group, steps
        self._trackers: dict[str, Tracker] = {}
        self._logged_incidents = 0 if group is None else len(group.incidents)

    def __enter__(self) -> Tracking:
        return self

    def start(self, step: int) -> None:
        """Open the trackers of a run that continues after ``step``."""
        for name, opening in self._openings(step):
            self._guard(name, self._open, name, opening)

    def _open(self, name: str, opening: Callable[[], Tracker]) -> None:
        self._trackers[name] = opening()

    def _openings(self, step: int) -> Iterator[tuple[str, Callable[[], Tracker]]]:
        """Yield each tracker's name and the function that opens it."""
        config, output = self._config.tracking, self._output
        if self._group is not None and on_ray():
            from raymerge.distributed.metrics import RayMetrics

            yield "Ray's metrics", lambda: RayMetrics(output.name, self._steps)
        if config.tensorboard:
            yield "tracking.tensorboard", lambda: TensorBoard(output / _TENSORBOARD, step)
        wandb = config.wandb
        if wandb is not None:
            yield "tracking.wandb", lambda: Wandb(wandb, output, self._config)

    def observe(self, record: StepRecord) -> None:
        if self._group is None or not self._trackers:
            return
        workers, new = self._group.workers, self._group.incidents[self._logged_incidents :]
        self._logged_incidents += len(new)
        self._each(lambda tracker: tracker.observe(record, workers, new))

    def finish(self, scores: Mapping[str, TaskScore]) -> None:
        self._each(lambda tracker: tracker.finish(scores))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._each(lambda tracker: tracker.close(failed=error is not None))

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            self._guard(name, action, tracker)

    def _guard(self, name: str, action: Callable[..., None], *args: Any) -> None:
        """Run ``action``; on an error drop the tracker and log a warning."""
        try:
            action(*args)
        except Exception as error:  # raised by a library, the network or the disk
            failed = self._trackers.pop(name, None)
            if failed is not None:
                with suppress(Exception):
                    failed.close(failed=True)
            logger.warning("%s: %s; the run continues without it", name, _line(error))


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def scalars(record: StepRecord, workers: int) -> dict[str, float]:
    """Return the scalars of a step by name, such as ``entropy/TASK``."""
    out = {"seconds/step": record.seconds, "workers": float(workers)}
    if record.loss is not None:
        out["loss"] = record.loss
    groups = {
        "entropy": record.entropy,
        "marginal_entropy": record.marginal_entropy,
        "lambda": record.lambdas,
        "seconds": record.phases,
    }
    for name, values in groups.items():
        out |= {f"{name}/{key}": value for key, value in values.items()}
    return out


def _results(scores: Mapping[str, TaskScore]) -> dict[str, float]:
    out = {f"top1/{name}": score.top1 for name, score in scores.items()}
    return {"top1": sum(out.values()) / len(out), **out} if out else {}


class TensorBoard:
    """TensorBoard's event files; earlier events after ``step``, which runs again, are purged."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        make: Callable[..., Any] = SummaryWriter
        self._writer = make(str(folder), purge_step=step + 1, flush_secs=_FLUSH_S)
        self._step, self._failures = step, Counter[str]()

    def observe(self, record: StepRecord, workers: int, incidents: Sequence[Incident]) -> None:
        self._step = record.step
        for name, value in scalars(record, workers).items():
            self._writer.add_scalar(name, value, record.step)
        self._failures.update(incident.kind for incident in incidents)
        for kind in {incident.kind for incident in incidents}:
            self._writer.add_scalar(f"failures/{kind}", self._failures[kind], record.step)

    def finish(self, scores: Mapping[str, TaskScore]) -> None:
        for name, value in _results(scores).items():
            self._writer.add_scalar(name, value, self._step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """One run of Weights & Biases per output folder, however often it is resumed.

    No path, no machine name and no code is sent.
    """

    def __init__(self, options: WandbConfig, output: Path, config: Config) -> None:
        import wandb

        self._failures = Counter[str]()
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            host="",
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
        )
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            name=options.name or output.name,
            id=_run_id(output / _WANDB),
            reinit="create_new",  # leaves a run that the caller has open alone
            resume="allow",
            mode=options.mode,
            dir=str(output),
            config=redacted_config(config.model_dump(mode="json", exclude_none=True)),
            settings=settings,
        )
        # Our own step is the x axis: after a resume some steps are logged again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def observe(self, record: StepRecord, workers: int, incidents: Sequence[Incident]) -> None:
        self._failures.update(incident.kind for incident in incidents)
        failures = {f"failures/{kind}": count for kind, count in self._failures.items()}
        self._run.log({"step": record.step, **scalars(record, workers), **failures})

    def finish(self, scores: Mapping[str, TaskScore]) -> None:
        self._run.summary.update(_results(scores))

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _run_id(folder: Path) -> str:
    """Return the id of the run at Weights & Biases, kept in ``folder`` for ``--resume``."""
    folder.mkdir(exist_ok=True)
    file = folder / _RUN_ID
    with suppress(FileNotFoundError):
        return file.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(8)
    file.write_text(run_id + "\n", encoding="utf-8")
    return run_id

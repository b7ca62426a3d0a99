"""Metrics of a run for Prometheus, through Ray; ``cluster/grafana/raymerge.json`` plots them.

Ray prefixes each name with ``ray_`` and adds labels of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from raymerge.engine.driver.loop import StepRecord
from raymerge.engine.messages import Incident
from raymerge.engine.scores import TaskScore

_STEP_BOUNDS_S = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


class RayMetrics:
    """See ``tracking.Tracker``. ``run``: the output folder's name, a label of every metric."""

    def __init__(self, run: str, steps: int) -> None:
        self._run, self._planned = {"run": run}, steps
        self._steps = _gauge("steps", "The steps to take")
        self._step = _gauge("step", "The last completed step")
        self._loss = _gauge("loss", "The loss, in nats, summed over the tasks")
        self._entropy = _gauge("entropy", "Mean entropy of a task's predictions, in nats", "task")
        self._lambda = _gauge("lambda", "Mean coefficient of a task's model", "task")
        self._workers = _gauge("workers", "Workers that take part")
        self._step_seconds = Histogram(
            "raymerge_step_seconds", "Seconds a step", boundaries=_STEP_BOUNDS_S, tag_keys=("run",)
        )
        self._phase_seconds = _counter(
            "phase_seconds_total", "Seconds of the slowest worker, by phase of a step", "phase"
        )
        self._skipped = _counter("skipped_steps_total", "Steps that gave NaN or infinity")
        self._failures = _counter("failures_total", "Failures that the run survived", "kind")
        self._lost_seconds = _counter(
            "lost_seconds_total", "Seconds from failures until all workers were ready again", "kind"
        )

    def observe(self, record: StepRecord, workers: int, incidents: Sequence[Incident]) -> None:
        run = self._run
        self._steps.set(self._planned, run)
        self._step.set(record.step, run)
        self._workers.set(workers, run)
        self._step_seconds.observe(record.seconds, run)
        if record.loss is None:
            self._skipped.inc(1, run)
        else:
            self._loss.set(record.loss, run)
        for task, value in record.entropy.items():
            self._entropy.set(value, {**run, "task": task})
        for task, value in record.lambdas.items():
            self._lambda.set(value, {**run, "task": task})
        for phase, seconds in record.phases.items():
            if seconds > 0:
                self._phase_seconds.inc(seconds, {**run, "phase": phase})
        for incident in incidents:
            kind = {**run, "kind": incident.kind}
            self._failures.inc(1, kind)
            self._lost_seconds.inc(incident.detect_s + incident.recover_s, kind)

    def finish(self, scores: Mapping[str, TaskScore]) -> None:
        """Do nothing: the process ends now, before Prometheus would scrape the scores."""

    def close(self, *, failed: bool) -> None:
        """Do nothing: no file or connection is open."""


def _gauge(name: str, description: str, *labels: str) -> Gauge:
    return Gauge(f"raymerge_{name}", description, tag_keys=("run", *labels))


def _counter(name: str, description: str, *labels: str) -> Counter:
    return Counter(f"raymerge_{name}", description, tag_keys=("run", *labels))

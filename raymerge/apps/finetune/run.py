"""``raymerge finetune``: check → train every target → test → results.

A target is one Ray task, or work of this process where ``place`` says so; which, decides nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from raymerge.apps.finetune.targets import Target, make_targets, training_images
from raymerge.apps.finetune.trainer import TrainingJob, train_target
from raymerge.config import Config, ZeroShot, dump_config
from raymerge.data.decoding import check_image
from raymerge.data.images import ImageList, Item
from raymerge.distributed.placement import Placement, choose_placement
from raymerge.engine.scores import TaskScore, results_json
from raymerge.errors import DataError, RunError, UserError
from raymerge.files.atomic import write_json, write_text
from raymerge.files.attempts import claim_attempt
from raymerge.files.output_folder import require_output
from raymerge.files.progress import Progress, progress_bar
from raymerge.models.pretrained import open_pretrained
from raymerge.models.resolve import resolve_model
from raymerge.runs.merge import evaluate
from raymerge.runs.plan.checks import check_heads
from raymerge.runs.plan.make import make_plan
from raymerge.runs.workers import known_resources

_CONFIG = "finetune.yaml"


@dataclass(frozen=True)
class FinetuneResult:
    """What was trained, and its scores on the test images, where tasks have any."""

    output: Path
    targets: tuple[Target, ...]
    experts: Mapping[str, TaskScore] = field(default_factory=dict)
    """Each task on its own expert."""
    joint: Mapping[str, TaskScore] = field(default_factory=dict)
    """Every task on the joint reference."""


def finetune(config: Config, *, resume: bool = False) -> FinetuneResult:
    """Train what the config asks for and write the output folder.

    Raises :class:`UserError` before anything is written when the input is wrong, and
    :class:`RunError` later; then ``resume`` continues from the newest states.
    """
    if config.output is None:
        raise UserError("output: missing; name a folder in the config or with --output")
    output = Path(config.output).absolute()
    require_output(output, [_CONFIG], writer="`raymerge finetune`", flags={"resume": resume})
    listed = training_images(config)
    targets = make_targets(config, listed, output)
    left = [target for target in targets if not _is_finished(target)]
    _check_inputs(config, listed if left else {})
    placement = _declared(config, len(left))
    for target in targets:
        if target not in left:
            _say(f"{target.place}: finished, skipped")
    began = perf_counter()
    if left:
        _train(config, left, output, placement)
    trained = perf_counter()
    result = _test(config, targets, output)
    seconds = {"train": trained - began, "evaluate": perf_counter() - trained}
    write_json(output / "results.json", _results(config, result, listed, seconds))
    return result


# --- checks: nothing is written ------------------------------------------------------------------


def _is_finished(target: Target) -> bool:
    """Raises :class:`UserError` if what is there of the target is of another config."""
    if target.is_finished():
        return True
    target.states().require_same_run()
    return False


def _check_inputs(config: Config, listed: Mapping[int, ImageList]) -> None:
    """The model, the test images, and every training image's file."""
    tested = _tested(config)
    if any(task.test for task in config.tasks):
        make_plan(tested, known_resources(tested), experts=False)
    else:
        resolved = resolve_model(config.model)
        open_pretrained(resolved)
        check_heads(config, resolved)
    items: Iterable[Item] = chain.from_iterable(images.items for images in listed.values())
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        problems = [problem for problem in pool.map(check_image, items) if problem]
    if problems:
        more = f" (and {len(problems) - 1} more images)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}")


def _tested(config: Config, experts: Mapping[str, Path] | None = None) -> Config:
    """The config for testing: each task with its own expert, if it has one of these."""
    tasks = [
        task.model_copy(
            update={
                "adapt": None,
                "checkpoint": str(experts[task.name]) if experts and task.name in experts else None,
            }
        )
        for task in config.tasks
    ]
    method = ZeroShot(name="zero_shot")
    return config.model_copy(update={"tasks": tuple(tasks), "method": method, "output": None})


def _declared(config: Config, targets: int) -> Placement | None:
    """Where the targets are trained, if that is known before a cluster is asked."""
    known = known_resources(config)
    return None if known is None or not targets else _place(config, targets, known)


def _place(config: Config, targets: int, resources: Any) -> Placement:
    """As for merging, a worker being one target's task; a target is never sharded."""
    workers = config.cluster.workers
    wanted = workers if workers == "auto" else min(workers, targets)
    cluster = config.cluster.model_copy(update={"workers": wanted, "shards": 1})
    return choose_placement(cluster, resources, targets)


def _prepare(config: Config, output: Path) -> int:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output {output}: cannot be made: {error.strerror}") from error
    write_text(output / _CONFIG, dump_config(config))
    return claim_attempt(output / "state")


# --- training ------------------------------------------------------------------------------------


def _train(
    config: Config, targets: Sequence[Target], output: Path, declared: Placement | None
) -> None:
    """Each target's states are removed once its file is written; the first error is raised.

    Nothing is written before there is a place for the work.
    """
    total = sum(target.steps for target in targets)
    with progress_bar(f"training {len(targets)} models", unit="step", total=total) as advance:
        for name in _trained(config, targets, output, declared, advance):
            _say(f"{name}: trained")


def _trained(
    config: Config,
    targets: Sequence[Target],
    output: Path,
    declared: Placement | None,
    advance: Progress,
) -> Iterator[str]:
    """The places of the targets as they are finished."""
    if declared is not None and declared.workers == 0:
        yield from _trained_here(config, targets, output, advance)
        return
    from raymerge.distributed.cluster import connect
    from raymerge.distributed.tasks import run_tasks

    local_cpus = 1
    if declared is not None:
        known = known_resources(config)
        local_cpus = max(known.cpus if known else 1, declared.workers * declared.cpus_per_worker)
    with connect(config.cluster.address, local_cpus) as resources:
        placement = declared or _place(config, len(targets), resources)
        if placement.workers == 0:
            yield from _trained_here(config, targets, output, advance)
            return
        attempt = _prepare(config, output)
        cpus, gpus = placement.cpus_per_worker, placement.gpus_per_worker
        jobs = [TrainingJob(config, each, attempt, cpus, gpus > 0) for each in targets]
        yield from run_tasks(
            train_target,
            [(job,) for job in jobs],
            cpus=cpus,
            gpus=gpus,
            at_once=placement.workers,
            watch=_MetricsWatch(targets, advance),
        )


def _trained_here(
    config: Config, targets: Sequence[Target], output: Path, advance: Progress
) -> Iterator[str]:
    attempt = _prepare(config, output)
    threads = config.cluster.cpus_per_worker
    gpu = config.cluster.gpus_per_worker != 0
    for target in targets:
        own = None if threads == "auto" else threads
        yield train_target(TrainingJob(config, target, attempt, own, gpu), advance)


class _MetricsWatch:
    """Moves the bar by what the targets' metrics, written anywhere, have grown."""

    def __init__(self, targets: Sequence[Target], advance: Progress) -> None:
        self._paths = [target.metrics for target in targets]
        self._advance, self._seen = advance, 0

    def __call__(self) -> None:
        lines = sum(path.read_bytes().count(b"\n") for path in self._paths if path.exists())
        self._advance(lines - self._seen)
        self._seen = lines


# --- what came of it -----------------------------------------------------------------------------


def _test(config: Config, targets: Sequence[Target], output: Path) -> FinetuneResult:
    """Test every trained model; what is wrong now was right before the training."""
    experts = {target.name: target.weights for target in targets if not target.is_joint}
    joint = [target.weights for target in targets if target.is_joint]
    own = _tested(config, experts)
    scores: dict[str, dict[str, TaskScore]] = {"experts": {}, "joint": {}}
    try:
        if any(task.test and task.checkpoint for task in own.tasks):
            scores["experts"] = evaluate(own, "individual")
        if joint and any(task.test for task in own.tasks):
            scores["joint"] = evaluate(own, str(joint[0]))
    except UserError as error:
        raise RunError(
            f"{error}; this was found after the training: mend it, then run again with --resume"
        ) from error
    return FinetuneResult(output, tuple(targets), scores["experts"], scores["joint"])


def _results(
    config: Config,
    result: FinetuneResult,
    listed: Mapping[int, ImageList],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "targets": {
            target.place: {
                "checkpoint": str(target.weights.relative_to(result.output)),
                "steps": target.steps,
                "images": {config.tasks[k].name: len(listed[k]) for k in target.tasks},
            }
            for target in result.targets
        }
    }
    if result.experts:
        data["experts"] = results_json("individual", result.experts)
    if result.joint:
        data["joint"] = results_json("joint", result.joint)
    data["timings"] = {"seconds": dict(seconds)}
    return data


def _say(text: str) -> None:
    tqdm.write(f"raymerge: {text}", file=sys.stderr)

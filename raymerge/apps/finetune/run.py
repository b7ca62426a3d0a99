"""``raymerge finetune``: check the input, train every target, test the models, write the results.

A target is trained by one Ray task or by this process, whichever the placement decides; the weights
are the same. One target's training is :mod:`raymerge.apps.finetune.trainer`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm import tqdm

from raymerge.apps.finetune.targets import Target, make_targets, training_images
from raymerge.apps.finetune.trainer import TrainingJob, train_target
from raymerge.config import Config, dump_config
from raymerge.config.methods import ZeroShot
from raymerge.data.images import ImageList
from raymerge.distributed.placement import Placement, choose_placement
from raymerge.engine.scores import TaskScore, results_json
from raymerge.errors import RunError, UserError
from raymerge.files.atomic import write_json, write_text
from raymerge.files.fencing import claim_attempt
from raymerge.files.output_folder import require_output
from raymerge.files.progress import Progress, progress_bar
from raymerge.models.pretrained import open_pretrained
from raymerge.models.resolve import resolve_model
from raymerge.runs.merge import evaluate
from raymerge.runs.plan.checks import check_heads, check_images
from raymerge.runs.plan.make import make_plan
from raymerge.runs.workers import known_resources

_CONFIG = "finetune.yaml"


@dataclass(frozen=True)
class FinetuneResult:
    """The trained targets, and the scores of the tasks that have test images."""

    output: Path
    targets: tuple[Target, ...]
    experts: Mapping[str, TaskScore] = field(default_factory=dict)
    """Each task on its own expert."""
    joint: Mapping[str, TaskScore] = field(default_factory=dict)
    """Every task on the joint reference."""


def finetune(config: Config, *, resume: bool = False) -> FinetuneResult:
    """Train the targets of the config and write the output folder.

    Raises :class:`UserError` before anything is written if the input is wrong, and
    :class:`RunError` later; ``resume`` then continues from the newest states.
    """
    if config.output is None:
        raise UserError("output: missing; name a folder in the config or with --output")
    output = Path(config.output).absolute()
    require_output(output, [_CONFIG], writer="`raymerge finetune`", flags={"resume": resume})
    # Checks, which read every image once.
    image_lists = training_images(config)
    targets = make_targets(config, image_lists, output)
    unfinished = [target for target in targets if not _is_finished(target)]
    _check_inputs(config, image_lists if unfinished else {})
    placement = _declared_placement(config, len(unfinished))
    for target in targets:
        if target not in unfinished:
            _report(f"{target.place}: finished, skipped")
    # Training, tests, results.
    began = perf_counter()
    if unfinished:
        _train(config, unfinished, output, placement)
    trained = perf_counter()
    result = _test(config, targets, output)
    seconds = {"train": trained - began, "evaluate": perf_counter() - trained}
    write_json(output / "results.json", _results(config, result, image_lists, seconds))
    return result


# --- checks, which write nothing -----------------------------------------------------------------


def _is_finished(target: Target) -> bool:
    """Return True if the target is trained.

    Raises :class:`UserError` if its file or its state is of another config.
    """
    if target.is_finished():
        return True
    target.states().require_same_run()
    return False


def _check_inputs(config: Config, image_lists: Mapping[int, ImageList]) -> None:
    """Check the model, the test images and the file of every training image."""
    tested = _test_config(config)
    if any(task.test for task in config.tasks):
        make_plan(tested, known_resources(tested), experts=False)
    else:
        resolved = resolve_model(config.model)
        open_pretrained(resolved)
        check_heads(config, resolved)
    check_images(chain.from_iterable(images.items for images in image_lists.values()))


def _test_config(config: Config, experts: Mapping[str, Path] | None = None) -> Config:
    """Return the config for testing: each task on its own expert, if ``experts`` has one."""
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


def _declared_placement(config: Config, targets: int) -> Placement | None:
    """Return the placement of the targets, or None if only a cluster can tell its resources."""
    resources = known_resources(config)
    return None if resources is None or not targets else _place(config, targets, resources)


def _place(config: Config, targets: int, resources: Any) -> Placement:
    """Return a placement as for merging, with one worker per target; targets are not sharded."""
    workers = config.cluster.workers
    count = workers if workers == "auto" else min(workers, targets)
    cluster = config.cluster.model_copy(update={"workers": count, "shards": 1})
    return choose_placement(cluster, resources, targets)


def _prepare(config: Config, output: Path) -> int:
    """Create the output folder, write the config and return the claimed attempt."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output {output}: cannot be created: {error.strerror}; "
            "free space, or choose another folder"
        ) from error
    write_text(output / _CONFIG, dump_config(config))
    return claim_attempt(output / "state")


# --- training ------------------------------------------------------------------------------------


def _train(
    config: Config, targets: Sequence[Target], output: Path, declared: Placement | None
) -> None:
    """Train the targets and report each as it is finished; the first error is raised.

    Nothing is written before the placement is known.
    """
    total = sum(target.steps for target in targets)
    with progress_bar(f"training {len(targets)} models", unit="step", total=total) as advance:
        for name in _train_all(config, targets, output, declared, advance):
            _report(f"{name}: trained")


def _train_all(
    config: Config,
    targets: Sequence[Target],
    output: Path,
    declared: Placement | None,
    advance: Progress,
) -> Iterator[str]:
    """Yield the name of each target as it is finished."""
    if declared is not None and declared.workers == 0:
        yield from _train_here(config, targets, output, advance)
        return
    # On Ray; the cluster may turn out to be this machine without GPUs.
    from raymerge.distributed.cluster import connect
    from raymerge.distributed.tasks import run_tasks

    local_cpus = 1
    if declared is not None:
        machine = known_resources(config)
        local_cpus = max(
            machine.cpus if machine else 1, declared.workers * declared.cpus_per_worker
        )
    with connect(config.cluster.address, local_cpus) as resources:
        placement = declared or _place(config, len(targets), resources)
        if placement.workers == 0:
            yield from _train_here(config, targets, output, advance)
            return
        # One task per target, so many at a time as the placement has workers.
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


def _train_here(
    config: Config, targets: Sequence[Target], output: Path, advance: Progress
) -> Iterator[str]:
    attempt = _prepare(config, output)
    threads = config.cluster.cpus_per_worker
    gpu = config.cluster.gpus_per_worker != 0
    for target in targets:
        own = None if threads == "auto" else threads
        yield train_target(TrainingJob(config, target, attempt, own, gpu), advance)


class _MetricsWatch:
    """Advances the progress bar by the new lines in the metrics of all targets."""

    def __init__(self, targets: Sequence[Target], advance: Progress) -> None:
        self._paths = [target.metrics for target in targets]
        self._advance, self._lines = advance, 0

    def __call__(self) -> None:
        lines = sum(path.read_bytes().count(b"\n") for path in self._paths if path.exists())
        self._advance(lines - self._lines)
        self._lines = lines


# --- results -------------------------------------------------------------------------------------


def _test(config: Config, targets: Sequence[Target], output: Path) -> FinetuneResult:
    """Test every trained model. Errors are run errors: the input was checked before training."""
    experts = {target.name: target.weights for target in targets if not target.is_joint}
    joint = [target.weights for target in targets if target.is_joint]
    own = _test_config(config, experts)
    scores: dict[str, dict[str, TaskScore]] = {"experts": {}, "joint": {}}
    try:
        if any(task.test and task.checkpoint for task in own.tasks):
            scores["experts"] = evaluate(own, "individual")
        if joint and any(task.test for task in own.tasks):
            scores["joint"] = evaluate(own, str(joint[0]))
    except UserError as error:
        raise RunError(
            f"{error}; this was found after the training: correct it, then run again with --resume"
        ) from error
    return FinetuneResult(output, tuple(targets), scores["experts"], scores["joint"])


def _results(
    config: Config,
    result: FinetuneResult,
    image_lists: Mapping[int, ImageList],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    data: dict[str, Any] = {
        "targets": {
            target.place: {
                "checkpoint": str(target.weights.relative_to(result.output)),
                "steps": target.steps,
                "images": {config.tasks[k].name: len(image_lists[k]) for k in target.tasks},
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


def _report(text: str) -> None:
    tqdm.write(f"raymerge: {text}", file=sys.stderr)

"""One run from config to output folder: check, start workers, learn λ, export, evaluate, report.

``merge`` and ``evaluate`` are the Python API, and the commands call them. What the config means for
the maths is left to ``runs.inputs``, the files of the output folder to ``runs.folder``.

Legend: K models, J rows of coefficients (K, or one), L layers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from torch import Tensor

from raymerge.config import Config, TrackingConfig
from raymerge.config.methods import Individual, ZeroShot
from raymerge.engine.driver.groups import WorkerGroup
from raymerge.engine.driver.loops import learn_lambdas
from raymerge.engine.driver.state import LearningState
from raymerge.engine.messages import EvaluateRequest
from raymerge.engine.scores import TaskScore, summarise
from raymerge.errors import CheckpointError, RunError, UserError, escape_unprintable
from raymerge.files.atomic import stage_file
from raymerge.files.output_folder import nearest_folder
from raymerge.files.progress import progress_bar
from raymerge.files.urls import is_remote
from raymerge.merging.registry import schedule_of
from raymerge.models.checkpoints.locate import locate, split_part
from raymerge.models.checkpoints.visual_tower import open_visual
from raymerge.models.convert import Also, require_also, write_also
from raymerge.models.pretrained import open_pretrained
from raymerge.runs.folder import Recorder, RunFolder
from raymerge.runs.inputs import MergeInputs
from raymerge.runs.plan.checks import check_one_group
from raymerge.runs.plan.expert_warnings import OpenedCheckpoint, choice_warning
from raymerge.runs.plan.make import make_plan
from raymerge.runs.plan.plan import Plan
from raymerge.runs.state import fingerprint, learning_states
from raymerge.runs.tracking import Tracking
from raymerge.runs.workers import known_resources, open_group, reuse_or_open_group

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge.

    ``lambdas``: (K, L) float64; None if nothing was merged, or if the method has no row for each
    model. ``seconds``: by phase. ``scores``: of the tasks with test images.
    """

    config: Config
    layers: tuple[str, ...]
    lambdas: Tensor | None
    scores: Mapping[str, TaskScore]
    seconds: Mapping[str, float]
    output: Path | None

    @property
    def top1(self) -> float | None:
        """Return the mean top-1 of the tasks with test images, in [0, 1]; None without any."""
        rows = self.scores.values()
        return sum(row.top1 for row in rows) / len(rows) if rows else None


def merge(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    group: WorkerGroup | None = None,
    also: Sequence[Also] = (),
) -> MergeResult:
    """Merge as the config says and write the output folder.

    ``resume``: continue the run in the output folder; ``overwrite``: replace it. ``group``: open
    workers of the same model and tasks (``open_group``), which stay open. ``also``: further formats
    of the merged model: a folder ``hf``, a file ``state_dict.pt``. Raises :class:`UserError` before
    anything is written if the input is wrong, and :class:`~raymerge.errors.RunError` later; the
    output folder then holds a state for ``resume``.
    """
    # Check all input before starting workers or writing anything.
    if config.output is None:
        raise UserError("output: missing; name a folder in the config or with --output")
    folder = RunFolder(Path(config.output))
    folder.check(config, resume=resume, overwrite=overwrite)
    plan = make_plan(config, known_resources(config))
    _warn(plan.warnings)
    require_also(plan.resolved, also)
    inputs = MergeInputs(config, plan)
    if also and not inputs.method.merges:
        raise UserError(
            f"--also {also[0]}: method {config.method.name} writes no model; drop --also"
        )
    # A static merge without test images needs no workers.
    needs_workers = inputs.needs_images or any(task.test for task in config.tasks)
    workers = (
        reuse_or_open_group(group, config, inputs.slots) if needs_workers else nullcontext(None)
    )
    with (
        workers as group,
        Tracking(config, folder.path, group, schedule_of(config).steps) as tracking,
    ):
        return _run(inputs, folder, group, tracking, resume=resume, also=also)


def _run(
    inputs: MergeInputs,
    folder: RunFolder,
    group: WorkerGroup | None,
    tracking: Tracking,
    *,
    resume: bool,
    also: Sequence[Also],
) -> MergeResult:
    """Learn, export and evaluate; every phase ends with a lap of the clock."""
    config, clock = inputs.config, _Clock()
    # On a cluster the number of workers is known only now.
    if group is not None:
        check_one_group(config, group.workers)
        if any(task.test for task in config.tasks):
            _require_shared(folder.path, group)
    inputs.require_finite()
    lambdas_JL = inputs.initial_lambdas()
    # Find λ, or the merged vector, from images; for other methods both are known already.
    if inputs.needs_images:
        assert group is not None
        if inputs.method.statistics is not None:
            inputs.solve_statistics(group)
            clock.lap("statistics")
        else:
            _load(inputs, group)
            clock.lap("load")
            lambdas_JL = _learn(inputs, folder, group, tracking, lambdas_JL, resume=resume)
            clock.lap("steps")
    # Export. Every file is read before a file of an earlier run is replaced.
    if inputs.method.merges:
        with stage_file(folder.weights, nearest_folder(folder.path)) as (temporary, commit):
            inputs.write(temporary, lambdas_JL)
            folder.prepare(config, resume=resume)
            folder.require_own()
            commit()
        folder.write_model_config(inputs.resolved)
        write_also(folder.path, also)
        if inputs.method.rows:
            folder.write_lambdas(config.model_names, inputs.layers.names, lambdas_JL)
        clock.lap("export")
    folder.prepare(config, resume=resume)
    # Score the written files, as a user of the folder would load them.
    scores: dict[str, TaskScore] = {}
    if group is not None and any(task.test for task in config.tasks):
        scores = _score_written(config, group, str(folder.path) if inputs.method.merges else None)
        clock.lap("evaluate")
    # Write the results, the model card and the report.
    incidents = () if group is None else group.incidents
    folder.write_results(config, inputs.plan, scores, clock.laps, incidents)
    tracking.finish(scores)
    return MergeResult(
        config=config,
        layers=inputs.layers.names,
        lambdas=lambdas_JL if inputs.method.merges and inputs.method.rows else None,
        scores=scores,
        seconds=clock.laps,
        output=folder.path,
    )


def _require_shared(output: Path, group: WorkerGroup) -> None:
    """Raise :class:`RunError` unless the workers, which score the written model, see the output."""
    with stage_file(output, nearest_folder(output)) as (temporary, _):
        group.require_visible(temporary)


def _score_written(config: Config, group: WorkerGroup, model: str | None) -> dict[str, TaskScore]:
    """Call :func:`score`. Errors are run errors: the model is already written."""
    try:
        return score(config, group, model)
    except UserError as error:
        raise RunError(
            f"{error}; the merged model is already written: correct this, then run `raymerge eval`"
        ) from error


def _load(inputs: MergeInputs, group: WorkerGroup) -> None:
    """Load the vectors and images of the steps into the workers."""
    with progress_bar("loading", unit="img") as progress:
        reports = group.load(inputs.load_request(), progress)
    for report in reports:
        logger.info("worker %d on %s: %s", report.rank, report.device, ", ".join(report.tasks))


def _learn(
    inputs: MergeInputs,
    folder: RunFolder,
    group: WorkerGroup,
    tracking: Tracking,
    start_KL: Tensor,
    *,
    resume: bool,
) -> Tensor:
    """Run the method's loop with saved states, metrics and a progress bar; return λ (K, L)."""
    config, loop = inputs.config, inputs.method.loop
    assert loop is not None
    # Continue from the newest state that this config may continue from.
    store = learning_states(
        folder.state,
        fingerprint(config),
        config.model_names,
        inputs.layers.names,
        config.state.keep,
    )
    state = (store.newest() if resume else None) or LearningState.initial(start_KL)
    steps, key = schedule_of(config).steps, inputs.method.steps_key
    if state.step > steps:
        raise UserError(
            f"{key}: {steps}, but the run in {folder.path} has taken {state.step}; "
            f"set {key} to at least {state.step} to resume it"
        )
    if resume:
        start = f"after step {state.step}" if state.step else "at step 0: it has no saved state"
        logger.warning("%s: the run continues %s", folder.path, start)
    # The folder is this run's from here on: an older driver can no longer save a state.
    folder.prepare(config, resume=resume)
    store.claim()
    tracking.start(state.step)
    every = config.state.every_steps
    urgent, log = lambda: group.preemption_pending, tracking.observe
    with Recorder(folder, store, every, state, steps, urgent, log) as recorder:
        return learn_lambdas(loop, inputs.learning(group), state, recorder.observe)


def evaluate(config: Config, model: str | None = None) -> dict[str, TaskScore]:
    """Score a checkpoint (default: the pretrained model) on the config's test images.

    ``model``: an output folder, any checkpoint that raymerge opens, or ``individual`` for each task
    on its own expert. Raises :class:`UserError` if the input is wrong.
    """
    if all(task.test is None for task in config.tasks):
        raise UserError("no task has a test folder; name one in tasks[].test to evaluate")
    # A config of the tests alone, which writes nothing.
    own = model == "individual"
    tasks = tuple(task.model_copy(update={"adapt": None}) for task in config.tasks)
    method = Individual(name="individual") if own else ZeroShot(name="zero_shot")
    unwritten = {"output": None, "tracking": TrackingConfig()}
    config = config.model_copy(update={"tasks": tasks, "method": method, **unwritten})
    # Check the config and the model before starting workers.
    plan = make_plan(config, known_resources(config), experts=own)
    _warn(plan.warnings)
    if model is not None and not own:
        pretrained, _ = open_pretrained(plan.resolved)
        visual = open_visual(model, pretrained.layout, pretrained)
        _warn([choice_warning(OpenedCheckpoint("--model", model, visual))])
        model = _for_workers(model, locate(model))
        if _is_whole(model, plan):  # its heads come from its own text tower
            config = config.model_copy(update={"model": config.model.with_weights(model)})
    scored = model or _for_workers(config.model.reference, plan.resolved.weights)
    with open_group(config, None) as group:
        return score(config, group, None if own else scored)


def _warn(warnings: Sequence[str]) -> None:
    for warning in filter(None, warnings):
        logger.warning("%s", escape_unprintable(warning))


def _is_whole(model: str, plan: Plan) -> bool:
    """Return whether a checkpoint holds a whole CLIP of the plan's architecture."""
    place, part = split_part(model)
    try:
        open_pretrained(replace(plan.resolved, weights=locate(place), part=part))
    except CheckpointError:
        return False
    return True


def _for_workers(reference: str, path: Path) -> str:
    """Return a local file's path, or the URL, which each node fetches for itself."""
    if is_remote(reference):
        return reference
    part = split_part(reference)[1]
    return f"{path.absolute()}#{part}" if part else str(path.absolute())


def score(config: Config, group: WorkerGroup, model: str | None) -> dict[str, TaskScore]:
    """Return the scores of each task on ``model``, or on its own expert if that is None."""
    tested = [task for task in config.tasks if task.test and (model or task.checkpoint)]
    request = EvaluateRequest(
        checkpoints={task.name: str(model or task.checkpoint) for task in tested},
        autocast=config.precision == "bfloat16",
    )
    with progress_bar("evaluating", unit="img") as progress:
        return summarise(group.evaluate(request, progress), config.task_names)


class _Clock:
    """The seconds of each phase of a run."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, phase: str) -> None:
        now = perf_counter()
        self.laps[phase] = now - self._last
        self._last = now

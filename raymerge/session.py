"""One run, start to end: check → workers → learn λ → export → evaluate → report.

``merge`` and ``evaluate`` are the Python API; the commands are thin layers over them.

Legend: K models, J rows of coefficients (K, or one), L layers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from raymerge.architecture import open_pretrained, unmerged_tensors
from raymerge.checkpoints.locate import locate
from raymerge.checkpoints.task_vectors import ties_statistics
from raymerge.checkpoints.visual import open_visual
from raymerge.config import (
    AdaMerging,
    Config,
    FwHard,
    FwSoft,
    Individual,
    Ties,
    TrackingConfig,
    ZeroShot,
)
from raymerge.convert import Also, require_also, write_also
from raymerge.driver import LocalGroup, WorkerGroup, learn
from raymerge.errors import RunError, UserError
from raymerge.evaluation import TaskScore, summarise
from raymerge.export import write_merged
from raymerge.files import staged
from raymerge.lambdas import read_lambdas
from raymerge.merging.bases import basis_of
from raymerge.merging.basis import Basis, Given
from raymerge.merging.layout import LayerMap
from raymerge.merging.optimizer import Adam, AdamState
from raymerge.merging.registry import (
    granularity_of,
    merged_checkpoints,
    method_of,
    needed_images,
    steps_of,
)
from raymerge.merging.ties import TiesStatistics
from raymerge.messages import EvaluateRequest, LoadRequest, Loss, WorkerSpec
from raymerge.placement import Resources, environment_address, on_ray, place
from raymerge.plan import Plan, local_resources, make_plan, require_one_group
from raymerge.progress import progress_bar
from raymerge.rundir import Recorder, RunFolder
from raymerge.state import StateStore, fingerprint
from raymerge.tracking import Tracking
from raymerge.urls import is_remote
from raymerge.watch import Watch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeResult:
    """What a merge gave. ``lambdas``: (K, L) float64, None where nothing was merged."""

    config: Config
    layers: tuple[str, ...]
    lambdas: Tensor | None
    scores: Mapping[str, TaskScore]
    seconds: Mapping[str, float]
    output: Path | None

    @property
    def top1(self) -> float | None:
        """Unweighted mean top-1 over the tasks with test images, in [0, 1]."""
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

    ``also``: further formats of the merged model: a folder ``hf``, a file ``state_dict.pt``.
    ``group``: workers already open for the same model and tasks (``open_group``), to be reused.
    Raises :class:`UserError` before anything is written when the input is wrong, and
    :class:`~raymerge.errors.RunError` later; then the output folder holds a state for ``resume``.
    """
    if config.output is None:
        raise UserError("output: missing; name a folder in the config or with --output")
    folder = RunFolder(Path(config.output))
    folder.check(config, resume=resume, overwrite=overwrite)
    plan = make_plan(config, known_resources(config))
    require_also(plan.resolved, also)
    merging = Merging(config, plan)
    if also and not merging.merges:
        raise UserError(f"--also {also[0]}: method {config.method.name} writes no model")
    needs_workers = merging.needs_images or any(task.test for task in config.tasks)
    workers = group_or_new(group, config, merging.slots) if needs_workers else nullcontext(None)
    with workers as group, Tracking(config, folder.path, group, steps_of(config)) as tracking:
        return _run(merging, folder, group, tracking, resume=resume, also=also)


def _run(
    merging: Merging,
    folder: RunFolder,
    group: WorkerGroup | None,
    tracking: Tracking,
    *,
    resume: bool,
    also: Sequence[Also] = (),
) -> MergeResult:
    config, clock = merging.config, _Clock()
    if group is not None:
        require_one_group(config, group.workers)
    merging.require_finite()
    lambdas_JL = merging.start()
    if merging.needs_images:
        assert group is not None
        if merging.method.kind == "statistics":
            merging.gather(group)
            clock.lap("statistics")
        else:
            _load(merging, group)
            clock.lap("load")
            lambdas_JL = _learn(merging, folder, group, tracking, lambdas_JL, resume=resume)
            clock.lap("steps")
    if merging.merges:
        # Every file is read before anything is replaced.
        with staged(folder.weights, folder.nearest) as (temporary, commit):
            merging.write(temporary, lambdas_JL)
            folder.prepare(config, resume=resume, keep=temporary)
            commit()
        folder.write_model_config(merging.resolved)
        write_also(folder.path, also)
        if merging.method.rows:
            folder.write_lambdas(config.model_names, merging.layers.names, lambdas_JL)
        clock.lap("export")
    folder.prepare(config, resume=resume)
    scores: dict[str, TaskScore] = {}
    if group is not None and any(task.test for task in config.tasks):
        scores = _score_written(config, group, str(folder.path) if merging.merges else None)
        clock.lap("evaluate")
    incidents = () if group is None else group.incidents
    folder.write_results(config, merging.plan, scores, clock.laps, incidents)
    tracking.finish(scores)
    return MergeResult(
        config=config,
        layers=merging.layers.names,
        lambdas=lambdas_JL if merging.merges and merging.method.rows else None,
        scores=scores,
        seconds=clock.laps,
        output=folder.path,
    )


def _score_written(config: Config, group: WorkerGroup, model: str | None) -> dict[str, TaskScore]:
    """As ``score``; what is wrong with an image now was found after the model was written."""
    try:
        return score(config, group, model)
    except UserError as error:
        raise RunError(
            f"{error}; this was found after the merge: mend it, then run `raymerge eval`"
        ) from error


def _load(merging: Merging, group: WorkerGroup) -> None:
    with progress_bar("loading", unit="img") as progress:
        reports = group.load(merging.load_request(), progress)
    for report in reports:
        logger.info("worker %d on %s: %s", report.rank, report.device, ", ".join(report.tasks))


def _learn(
    merging: Merging,
    folder: RunFolder,
    group: WorkerGroup,
    tracking: Tracking,
    start_KL: Tensor,
    *,
    resume: bool,
) -> Tensor:
    """The adaptive loop with state, metrics and a progress bar; the effective λ (K, L)."""
    config, optimizer, watch = merging.config, merging.optimizer(), merging.watch()
    store = StateStore(
        folder.state,
        fingerprint(config),
        config.model_names,
        merging.layers.names,
        config.state.keep,
    )
    state = (store.newest() if resume else None) or AdamState.start(start_KL)
    steps, key = steps_of(config), merging.steps_key
    if state.step > steps:
        raise UserError(
            f"{key}: {steps}, but the run in {folder.path} has taken {state.step}; "
            "resume with at least that many"
        )
    if resume:
        how = f"after step {state.step}" if state.step else "at step 0, for it has no saved state"
        logger.warning("%s: the run goes on %s", folder.path, how)
    folder.prepare(config, resume=resume)
    store.claim()
    tracking.start(state.step)
    every = config.state.every_steps
    urgent, also = lambda: group.leaving, tracking.observe
    with Recorder(folder, store, every, state, steps, urgent, also) as recorder:
        if isinstance(config.method, FwHard):
            from raymerge.frank_wolfe import hard

            return hard(group, config.method, state, watch, recorder.observe).lambdas
        if isinstance(config.method, FwSoft):
            from raymerge.frank_wolfe import soft

            loads = (merging.load_request(), merging.inner_load_request())
            return soft(
                group, config.method, state, watch, recorder.observe, loads, optimizer,
                config.optimizer.steps,
            ).lambdas  # fmt: skip
        state = learn(group, optimizer, state, steps, watch, recorder.observe)
    return optimizer.effective(state.lambdas)


def evaluate(config: Config, model: str | None = None) -> dict[str, TaskScore]:
    """Score a checkpoint (default: the pretrained model) on the config's test images.

    ``model``: an output folder, any checkpoint that raymerge opens, or ``individual`` for every
    task on its own expert. Raises :class:`UserError` where the input is wrong.
    """
    if all(task.test is None for task in config.tasks):
        raise UserError("no task has a test folder; name one in tasks[].test to evaluate")
    own = model == "individual"
    tasks = tuple(task.model_copy(update={"adapt": None}) for task in config.tasks)
    method = Individual(name="individual") if own else ZeroShot(name="zero_shot")
    untold = {"output": None, "tracking": TrackingConfig()}
    config = config.model_copy(update={"tasks": tasks, "method": method, **untold})
    plan = make_plan(config, known_resources(config), experts=own)
    if model is not None and not own:
        pretrained, _ = open_pretrained(plan.resolved)
        open_visual(model, pretrained.layout, pretrained)
        model = _for_workers(model, locate(model))
    scored = model or _for_workers(config.model.reference, plan.resolved.weights)
    with open_group(config, None) as group:
        return score(config, group, None if own else scored)


def _for_workers(reference: str, found: Path) -> str:
    """A local file by its path; what is behind a URL each node fetches for itself."""
    return reference if is_remote(reference) else str(found.absolute())


def score(config: Config, group: WorkerGroup, model: str | None) -> dict[str, TaskScore]:
    """Every test image once; each task on ``model``, or on its own expert if that is None."""
    tested = [task for task in config.tasks if task.test and (model or task.checkpoint)]
    request = EvaluateRequest(
        checkpoints={task.name: str(model or task.checkpoint) for task in tested},
        autocast=config.precision == "bfloat16",
    )
    with progress_bar("evaluating", unit="img") as progress:
        return summarise(group.evaluate(request, progress), config.task_names)


# --- the merge in terms of the maths -----------------------------------------------------------


class Merging:
    """A config and its files as θ₀, experts, basis, layers and a first λ."""

    def __init__(self, config: Config, plan: Plan | None = None) -> None:
        plan = plan or make_plan(config, known_resources(config))
        self.config, self.plan, self.resolved = config, plan, plan.resolved
        self.method = method_of(config.method)
        self.merges = self.method.merges
        self.needs_images = needed_images(config) != "none"
        self.slots = plan.step_images or None
        self.pretrained, _ = open_pretrained(plan.resolved)
        self._experts = [
            open_visual(reference, self.pretrained.layout, self.pretrained)
            for reference in merged_checkpoints(config)
        ]
        self.granularity = granularity_of(config.method)
        self.layers: LayerMap = self.pretrained.layout.layers(self.granularity)
        self.basis: Basis | None = basis_of(
            config.method, config.model_names, config.seed, self._ties
        )

    def _ties(self) -> TiesStatistics:
        method = self.config.method
        assert isinstance(method, Ties | AdaMerging)
        return ties_statistics(
            self.pretrained,
            self._experts,
            density=method.density,
            scope=method.trim_scope,
            extra_zeros=self.plan.leftovers,
            mean=isinstance(method, Ties) and method.merge == "mean",
            count_signs=self.method.learned,
        )

    def gather(self, group: WorkerGroup) -> None:
        """Find the merged vector of a method of statistics."""
        from raymerge.closed_form import merged_delta

        delta_P = merged_delta(self.config, group, self.pretrained, self._experts)
        self.basis, self._experts = Given(delta_P), []

    def require_finite(self) -> None:
        """Raise :class:`UserError` for NaN and Inf that would be found only after long work."""
        if self.needs_images or not self.merges:
            for _ in unmerged_tensors(self.pretrained):
                pass
        if not self.merges:
            for expert in self._experts:
                for piece in expert.layout.shard(0, 1).pieces():
                    expert.read(piece, torch.empty(piece.stop - piece.start))

    def start(self) -> Tensor:
        """The method's constant λ, or the first one of learning: (J, L) float64."""
        method = self.config.method
        if isinstance(method, FwHard | FwSoft) and method.start is not None:
            return read_lambdas(method.start, self.config.model_names, self.layers.names)
        models = len(self.config.models)
        scaling = self.method.scaling(method, models)
        rows = models if self.method.rows else 1
        return torch.full((rows, len(self.layers.names)), scaling, dtype=torch.float64)

    @property
    def steps_key(self) -> str:
        given = isinstance(self.config.method, FwHard | FwSoft)
        return "method.iterations" if given else "optimizer.steps"

    def optimizer(self) -> Adam:
        given, method = self.config.optimizer, self.config.method
        decay_steps = given.steps if given.schedule == "cosine" else None
        clamp = method.clamp if isinstance(method, AdaMerging) else "projected"
        return Adam(given.lr, given.betas, given.eps, clamp, decay_steps, given.sharpness)

    def watch(self) -> Watch:
        method, names = self.config.method, self.config.model_names
        rows = [
            names.index(task.name) if task.checkpoint is not None else -1
            for task in self.config.tasks
        ]
        if not isinstance(method, AdaMerging):
            return Watch(self.config.task_names, rows, "ignore")
        return Watch(
            self.config.task_names,
            rows,
            method.collapse,
            infomax=method.objective == "infomax",
            nonfinite=self.config.optimizer.nonfinite,
        )

    def load_request(self) -> LoadRequest:
        method, given = self.config.method, self.config.optimizer
        if isinstance(method, FwHard | FwSoft):
            loss = Loss(method.objective)
            return self._load_request(loss, method.images, 1, method.iterations)
        assert isinstance(method, AdaMerging)
        loss = Loss(method.objective, method.temperature, method.normalise, method.filter)
        return self._load_request(loss, given.images_per_step, given.batches, given.steps)

    def inner_load_request(self) -> LoadRequest:
        """Of the mergings within soft Frank-Wolfe: AdaMerging's own."""
        given = self.config.optimizer
        return self._load_request(Loss(), given.images_per_step, given.batches, given.steps)

    def _load_request(self, loss: Loss, images: int, batches: int, steps: int) -> LoadRequest:
        return LoadRequest(
            models=merged_checkpoints(self.config),
            granularity=self.granularity,
            loss=loss,
            images_per_step=images,
            batches=batches,
            steps=steps,
            seed=self.config.seed,
            autocast=self.config.precision == "bfloat16",
            basis=self.basis,
            storage=self.plan.storage,
        )

    def write(self, path: Path, lambdas_JL: Tensor) -> None:
        """Write the merged model's weights; reads every expert."""
        write_merged(path, self.pretrained, self._experts, lambdas_JL, self.layers, self.basis)


# --- workers -----------------------------------------------------------------------------------


def known_resources(config: Config) -> Resources | None:
    """This machine's, unless the run is to use a cluster, which is asked only when it starts."""
    if config.cluster.workers != 0 and _uses_cluster(config):
        return None
    return local_resources()


def _uses_cluster(config: Config) -> bool:
    """An address is given, or the caller has connected to Ray already."""
    if config.cluster.address or environment_address():
        return True
    return on_ray()


def group_or_new(
    group: WorkerGroup | None, config: Config, slots: int | None
) -> AbstractContextManager[WorkerGroup]:
    """The given group, left open at the end, or a new one that is closed."""
    if group is None:
        return open_group(config, slots)
    if (group.spec.model, group.spec.tasks) != (config.model, config.tasks):
        raise UserError("the given workers were opened for another model or other tasks")
    return nullcontext(group)


@contextmanager
def open_group(config: Config, slots: int | None) -> Iterator[WorkerGroup]:
    """Workers for the config's model and tasks: in this process, or as Ray actors.

    ``slots``: images of one step, None if only evaluation is wanted.
    """
    known = known_resources(config)
    declared = None if known is None else place(config.cluster, known, slots)
    if declared is not None and declared.workers == 0:
        yield _local_group(config)
        return
    from raymerge.distributed.cluster import connected
    from raymerge.distributed.group import ActorGroup

    local_cpus = 1
    if known is not None and declared is not None:
        local_cpus = max(known.cpus, declared.workers * declared.cpus_per_worker)
    with connected(config.cluster.address, local_cpus) as resources:
        placement = declared or place(config.cluster, resources, slots)
        if placement.workers == 0:
            yield _local_group(config)
            return
        group = ActorGroup(_worker_spec(config), placement, config.cluster)
        try:
            yield group
        finally:
            group.close()


def _local_group(config: Config) -> LocalGroup:
    threads = config.cluster.cpus_per_worker
    spec = replace(_worker_spec(config), use_gpu=config.cluster.gpus_per_worker != 0)
    return LocalGroup(spec if threads == "auto" else replace(spec, threads=threads))


def _worker_spec(config: Config) -> WorkerSpec:
    return WorkerSpec(config.model, config.tasks, micro_batch=config.cluster.micro_batch)


class _Clock:
    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = perf_counter()

    def lap(self, phase: str) -> None:
        now = perf_counter()
        self.laps[phase] = now - self._last
        self._last = now

"""The checks of a run's inputs, each of which raises one line that names the key and the remedy."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raymerge.config import Config, TaskConfig
from raymerge.data.decoding import check_image
from raymerge.data.images import ImageList, Item
from raymerge.data.sources import labelled_images, unlabeled_images
from raymerge.distributed.placement import Placement, Resources
from raymerge.errors import CheckpointError, DataError, UserError
from raymerge.files.output_folder import nearest_folder
from raymerge.merging.registry import (
    merged_checkpoints,
    method_of,
    needed_images,
)
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, open_visual
from raymerge.models.heads import saved_head
from raymerge.models.resolve import WEIGHTS_FILE, ResolvedModel
from raymerge.runs.lambdas import read_lambdas
from raymerge.runs.plan.plan import Plan, human_bytes

_LABELS = (
    "method.objective: cross_entropy needs one folder per class; sort the images so, or use "
    "objective: entropy"
)


def check_heads(config: Config, resolved: ResolvedModel) -> None:
    """Raises :class:`CheckpointError` for a saved head that does not fit its task."""
    for k, task in enumerate(config.tasks):
        if task.head is not None:
            saved_head(task, f"tasks[{k}]", resolved.features)


def _open_expert(
    task: TaskConfig, k: int, pretrained: VisualCheckpoint | None
) -> VisualCheckpoint | None:
    reference = str(task.checkpoint)
    try:
        if pretrained is None:
            open_checkpoint(reference)
            return None
        return open_visual(reference, pretrained.layout, pretrained)
    except CheckpointError as error:
        raise CheckpointError(f"tasks[{k}] ({task.name}): {error}") from error


def _adapt_images(task: TaskConfig, k: int) -> ImageList:
    return unlabeled_images(str(task.adapt), f"tasks[{k}].adapt")


def _test_images(task: TaskConfig, k: int) -> ImageList:
    return labelled_images(str(task.test), task.classnames, f"tasks[{k}].test")


def _check_images(items: Sequence[Item]) -> None:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        problems = [problem for problem in pool.map(check_image, items) if problem]
    if problems:
        more = f" (and {len(problems) - 1} more images)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}")


def _check_method(config: Config) -> None:
    """What the method needs and the config does not give."""
    method, needed = method_of(config.method), needed_images(config)
    if not config.models and not method.reference:
        raise UserError("no task has a checkpoint; merging needs at least one")
    missing = [task.name for task in config.models if task.adapt is None]
    if not method.every_model_needs_images and any(task.adapt for task in config.tasks):
        missing = []
    if needed != "none" and missing:
        raise DataError(
            f"method {config.method.name} learns from {needed} images, but task "
            f"{', '.join(missing)} has no adapt folder; name one in tasks[].adapt, or choose a "
            "method that needs no images"
        )
    if needed == "labelled":
        _require_labels(config)
    if not method.merges and all(task.test is None for task in config.tasks):
        raise DataError(
            f"method {config.method.name} merges nothing; it needs a test folder to report on"
        )


def _check_fit(config: Config, pretrained: VisualCheckpoint) -> None:
    """What the method needs of the model, and of the runs that it goes on from."""
    method, options, layout = method_of(config.method), config.method, pretrained.layout
    checkpoint, start = method.checkpoint(options), method.start(options)
    if checkpoint is not None:
        try:
            open_visual(checkpoint, layout, pretrained)
        except CheckpointError as error:
            raise CheckpointError(f"method.checkpoint: {error}") from error
    if start is not None:
        read_lambdas(start, config.model_names, layout.names)
    linear = "transformer.resblocks.0.attn.in_proj_weight"
    if method.open_clip_linears and linear not in layout.names:
        raise UserError(
            f"method.name: {options.name} solves for the linear layers of open_clip's vision "
            "transformers, and this model's image encoder is another kind; choose another method, "
            "such as fisher"
        )


def _require_labels(config: Config) -> None:
    """Every image to adapt on lies in a folder of its class."""
    for k, task in enumerate(config.tasks):
        if task.adapt is not None:
            where = f"tasks[{k}].adapt"
            try:
                labelled = labelled_images(task.adapt, task.classnames, where)
            except DataError as error:
                raise DataError(f"{error}; {_LABELS}") from error
            others = len(unlabeled_images(task.adapt, where)) - len(labelled)
            if others:
                raise DataError(
                    f"{where}: {task.adapt}: {others} images lie in no class folder; {_LABELS}"
                )


def _check_groups(config: Config, placement: Placement | None) -> None:
    if placement is not None:
        require_one_group(config, placement.processes)
    elif config.cluster.workers != "auto":
        require_one_group(config, max(1, int(config.cluster.workers)))


def require_one_group(config: Config, workers: int) -> None:
    """Raise :class:`UserError` where cosines are wanted of a gradient that is in parts: norms of
    the parts do not add up."""
    shards = config.cluster.shards
    if method_of(config.method).whole_gradient(config.method) and workers > shards:
        raise UserError(
            f"method.oracle: cosine needs the whole gradient in one group of workers, and "
            f"{workers} workers with cluster.shards={shards} are {workers // shards} groups; set "
            f"cluster.shards: {workers}, or method.oracle: inner"
        )


def _require_memory(plan: Plan, resources: Resources | None) -> None:
    """On this machine alone; a cluster's nodes are not asked."""
    if resources is None or not resources.is_elastic or plan.placement is None:
        return
    if plan.placement.gpus_per_worker:
        return
    each = sum(plan.bytes_per_worker.values())
    need, have = each * plan.placement.processes, resources.memory_bytes
    if have is not None and need > have:
        raise UserError(
            f"cluster.workers: {plan.placement.processes} workers x {human_bytes(each)} = "
            f"{human_bytes(need)}, but this machine has {human_bytes(have)}; use fewer workers, "
            "more cluster.shards, vectors.dtype: bfloat16 or vectors.location: disk"
        )


def _require_separate_output(config: Config, resolved: ResolvedModel) -> None:
    """A merge never replaces a file that it reads."""
    if config.output is None:
        return
    written = (Path(config.output) / WEIGHTS_FILE).resolve()
    for read in (resolved.weights, *map(Path, merged_checkpoints(config))):
        if written in (read.resolve(), (read / WEIGHTS_FILE).resolve()):
            raise UserError(
                f"output {config.output}: holds {written.name}, which this merge reads; choose "
                "another folder"
            )


def _require_disk(plan: Plan, output: str | None) -> None:
    if output is None or not plan.output_bytes:
        return
    folder = nearest_folder(Path(output))
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"output {output}: {folder} is not writable; choose another folder")
    free = shutil.disk_usage(folder).free
    if free < plan.output_bytes:
        raise UserError(
            f"output {output}: needs {human_bytes(plan.output_bytes)}, but {folder} has "
            f"{human_bytes(free)} free"
        )


def _require_scratch(plan: Plan, config: Config) -> None:
    """Room for vectors that are kept on disk, on this machine."""
    if plan.storage.location != "disk" or plan.placement is None:
        return
    folder = Path(config.vectors.folder or tempfile.gettempdir())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"vectors.folder: {folder} is no writable folder; name another")
    need, free = plan.vector_bytes * plan.placement.processes, shutil.disk_usage(folder).free
    if need > free:
        halve = ", or use vectors.dtype: bfloat16" if plan.storage.dtype == "float32" else ""
        raise UserError(
            f"vectors.folder: {folder} has {human_bytes(free)} free, but the task vectors take "
            f"{human_bytes(need)}; name another folder{halve}"
        )

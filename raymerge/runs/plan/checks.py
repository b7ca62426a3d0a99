"""The checks of a run's inputs. Each raises one line that names the key and the remedy.

They read headers, folder listings and image headers, and write nothing. What a run needs in memory
and time is left to ``estimates``; the order of the checks and the collection of their errors to
``make``.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raymerge.config import Config, TaskConfig
from raymerge.data.decoding import check_image
from raymerge.data.images import Item
from raymerge.data.sources import labelled_images, unlabeled_images
from raymerge.distributed.placement import Placement, Resources
from raymerge.errors import CheckpointError, DataError, UserError
from raymerge.files.output_folder import nearest_folder
from raymerge.merging.registry import merged_checkpoints, method_of, needed_images
from raymerge.models.checkpoints.locate import split_part
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.visual_tower import VisualCheckpoint, open_visual
from raymerge.models.heads import saved_head
from raymerge.models.resolve import WEIGHTS_FILE, ResolvedModel
from raymerge.runs.lambdas import read_lambdas
from raymerge.runs.plan.plan import Plan, human_bytes

_LABELS_REMEDY = (
    "method.objective: cross_entropy needs one folder per class; sort the images so, or use "
    "objective: entropy"
)


# --- models and images ---------------------------------------------------------------------------


def open_expert(
    task: TaskConfig, key: str, pretrained: VisualCheckpoint | None
) -> VisualCheckpoint | None:
    """Open a task's expert and compare it with the pretrained model.

    Return None if there is no pretrained model to compare it with. ``key``: the task's config key.
    Raises :class:`CheckpointError`.
    """
    reference = str(task.checkpoint)
    try:
        if pretrained is None:
            open_checkpoint(reference)
            return None
        return open_visual(reference, pretrained.layout, pretrained)
    except CheckpointError as error:
        raise CheckpointError(f"{key} ({task.name}): {error}") from error


def check_heads(config: Config, resolved: ResolvedModel) -> None:
    """Raise :class:`CheckpointError` for a saved head that does not fit its task."""
    for k, task in enumerate(config.tasks):
        if task.head is not None:
            saved_head(task, f"tasks[{k}]", resolved.features)


def check_images(items: Iterable[Item]) -> None:
    """Raise :class:`DataError` that names the first unreadable image and counts the others."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        problems = [problem for problem in pool.map(check_image, items) if problem]
    if problems:
        more = f" (and {len(problems) - 1} more images)" if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}{more}")


# --- the method ----------------------------------------------------------------------------------


def check_method(config: Config) -> None:
    """Raise :class:`UserError` if the tasks lack checkpoints or images that the method needs."""
    method, needed = method_of(config.method), needed_images(config)
    if not config.models and not method.reference:
        raise UserError(
            "no task has a checkpoint; merging needs at least one; name a tasks[].checkpoint"
        )
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
        _check_labels(config)
    if not method.merges and all(task.test is None for task in config.tasks):
        raise DataError(
            f"method {config.method.name} only reports scores, but no task has a test folder; "
            "name one in tasks[].test"
        )


def _check_labels(config: Config) -> None:
    """Raise :class:`DataError` unless every image to adapt on lies in a folder of its class."""
    for k, task in enumerate(config.tasks):
        if task.adapt is None:
            continue
        key = f"tasks[{k}].adapt"
        try:
            labelled = labelled_images(task.adapt, task.classnames, key)
        except DataError as error:
            raise DataError(f"{error}; {_LABELS_REMEDY}") from error
        unlabelled = len(unlabeled_images(task.adapt, key)) - len(labelled)
        if unlabelled:
            raise DataError(
                f"{key}: {task.adapt}: {unlabelled} images lie in no class folder; {_LABELS_REMEDY}"
            )


def check_fit(config: Config, pretrained: VisualCheckpoint) -> None:
    """Raise :class:`UserError` if the model does not fit the method or the run that it continues.

    The method may read a checkpoint of its own, start from an earlier run's λ, or need open_clip's
    vision transformer.
    """
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


# --- workers -------------------------------------------------------------------------------------


def check_declared_workers(config: Config, placement: Placement | None) -> None:
    """Call :func:`check_one_group` with the number of workers, if it is known before the run."""
    if placement is not None:
        check_one_group(config, placement.processes)
    elif config.cluster.workers != "auto":
        check_one_group(config, max(1, int(config.cluster.workers)))


def check_one_group(config: Config, workers: int) -> None:
    """Raise :class:`UserError` if a method that needs the whole gradient gets several groups.

    Each group has the gradient of its own images; norms and cosines of these parts do not add up.
    """
    shards = config.cluster.shards
    if method_of(config.method).whole_gradient(config.method) and workers > shards:
        raise UserError(
            f"method.oracle: cosine needs the whole gradient in one group of workers, and "
            f"{workers} workers with cluster.shards={shards} are {workers // shards} groups; set "
            f"cluster.shards: {workers}, or method.oracle: inner"
        )


# --- memory and disk -----------------------------------------------------------------------------


def check_memory(plan: Plan, resources: Resources | None) -> None:
    """Raise :class:`UserError` if the workers need more memory than this machine has.

    Workers on GPUs and on the nodes of a cluster are not checked.
    """
    if resources is None or not resources.is_elastic or plan.placement is None:
        return
    if plan.placement.gpus_per_worker:
        return
    each = sum(plan.bytes_per_worker.values())
    need, memory = each * plan.placement.processes, resources.memory_bytes
    if memory is not None and need > memory:
        raise UserError(
            f"cluster.workers: {plan.placement.processes} workers x {human_bytes(each)} = "
            f"{human_bytes(need)}, but this machine has {human_bytes(memory)}; use fewer workers, "
            "more cluster.shards, vectors.dtype: bfloat16 or vectors.location: disk"
        )


def check_separate_output(config: Config, resolved: ResolvedModel) -> None:
    """Raise :class:`UserError` if the merge would replace a file that it reads."""
    if config.output is None:
        return
    output = (Path(config.output) / WEIGHTS_FILE).resolve()
    places = [split_part(reference)[0] for reference in merged_checkpoints(config)]
    paths = [Path(place.removeprefix("local-dir:")) for place in places]
    for path in (resolved.weights, *paths):
        if output in (path.resolve(), (path / WEIGHTS_FILE).resolve()):
            raise UserError(
                f"output {config.output}: holds {output.name}, which this merge reads; choose "
                "another folder"
            )


def check_disk(plan: Plan, output: str | None) -> None:
    """Raise :class:`UserError` if the output folder is not writable or lacks space."""
    if output is None or not plan.output_bytes:
        return
    folder = nearest_folder(Path(output))
    if not _is_writable(folder):
        raise UserError(f"output {output}: {folder} is not writable; choose another folder")
    free = shutil.disk_usage(folder).free
    if free < plan.output_bytes:
        raise UserError(
            f"output {output}: needs {human_bytes(plan.output_bytes)}, but {folder} has "
            f"{human_bytes(free)} free; choose another folder"
        )


def check_vector_folder(plan: Plan, config: Config) -> None:
    """Raise :class:`UserError` if task vectors kept on this machine's disk do not fit there."""
    if plan.storage.location != "disk" or plan.placement is None:
        return
    folder = Path(config.vectors.folder or tempfile.gettempdir())
    if not _is_writable(folder):
        raise UserError(f"vectors.folder: {folder} is not a writable folder; name another")
    need, free = plan.vector_bytes * plan.placement.processes, shutil.disk_usage(folder).free
    if need > free:
        halve = ", or use vectors.dtype: bfloat16" if plan.storage.dtype == "float32" else ""
        raise UserError(
            f"vectors.folder: {folder} has {human_bytes(free)} free, but the task vectors take "
            f"{human_bytes(need)}; name another folder{halve}"
        )


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)

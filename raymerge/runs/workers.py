"""Workers for a run: in this process, or as Ray actors, as the config and the cluster decide."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

from raymerge.config import (
    Config,
)
from raymerge.distributed.placement import Resources, choose_placement, environment_address, on_ray
from raymerge.engine.driver.groups import LocalGroup, WorkerGroup
from raymerge.engine.messages import WorkerSpec
from raymerge.engine.worker.clip_model import ClipSource
from raymerge.errors import UserError
from raymerge.runs.plan.make import local_resources


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
    if group.source != _source(config):
        raise UserError("the given workers were opened for another model or other tasks")
    return nullcontext(group)


@contextmanager
def open_group(config: Config, slots: int | None) -> Iterator[WorkerGroup]:
    """Workers for the config's model and tasks: in this process, or as Ray actors.

    ``slots``: images of one step, None if only evaluation is wanted.
    """
    known = known_resources(config)
    declared = None if known is None else choose_placement(config.cluster, known, slots)
    if declared is not None and declared.workers == 0:
        yield _local_group(config)
        return
    from raymerge.distributed.actor_group import ActorGroup
    from raymerge.distributed.cluster import connect

    local_cpus = 1
    if known is not None and declared is not None:
        local_cpus = max(known.cpus, declared.workers * declared.cpus_per_worker)
    with connect(config.cluster.address, local_cpus) as resources:
        placement = declared or choose_placement(config.cluster, resources, slots)
        if placement.workers == 0:
            yield _local_group(config)
            return
        group = ActorGroup(_source(config), _worker_spec(config), placement, config.cluster)
        try:
            yield group
        finally:
            group.close()


def _local_group(config: Config) -> LocalGroup:
    threads = config.cluster.cpus_per_worker
    spec = replace(_worker_spec(config), use_gpu=config.cluster.gpus_per_worker != 0)
    spec = spec if threads == "auto" else replace(spec, threads=threads)
    return LocalGroup(_source(config), spec)


def _worker_spec(config: Config) -> WorkerSpec:
    return WorkerSpec(micro_batch=config.cluster.micro_batch)


def _source(config: Config) -> ClipSource:
    return ClipSource(config.model, config.tasks)

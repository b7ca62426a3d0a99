"""Workers for a run of CLIP: in this process, or as Ray actors, as the config and cluster decide.

How many workers there are is decided by ``distributed.placement``; this module connects, starts and
closes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

from raymerge.config import Config
from raymerge.distributed.placement import Resources, choose_placement, environment_address, on_ray
from raymerge.engine.driver.groups import LocalGroup, WorkerGroup
from raymerge.engine.messages import WorkerSpec
from raymerge.engine.worker.clip_source import ClipSource
from raymerge.errors import UserError
from raymerge.runs.plan.make import local_resources


def known_resources(config: Config) -> Resources | None:
    """Return this machine's resources, or None if the run uses a cluster, which is asked later."""
    if config.cluster.workers != 0 and _uses_cluster(config):
        return None
    return local_resources()


def _uses_cluster(config: Config) -> bool:
    """Return True if the config or environment has an address, or Ray is connected already."""
    if config.cluster.address or environment_address():
        return True
    return on_ray()


def reuse_or_open_group(
    group: WorkerGroup | None, config: Config, slots: int | None
) -> AbstractContextManager[WorkerGroup]:
    """Return ``group``, which stays open afterwards, or a new group, which is closed.

    Raises :class:`UserError` if ``group`` serves another model or other tasks.
    """
    if group is None:
        return open_group(config, slots)
    if group.source != _source(config):
        raise UserError(
            "group: its workers were opened for another model or other tasks; open new ones "
            "for this config with open_group"
        )
    return nullcontext(group)


@contextmanager
def open_group(config: Config, slots: int | None) -> Iterator[WorkerGroup]:
    """Open workers for the config's model and tasks: in this process, or as Ray actors.

    ``slots``: the images of one step, None without steps. Raises :class:`UserError` if the cluster
    is too small.
    """
    # Without a cluster the placement is known now, and a single worker needs no Ray.
    local = known_resources(config)
    declared = None if local is None else choose_placement(config.cluster, local, slots)
    if declared is not None and declared.workers == 0:
        yield _local_group(config)
        return
    from raymerge.distributed.actor_group import ActorGroup
    from raymerge.distributed.cluster import connect

    # A Ray of this machine gets as many CPUs as the workers declare, even beyond the real ones.
    local_cpus = 1
    if local is not None and declared is not None:
        local_cpus = max(local.cpus, declared.workers * declared.cpus_per_worker)
    # A cluster is asked for its resources once it is connected.
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
    """Return one worker in this process, with the config's threads."""
    threads = config.cluster.cpus_per_worker
    spec = replace(_worker_spec(config), use_gpu=config.cluster.gpus_per_worker != 0)
    spec = spec if threads == "auto" else replace(spec, threads=threads)
    return LocalGroup(_source(config), spec)


def _worker_spec(config: Config) -> WorkerSpec:
    return WorkerSpec(micro_batch=config.cluster.micro_batch)


def _source(config: Config) -> ClipSource:
    return ClipSource(config.model, config.tasks)

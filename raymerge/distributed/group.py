"""ActorGroup: W MergeWorkers as Ray actors, in G process groups of S shards.

Legend: W workers, G groups, S shards.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raymerge.config import ClusterConfig
from raymerge.errors import RaymergeError, RunError, WorkerLostError
from raymerge.messages import (
    ChunkScore,
    EvaluateRequest,
    Incident,
    LoadReport,
    LoadRequest,
    Rendezvous,
    Statistics,
    StatisticsRequest,
    StepRequest,
    StepResult,
    WorkerSpec,
)
from raymerge.placement import Placement
from raymerge.progress import Progress
from raymerge.worker import MergeWorker

logger = logging.getLogger(__name__)

_ABORT_TIMEOUT_S = 5.0


class ActorGroup:
    """All workers of a run as actors; see ``driver.WorkerGroup`` for the contract.

    ``generation`` counts how often the process groups were built: a result that carries another
    number is of an abandoned attempt. Recovery in flight would kill, recreate, ``_rendezvous``
    again under the next generation and replay the step; today a lost worker ends the run with the
    state kept.
    """

    def __init__(self, spec: WorkerSpec, placement: Placement, config: ClusterConfig) -> None:
        self.workers = placement.workers
        self.generation = 0
        self.incidents: list[Incident] = []
        self._config = config
        self.spec = spec
        self._run = uuid.uuid4().hex
        self._placement_groups: list[PlacementGroup] = []
        self._actors: list[Any] = []
        try:
            self._start(spec, placement)
        except BaseException:
            self.close()
            raise

    # --- the WorkerGroup contract ------------------------------------------------------------

    def load(self, request: LoadRequest, progress: Progress | None = None) -> list[LoadReport]:
        def report(loaded: LoadReport) -> None:
            if progress is not None:
                progress(loaded.images)

        return self._call("load", request, timeout_s=self._config.load_timeout_s, on_result=report)

    def step(self, request: StepRequest) -> list[StepResult]:
        stamped = replace(request, generation=self.generation)
        what = f"step {request.step + 1}"
        results = self._call("step", stamped, timeout_s=self._config.step_timeout_s, what=what)
        for result in results:
            if result.generation != self.generation:
                raise RunError(
                    f"{what}: {self._who(result.rank)} answered for generation "
                    f"{result.generation}, but this is {self.generation}"
                )
        return results

    def evaluate(
        self, request: EvaluateRequest, progress: Progress | None = None
    ) -> list[ChunkScore]:
        def report(scores: list[ChunkScore]) -> None:
            if progress is not None:
                progress(sum(score.examples for score in scores))

        parts = self._call(
            "evaluate", request, timeout_s=self._config.load_timeout_s, on_result=report
        )
        return [score for part in parts for score in part]

    def statistics(self, requests: Sequence[StatisticsRequest]) -> Iterator[Statistics]:
        """At most two requests wait at each worker, and results are taken in order: so little is
        held however many tasks there are."""
        timeout_s = self._config.load_timeout_s
        waiting: deque[tuple[int, Any]] = deque()
        for request in requests:
            rank = request.task % self.workers
            waiting.append((rank, self._actors[rank].statistics.remote(request)))
            if len(waiting) == 2 * self.workers:
                yield self._one(*waiting.popleft(), timeout_s, "statistics")
        while waiting:
            yield self._one(*waiting.popleft(), timeout_s, "statistics")

    def close(self) -> None:
        """Kill the actors and free their places. Never raises: it runs on the way out."""
        for actor in self._actors:
            try:
                ray.kill(actor)
            except (RayError, ValueError) as error:
                logger.debug("kill: %s", error)
        for group in self._placement_groups:
            try:
                remove_placement_group(group)
            except (RayError, ValueError) as error:
                logger.debug("remove placement group: %s", error)
        self._actors, self._placement_groups = [], []

    # --- start ---------------------------------------------------------------------------------

    def _start(self, spec: WorkerSpec, placement: Placement) -> None:
        self._placement_groups = [_reserve(placement) for _ in range(placement.groups)]
        self._wait_for_places(placement)
        places = _ranked_places(self._placement_groups, placement.shards)
        for rank, (group, bundle) in enumerate(places):
            worker = replace(
                spec,
                rank=rank,
                workers=placement.workers,
                shards=placement.shards,
                threads=placement.cpus_per_worker,
                use_gpu=placement.gpus_per_worker > 0,
            )
            self._actors.append(_create(worker, placement, group, bundle))
        self._call("ping", timeout_s=self._config.start_timeout_s, what="start")
        if placement.shards > 1:
            self._rendezvous(placement.shards)

    def _wait_for_places(self, placement: Placement) -> None:
        deadline = time.monotonic() + self._config.start_timeout_s
        for group in self._placement_groups:
            if not group.wait(timeout_seconds=max(0.0, deadline - time.monotonic())):
                raise RunError(
                    f"the cluster found no room for {placement.workers} workers with "
                    f"{placement.cpus_per_worker} CPUs and {placement.gpus_per_worker:g} GPUs each "
                    f"within {self._config.start_timeout_s:g} s; lower cluster.workers or raise "
                    "cluster.start_timeout_s"
                )

    def _rendezvous(self, shards: int) -> None:
        """Build each group's process group under this generation's name."""
        joins = []
        for first in range(0, self.workers, shards):
            members = self._actors[first : first + shards]
            asked = [member.__ray_call__.remote(_node_address) for member in members]
            hosts = self._gather(asked, self._config.start_timeout_s, "rendezvous")
            host = hosts[0][0]
            opened = [members[0].open_store.remote(host)]
            (port,) = self._gather(opened, self._config.start_timeout_s, "rendezvous")
            across_nodes = len({address for address, _ in hosts}) > 1
            for member, (_, interface) in zip(members, hosts, strict=True):
                where = Rendezvous(
                    host=host,
                    port=port,
                    prefix=f"{self._run}/{first // shards}/gen{self.generation}",
                    # Longer than the driver's own deadline, which is the one that should fire.
                    timeout_s=2 * max(self._config.step_timeout_s, self._config.start_timeout_s),
                    interface=interface if across_nodes else None,
                )
                joins.append(member.join.remote(where))
        self._gather(joins, self._config.start_timeout_s, "rendezvous")

    # --- calls ---------------------------------------------------------------------------------

    def _call(
        self,
        method: str,
        *args: Any,
        timeout_s: float,
        what: str | None = None,
        on_result: Callable[[Any], None] | None = None,
    ) -> list[Any]:
        """Call a method on every worker; results in rank order."""
        refs = [getattr(actor, method).remote(*args) for actor in self._actors]
        return self._gather(refs, timeout_s, what or method, on_result)

    def _gather(
        self,
        refs: Sequence[Any],
        timeout_s: float,
        what: str,
        on_result: Callable[[Any], None] | None = None,
    ) -> list[Any]:
        """Results in rank order; the first failure frees the survivors and is raised at once."""
        results: dict[Any, Any] = {}
        deadline = time.monotonic() + timeout_s
        waiting = list(refs)
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                ranks = [refs.index(ref) for ref in waiting]
                self._release()
                raise self._silent(ranks, timeout_s, what)
            for ref in done:
                try:
                    results[ref] = ray.get(ref)
                except RayError as error:
                    self._release()
                    lost, cause = _first_death(ref, error, waiting)
                    raise self._failure(cause, refs.index(lost), what) from None
                if on_result is not None:
                    on_result(results[ref])
        return [results[ref] for ref in refs]

    def _one(self, rank: int, ref: Any, timeout_s: float, what: str) -> Any:
        """One worker's result."""
        try:
            return ray.get(ref, timeout=timeout_s)
        except GetTimeoutError:
            self._release()
            raise self._silent([rank], timeout_s, what) from None
        except RayError as error:
            self._release()
            raise self._failure(error, rank, what) from None

    def _release(self) -> None:
        """Free workers that wait in a collective for one that is gone."""
        aborts = [a.abort.options(concurrency_group="control").remote() for a in self._actors]
        ray.wait(aborts, num_returns=len(aborts), timeout=_ABORT_TIMEOUT_S)

    def _failure(self, error: RayError, rank: int, what: str) -> RaymergeError:
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, RaymergeError):
                return cause
            last_line = str(error).strip().splitlines()[-1]
            return RunError(f"{self._who(rank)} failed in {what}: {last_line}")
        if isinstance(error, RayActorError) and what == "start":
            reason = str(error).strip().splitlines()[-1]
            return RunError(
                f"{self._who(rank)} did not start: {reason}; is raymerge installed on every node?"
            )
        if isinstance(error, RayActorError):
            return WorkerLostError(
                f"{self._who(rank)} died during {what} (killed, out of memory, or its node was "
                "lost); the last saved state is kept, run again with --resume"
            )
        return RunError(f"{self._who(rank)}: Ray failed in {what}: {str(error).splitlines()[0]}")

    def _silent(self, ranks: Sequence[int], timeout_s: float, what: str) -> WorkerLostError:
        setting = {
            "start": "start",
            "rendezvous": "start",
            "load": "load",
            "evaluate": "load",
            "statistics": "load",
        }
        key = f"cluster.{setting.get(what, 'step')}_timeout_s"
        who = ", ".join(str(rank) for rank in ranks)
        return WorkerLostError(
            f"worker {who} of {self.workers} sent no answer for {what} within {timeout_s:g} s; "
            f"raise {key}, or run again with --resume"
        )

    def _who(self, rank: int) -> str:
        return f"worker {rank} of {self.workers}"


def _first_death(ref: Any, error: RayError, waiting: Sequence[Any]) -> tuple[Any, RayError]:
    """The cause of a failure: a survivor's broken connection may arrive before its peer's death."""
    if isinstance(error, RayActorError) or (
        isinstance(error, RayTaskError) and isinstance(error.cause, RaymergeError)
    ):
        return ref, error
    for other in (
        ray.wait(list(waiting), num_returns=len(waiting), timeout=2.0)[0] if waiting else ()
    ):
        try:
            ray.get(other)
        except RayActorError as death:
            return other, death
        except RayError:
            continue
    return ref, error


def _reserve(placement: Placement) -> PlacementGroup:
    bundle: dict[str, float] = {"CPU": placement.cpus_per_worker}
    if placement.gpus_per_worker:
        bundle["GPU"] = placement.gpus_per_worker
    group: PlacementGroup = placement_group([bundle] * placement.shards, strategy="PACK")
    return group


def _ranked_places(
    groups: Sequence[PlacementGroup], shards: int
) -> list[tuple[PlacementGroup, int]]:
    """Bundles in rank order: within a group sorted by node, so that neighbours share one."""
    places = []
    for group in groups:
        nodes = ray.util.placement_group_table(group)["bundles_to_node_id"]
        places += [(group, b) for b in sorted(range(shards), key=nodes.get)]
    return places


def _create(spec: WorkerSpec, placement: Placement, group: PlacementGroup, bundle: int) -> Any:
    """The plain class becomes an actor here, and only here.

    Ray's own restart would re-run ``__init__`` alone, outside the group's generation: it is off.
    """
    options = {
        "num_cpus": placement.cpus_per_worker,
        "num_gpus": placement.gpus_per_worker,
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": 1,
        "concurrency_groups": {"control": 2},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=bundle
        ),
    }
    return ray.remote(**options)(MergeWorker).remote(spec)


def _node_address(worker: MergeWorker) -> tuple[str, str | None]:
    """The Ray address of the worker's node, and the network interface that owns it."""
    import psutil

    address: str = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return address, name
    return address, None

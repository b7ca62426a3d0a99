"""Recovery: repeat a failed call after its lost workers have been restarted.

λ and Adam's moments live in the driver, and every call is a pure function of its request. So
whatever a call loses, its repetition gives the same result: restart the lost workers, form the
process groups under the next generation, let the new workers load, and call again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from raymerge.config import ClusterConfig
from raymerge.distributed.calls import is_idle
from raymerge.distributed.failures import ABORT_FAILED, WorkerFailure, classify, root_cause
from raymerge.distributed.placement import regroup
from raymerge.distributed.pool import CallFailedError, PoolWorker, WorkerPool
from raymerge.distributed.process_groups import ProcessGroups
from raymerge.engine.messages import Incident
from raymerge.errors import RunError, UserError, WorkerLostError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ABORT_TIMEOUT_S = 10.0  # a frozen peer counts as dead after 5 s, and only then are others free
_ABORT_ATTEMPTS = 3
_IDLE_TIMEOUT_S, _IDLE_POLL_S = 5.0, 0.02  # a ping may be lost and repeated
_UNREACHABLE = WorkerFailure("worker", "could not be reached")

Failures = dict[int, WorkerFailure]
"""The failures of one call by rank."""


class Recovery:
    """Recovers the process groups of a run from failures, within ``pool.budget``.

    ``prepare`` is called after every forming of the groups, and brings their workers up to date.
    ``incidents``: the failures that the run has survived.
    """

    def __init__(
        self,
        pool: WorkerPool,
        groups: ProcessGroups,
        config: ClusterConfig,
        prepare: Callable[[], None],
    ) -> None:
        self.incidents: list[Incident] = []
        self._pool, self._groups, self._config = pool, groups, config
        self._prepare = prepare

    def start(self) -> None:
        """Start the workers; raises :class:`RunError` when the cluster has room for too few."""
        self._pool.start(self._config.min_workers or self._pool.placement.workers)
        self._form_with_recovery("start")

    def retry(self, what: str, attempt: Callable[[], T]) -> T:
        """Return what ``attempt`` returns, and repeat it after every failure that is survived."""
        while True:
            began = time.monotonic()
            try:
                result = attempt()
            except CallFailedError as error:
                self._recover(error, what, began)
            else:
                self._pool.budget.reset_interruptions()
                return result

    def admit_late_workers(self) -> None:
        """Between two calls: include the workers that have become ready since the last one."""
        late = self._pool.starting
        if not late:
            return
        requests = {worker.location_request: worker for worker in late}
        for request in ray.wait(list(requests), num_returns=len(requests), timeout=0)[0]:
            try:
                self._pool.take_location(requests[request])
            except RunError as error:  # it could not start, but the others are healthy
                self._leave_out([requests[request]], error)
        before = len(self._groups.workers)
        if regroup(self._pool.placement, len(self._pool.ready)).workers > before:
            try:
                self._form_with_recovery("regrouping")
            except UserError as error:  # the others loaded the same inputs without an error
                self._leave_out([worker for worker in late if worker.location], error)
                self._form_with_recovery("regrouping")
            logger.warning("%d workers now, after %d", len(self._groups.workers), before)

    def _leave_out(self, workers: Sequence[PoolWorker], error: Exception) -> None:
        for worker in workers:
            self._pool.stop(worker)
        logger.warning("a worker that became ready late is left out: %s", error)

    def _form(self) -> None:
        self._groups.form()
        self._prepare()

    def _form_with_recovery(self, what: str) -> None:
        began = time.monotonic()
        try:
            self._form()
        except CallFailedError as error:
            self._recover(error, what, began)

    def _recover(self, error: CallFailedError, what: str, began: float) -> None:
        """Restart the lost workers and form the groups anew.

        Raises :class:`WorkerLostError` when the budget is spent or too few workers are left.
        """
        detected = time.monotonic()
        first: Failures = {}
        minimum = self._config.min_workers or self._pool.placement.shards
        # A recovery may lose further workers: begin again until one succeeds or the budget ends it.
        while True:
            failures = self._abandon_generation(error)
            self._spend(failures, what)
            first = first or failures
            try:
                self._pool.wait_until_ready(self._config.replace_timeout_s, minimum)
                self._form()
                break
            except CallFailedError as another:
                error = another
            except UserError as user_error:  # the inputs were sound when the run began
                raise RunError(f"while a worker was restarted: {user_error}") from user_error
        # Report the failure that came first: the later ones belong to the same incident.
        now = time.monotonic()
        cause, ranks = root_cause(first)
        workers = len(self._groups.workers)
        self.incidents.append(
            Incident(what, cause.kind, ranks, cause.reason, detected - began, now - detected,
                     workers)
        )  # fmt: skip
        logger.warning(
            "%s: %s %s; recovered in %.1f s, %d workers continue",
            what, _names(ranks), cause.reason, now - detected, workers,
        )  # fmt: skip

    def _spend(self, failures: Failures, what: str) -> None:
        cause, ranks = root_cause(failures)
        refusal = self._pool.budget.spend(cause.kind)
        if refusal is not None:
            raise WorkerLostError(
                f"{_names(ranks)} of {len(self._groups.workers)} {cause.reason} during {what} "
                f"({refusal}); a run that saves its state continues with --resume"
            )

    # --- leaving a generation ------------------------------------------------------------------

    def _abandon_generation(self, error: CallFailedError) -> Failures:
        """Restart the lost workers and free those that wait for them in a collective.

        Returns the failures, including those that are only discovered while doing so.
        """
        self._groups.generation += 1
        failures = {worker.rank: failure for worker, failure in error.failures.items()}
        for worker in self._workers_to_restart(error):
            self._pool.restart(worker)
        # Free the others. An abort may be lost on its way, so it is repeated.
        unreachable = self._pool.ready
        for _ in range(_ABORT_ATTEMPTS):
            unreachable = self._abort(unreachable, failures)
        for worker in unreachable:
            self._fail(worker, _UNREACHABLE, failures)
        # Nobody can free a worker whose lost peer never came to the rendezvous.
        for worker in self._blocked_workers():
            self._pool.restart(worker)
        return failures

    def _workers_to_restart(self, error: CallFailedError) -> list[PoolWorker]:
        """Return the lost workers; with NCCL, all of their groups, because its abort is fragile."""
        placement = self._pool.placement
        if placement.shards == 1 or not placement.gpus_per_worker:
            return [worker for worker, failure in error.failures.items() if failure.needs_restart]
        groups = {w.rank // w.spec.shards for w in error.failures if w.spec is not None}
        return [w for w in self._groups.workers if w.spec and w.rank // w.spec.shards in groups]

    def _abort(self, workers: Sequence[PoolWorker], failures: Failures) -> list[PoolWorker]:
        """Abort the calls of older generations; returns the workers that could not be reached."""
        aborts = {
            worker.actor.abort.options(concurrency_group="control").remote(
                self._groups.generation
            ): worker
            for worker in workers
        }
        if not aborts:
            return []
        done, late = ray.wait(list(aborts), num_returns=len(aborts), timeout=_ABORT_TIMEOUT_S)
        unreachable = []
        for reference in done:
            try:
                ray.get(reference)
            except ActorUnavailableError:
                unreachable.append(aborts[reference])
            except ActorDiedError as error:
                self._fail(aborts[reference], classify(error), failures)
            except RayError:
                self._fail(aborts[reference], ABORT_FAILED, failures)
        for reference in late:
            self._fail(aborts[reference], ABORT_FAILED, failures)
        return unreachable

    def _fail(self, worker: PoolWorker, failure: WorkerFailure, failures: Failures) -> None:
        """Note the failure of a worker that has a rank, and restart it."""
        if worker in self._groups.workers:
            failures[worker.rank] = self._pool.attribute(worker, failure)
        self._pool.restart(worker)

    def _blocked_workers(self) -> list[PoolWorker]:
        """Return the workers that are still in a collective after ``_IDLE_TIMEOUT_S``."""
        deadline = time.monotonic() + _IDLE_TIMEOUT_S
        blocked = self._pool.ready
        while blocked:
            blocked = [worker for worker in blocked if not is_idle(worker.actor)]
            if time.monotonic() > deadline:
                break
            time.sleep(_IDLE_POLL_S)
        return blocked


def _names(ranks: Sequence[int]) -> str:
    return f"worker {', '.join(map(str, ranks))}"

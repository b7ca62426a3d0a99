"""Team: the actors of a run, replaced when they are lost, regrouped when nobody comes instead.

λ and Adam's moments are the driver's, and every call is a pure function of its request, so whatever
is lost in a call the answer is the same: put new workers in the places of the lost, let them load,
build the process groups anew under the next generation, and call again.

Legend: W workers, G groups, S shards.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.util.placement_group import remove_placement_group

from raymerge.config import ClusterConfig
from raymerge.distributed.calls import Call, Limits, gather, is_free
from raymerge.distributed.failures import DISOBEYED, PREEMPTED, UNMET, Budget, Loss, blame, loss_of
from raymerge.distributed.placement import Placement, regroup
from raymerge.distributed.placement_groups import (
    Place,
    Whereabouts,
    ask_whereabouts,
    create,
    found,
    reserve,
)
from raymerge.distributed.preemption import Notices
from raymerge.engine.messages import Incident, IncidentKind, LoadReport, Rendezvous, WorkerSpec
from raymerge.engine.worker.worker import MergeWorker
from raymerge.errors import RunError, UserError, WorkerLostError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ABORT_TIMEOUT_S = 10.0  # a frozen peer is dead after 5, and only then are the others free
_ABORT_TRIES = 3
_FREE_TIMEOUT_S, _FREE_LOOK_S = 5.0, 0.02  # a ping may be lost and asked again
_JOIN_TIMEOUT_S = 60.0
_LONGEST_COLLECTIVE_S = 1200.0  # only behind the driver's own deadlines, which should fire first

Toll = dict[int, Loss]
"""Who was lost in one call, by rank."""


@dataclass(eq=False)
class Member:
    """A place in the cluster and the actor that holds it now.

    ``where``: None until the actor runs. ``spec``: None until it has a part in the work.
    ``report``: None until it has loaded what its part and the present request want.
    """

    place: Place
    actor: Any = None
    hello: Any = None
    where: Whereabouts | None = None
    spec: WorkerSpec | None = None
    report: LoadReport | None = None

    @property
    def rank(self) -> int:
        return -1 if self.spec is None else self.spec.rank

    @property
    def seat(self) -> tuple[int, int, int]:
        """What its part of any request depends on."""
        assert self.spec is not None
        return self.spec.rank, self.spec.workers, self.spec.shards


class LostError(Exception):
    """Some of those who were asked are lost. It never leaves ``distributed/``."""

    def __init__(self, losses: Mapping[Member, Loss]) -> None:
        super().__init__()
        self.losses = dict(losses)


class Team:
    """The members of a run; ``working`` are those with a part in the work, in rank order.

    ``prepare`` is called whenever the team was formed anew: it brings everyone up to date.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        placement: Placement,
        config: ClusterConfig,
        worker: type[MergeWorker],
        prepare: Callable[[], None],
    ) -> None:
        self.generation = 0
        self.working: list[Member] = []
        self.incidents: list[Incident] = []
        self._placement, self._config = placement, config
        self._spec = replace(
            spec, threads=placement.cpus_per_worker, use_gpu=placement.gpus_per_worker > 0
        )
        self._worker, self._prepare = worker, prepare
        self._run = uuid.uuid4().hex
        self._budget = Budget.of(config)
        self._members = [Member(place) for place in reserve(placement)]
        self._notices = Notices()
        self._start_limits = Limits(
            config.start_timeout_s, config.hang_timeout_s, "cluster.start_timeout_s"
        )

    def start(self) -> None:
        """Raises :class:`RunError` when the cluster has no room for enough workers."""
        for member in self._members:
            self._hire(member)
        fewest = self._config.min_workers or self._placement.workers
        self._fill(self._config.start_timeout_s, fewest)
        self._members.sort(key=_by_place)
        self._form_at_last("start")

    # --- calls ---------------------------------------------------------------------------------

    def survive(self, what: str, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns; whenever it loses somebody, mend the team and repeat it."""
        while True:
            began = time.monotonic()
            try:
                result = attempt()
            except LostError as lost:
                self._mend(lost, what, began)
            else:
                self._budget.progressed()
                return result

    def ask(
        self,
        method: str,
        whom: Iterable[Member],
        argument: Any,
        limits: Limits,
        on_answer: Callable[[Member, Any], None],
    ) -> None:
        """Call a method of each; raises :class:`LostError` when somebody is lost."""
        members = list(whom)
        calls = [getattr(member.actor, method).remote(argument) for member in members]
        self.await_answers(dict(zip(members, calls, strict=True)), limits, on_answer)

    def await_answers(
        self,
        answers: Mapping[Member, Any],
        limits: Limits,
        on_answer: Callable[[Member, Any], None],
    ) -> None:
        calls = {member: Call(member.actor, answer) for member, answer in answers.items()}
        losses = gather(calls, limits, on_answer)
        if losses:
            raise LostError({member: self._blamed(member, loss) for member, loss in losses.items()})

    def _blamed(self, member: Member, loss: Loss) -> Loss:
        """It was no fault of the worker's if its node had been announced to go."""
        announced = member.where is not None and member.where.node in self._notices.announced
        return PREEMPTED if announced and loss.gone else loss

    def welcome(self) -> None:
        """Between two calls: let those take part who have become ready since."""
        starting = [member for member in self._members if member.actor and member.where is None]
        if not starting:
            return
        hellos = [member.hello for member in starting]
        for hello in ray.wait(hellos, num_returns=len(hellos), timeout=0)[0]:
            try:
                self._greet([hello])
            except RunError as error:  # the others are well
                _turn_away([member for member in starting if member.hello == hello], error)
        if regroup(self._placement, len(self._ready())).workers > len(self.working):
            before = len(self.working)
            try:
                self._form_at_last("regrouping")
            except UserError as error:  # what the others have loaded was sound
                _turn_away([member for member in starting if member.where], error)
                self._form_at_last("regrouping")
            logger.warning("%d workers now, after %d", len(self.working), before)

    @property
    def preemption_pending(self) -> bool:
        """Whether a node that a worker runs on is about to be taken back."""
        nodes = {member.where.node for member in self.working if member.where is not None}
        return self._notices.leaving(nodes)

    def close(self) -> None:
        """Kill the actors and free their places. Never raises: it runs on the way out."""
        self._notices.close()
        for member in self._members:
            _dismiss(member)
        for reserved in {m.place.group: m.place.reserved for m in self._members}.values():
            try:
                remove_placement_group(reserved)
            except (RayError, ValueError) as error:
                logger.debug("remove placement group: %s", error)
        self._members, self.working = [], []

    # --- failures ------------------------------------------------------------------------------

    def _mend(self, lost: LostError, what: str, began: float) -> None:
        """Replace who is lost and form the team anew; raises :class:`WorkerLostError` if the
        budget is spent, or too few are left."""
        found_out = time.monotonic()
        first: Toll = {}
        while True:
            toll = self._release(lost)
            self._charge(toll, what)
            first = first or toll
            try:
                self._fill(self._config.replace_timeout_s, self._fewest)
                self._form()
                break
            except LostError as another:
                lost = another
            except UserError as error:  # it was sound when the run began
                raise RunError(f"while a worker was replaced: {error}") from error
        now = time.monotonic()
        cause, ranks = blame(first)
        self.incidents.append(
            Incident(what, cause.kind, ranks, cause.reason, found_out - began, now - found_out,
                     len(self.working))
        )  # fmt: skip
        logger.warning(
            "%s: %s %s; %d workers go on after %.1f s",
            what, _who(ranks), cause.reason, len(self.working), now - found_out,
        )  # fmt: skip

    @property
    def _fewest(self) -> int:
        return self._config.min_workers or self._placement.shards

    def _charge(self, toll: Toll, what: str) -> None:
        cause, ranks = blame(toll)
        refusal = self._budget.charge(cause.kind)
        if refusal is not None:
            raise WorkerLostError(
                f"{_who(ranks)} of {len(self.working)} {cause.reason} during {what} ({refusal}); "
                "the last saved state is kept, run again with --resume"
            )

    def _release(self, lost: LostError) -> Toll:
        """The next generation begins: kill the lost, free those who wait for them.

        The toll has also those of whom only their peers' broken connections told so far.
        """
        self.generation += 1
        toll = {member.rank: loss for member, loss in lost.losses.items()}
        for member in self._beyond_repair(lost):
            self._replace(member)
        waiting = self._ready()
        for _ in range(_ABORT_TRIES):
            waiting = self._abort(waiting, toll)
        for member in waiting:
            self._give_up(member, Loss("worker", "could not be reached"), toll)
        for member in self._still_waiting():
            self._replace(member)
        return toll

    def _give_up(self, member: Member, loss: Loss, toll: Toll) -> None:
        if member in self.working:
            toll[member.rank] = self._blamed(member, loss)
        self._replace(member)

    def _still_waiting(self) -> list[Member]:
        """Who was not freed: of a join that a lost peer does not come to, nobody is."""
        deadline = time.monotonic() + _FREE_TIMEOUT_S
        waiting = self._ready()
        while waiting:
            waiting = [member for member in waiting if not is_free(member.actor)]
            if time.monotonic() > deadline:
                break
            time.sleep(_FREE_LOOK_S)
        return waiting

    def _beyond_repair(self, lost: LostError) -> list[Member]:
        """Who is gone; with NCCL, whose abort in place is fragile, all of its group."""
        gone = [member for member, loss in lost.losses.items() if loss.gone]
        if self._placement.shards == 1 or not self._placement.gpus_per_worker:
            return gone
        groups = {m.rank // m.spec.shards for m in lost.losses if m.spec is not None}
        return [m for m in self.working if m.spec and m.rank // m.spec.shards in groups]

    def _abort(self, members: Sequence[Member], toll: Toll) -> list[Member]:
        """Who was out of reach, and is to be asked again; who did not obey is replaced."""
        asked = {
            member.actor.abort.options(concurrency_group="control").remote(self.generation): member
            for member in members
        }
        if not asked:
            return []
        done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ABORT_TIMEOUT_S)
        unreached = []
        for answer in done:
            try:
                ray.get(answer)
            except ActorUnavailableError:
                unreached.append(asked[answer])
            except ActorDiedError as error:
                self._give_up(asked[answer], loss_of(error), toll)
            except RayError:
                self._give_up(asked[answer], DISOBEYED, toll)
        for answer in silent:
            self._give_up(asked[answer], DISOBEYED, toll)
        return unreached

    # --- members -------------------------------------------------------------------------------

    def _ready(self) -> list[Member]:
        return [member for member in self._members if member.where is not None]

    def _hire(self, member: Member) -> None:
        """Start an actor in the place; Ray does so as soon as it has found the place."""
        member.actor = create(self._worker, self._spec, self._placement, member.place)
        member.hello = ask_whereabouts(member.actor)

    def _replace(self, member: Member) -> None:
        _dismiss(member)
        self._hire(member)

    def _fill(self, patience_s: float, fewest: int) -> None:
        """Wait until all are ready, at most ``patience_s`` once ``fewest`` are.

        Raises :class:`RunError` when fewer are ready within ``cluster.start_timeout_s``.
        """
        began = time.monotonic()
        while starting := [m for m in self._members if m.actor and m.where is None]:
            enough = len(self._ready()) >= fewest
            allowed_s = patience_s if enough else max(patience_s, self._config.start_timeout_s)
            left_s = began + allowed_s - time.monotonic()
            if left_s <= 0:
                break
            self._greet(ray.wait([m.hello for m in starting], timeout=left_s)[0])
        if len(self._ready()) < fewest:
            raise self._too_few(fewest)

    def _greet(self, hellos: Sequence[Any]) -> None:
        """Note who runs by now; who died on the way is tried again while the budget lasts."""
        by_hello = {member.hello: member for member in self._members if member.hello is not None}
        for hello in hellos:
            member = by_hello[hello]
            try:
                member.where, member.hello = ray.get(hello), None
            except RayError as error:
                self._start_again(member, loss_of(error))

    def _start_again(self, member: Member, loss: Loss) -> None:
        _dismiss(member)
        kind: IncidentKind = "preemption" if loss.kind == "preemption" else "start"
        refusal = self._budget.charge(kind)
        if refusal is None:
            self._hire(member)
        else:
            logger.warning("a worker %s before it was ready (%s); its place stays empty",
                           loss.reason, refusal)  # fmt: skip

    def _too_few(self, fewest: int) -> RunError:
        ready, given = len(self._ready()), self._placement
        limit = f"{self._config.start_timeout_s:g} s"
        if not found([member.place for member in self._members]):
            return RunError(
                f"the cluster found no room for {given.workers} workers with "
                f"{given.cpus_per_worker} CPUs and {given.gpus_per_worker:g} GPUs each within "
                f"{limit}; lower cluster.workers or raise cluster.start_timeout_s"
            )
        return WorkerLostError(
            f"{ready} of {given.workers} workers were ready within {limit}, and at least {fewest} "
            "must be; lower cluster.min_workers or raise cluster.start_timeout_s"
        )

    # --- groups --------------------------------------------------------------------------------

    def _form_at_last(self, what: str) -> None:
        began = time.monotonic()
        try:
            self._form()
        except LostError as lost:
            self._mend(lost, what, began)

    def _form(self) -> None:
        """Give everyone who is ready a part, and bring all up to date."""
        self.generation += 1  # the store still holds what was written under the last one's name
        ready = self._ready()
        shape = regroup(self._placement, len(ready))
        self.working = _whole_groups_first(ready, self._placement.shards)[: shape.workers]
        for member in ready:
            if member not in self.working:  # what is asked of the others meanwhile, it misses
                member.spec = member.report = None
        for rank, member in enumerate(self.working):
            spec = replace(self._spec, rank=rank, workers=shape.workers, shards=shape.shards)
            if member.spec != spec:
                member.spec, member.report = spec, None
        # Also to those whose part is the same: the call before may have been lost.
        assigned = {member: member.actor.assign.remote(member.spec) for member in self.working}
        self.await_answers(assigned, self._start_limits, _ignore)
        if shape.shards > 1:
            for first in range(0, shape.workers, shape.shards):
                self._join(self.working[first : first + shape.shards])
        self._prepare()

    def _join(self, members: Sequence[Member]) -> None:
        """Build one process group under this generation's name."""
        places = [member.where for member in members if member.where is not None]
        ports: list[int] = []
        self.ask(
            "open_store", members[:1], places[0].address, self._start_limits,
            lambda member, port: ports.append(port),
        )  # fmt: skip
        across_nodes = len({where.address for where in places}) > 1
        joins = {
            member: member.actor.join.remote(
                Rendezvous(
                    host=places[0].address,
                    port=ports[0],
                    prefix=f"{self._run}/{members[0].rank}/gen{self.generation}",
                    timeout_s=_LONGEST_COLLECTIVE_S,
                    join_timeout_s=_JOIN_TIMEOUT_S,
                    interface=where.interface if across_nodes else None,
                )
            )
            for member, where in zip(members, places, strict=True)
        }
        joined: set[Member] = set()
        try:
            self.await_answers(joins, self._start_limits, lambda member, _: joined.add(member))
        except LostError as lost:  # torch cannot be told to forget a group that failed to form
            unmet = [member for member in members if member not in joined]
            raise LostError(
                {member: replace(lost.losses.get(member, UNMET), gone=True) for member in unmet}
            ) from None


def _turn_away(members: Sequence[Member], error: Exception) -> None:
    """Go on without those who came later and cannot take part."""
    for member in members:
        _dismiss(member)
    logger.warning("a worker that came later is left out: %s", error)


def _dismiss(member: Member) -> None:
    if member.actor is not None:
        try:
            ray.kill(member.actor)
        except (RayError, ValueError) as error:
            logger.debug("kill: %s", error)
    member.actor = member.hello = member.where = member.spec = member.report = None


def _by_place(member: Member) -> tuple[int, str, tuple[str, ...], int]:
    """Within a group, neighbours share a node; those that are not there yet come last."""
    place, where = member.place, member.where
    if where is None:
        return place.group, "~", (), place.bundle
    return place.group, where.node, where.gpus, place.bundle


def _whole_groups_first(ready: Sequence[Member], shards: int) -> list[Member]:
    """Members of groups that lost nobody keep their shards, and with them their vectors."""
    sizes = Counter(member.place.group for member in ready)
    return sorted(ready, key=lambda member: sizes[member.place.group] < shards)


def _who(ranks: Sequence[int]) -> str:
    return f"worker {', '.join(map(str, ranks))}"


def _ignore(member: Member, answer: Any) -> None:
    """Of calls whose answer says no more than that it was done."""

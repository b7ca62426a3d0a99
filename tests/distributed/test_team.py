"""What a team asks of its members when it is formed anew; stand-ins for the actors, no cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from raymerge.config import ClusterConfig, ModelConfig
from raymerge.distributed.actor_group import ActorGroup
from raymerge.distributed.calls import Limits, StepLimits
from raymerge.distributed.failures import UNMET, Loss
from raymerge.distributed.placement import Placement
from raymerge.distributed.placement_groups import Place, Whereabouts
from raymerge.distributed.team import LostError, Member, Team
from raymerge.engine.messages import LoadReport, StatisticsRequest, WorkerSpec

LIMITS = Limits(1.0, 1.0, "none")
REPORT = LoadReport(0, "cpu", (), 0, 0, 0, 0.0)


class Actor:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def __getattr__(self, method: str) -> Any:
        actor = self

        class Method:
            def remote(self, argument: Any) -> str:
                actor.asked.append((method, argument))
                return method

        return Method()

    def told(self, method: str) -> list[Any]:
        return [argument for name, argument in self.asked if name == method]


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> Team:
    """Four members in two groups of two, all ready."""
    members = [Member(Place(n // 2, n % 2, None), actor=Actor()) for n in range(4)]  # type: ignore[arg-type]
    monkeypatch.setattr("raymerge.distributed.team.reserve", lambda placement: [])
    team = Team(
        WorkerSpec(ModelConfig(arch="local-dir:m"), ()),
        Placement(4, 2, 1, 0.0),
        ClusterConfig(),
        object,  # type: ignore[arg-type]
        lambda: None,
    )
    team._notices.close()
    for member in members:
        member.where = Whereabouts("node", (), "127.0.0.1", None, 1)
    team._members = members

    def answer(
        answers: Mapping[Member, Any], limits: Limits, on_answer: Callable[[Member, Any], None]
    ) -> None:
        for member, each in answers.items():
            on_answer(member, 1 if each == "open_store" else None)

    monkeypatch.setattr(team, "await_answers", answer)
    return team


def test_whoever_works_is_told_its_part_whenever_the_team_is_formed(team: Team) -> None:
    """The call before may have been lost: then it does not know the part that it has."""
    for times in (1, 2):
        team._form()
        for rank, member in enumerate(team.working):
            parts = member.actor.told("assign")
            assert [part.rank for part in parts] == [rank] * times


def test_whoever_has_no_part_knows_nothing_of_the_next_request(team: Team) -> None:
    team._form()
    for member in team._members:
        member.report = REPORT
    lost, team._members[3].where = team._members[3].where, None
    team._form()
    first, second, idle, _ = team._members
    assert team.working == [first, second]
    assert idle.spec is idle.report is None
    team._members[3].where = lost
    team._form()
    assert team.working == team._members
    assert idle.report is None  # though its part is the one that it had before


def test_of_a_rendezvous_that_failed_whoever_has_not_met_its_peers_is_replaced(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch numbers the groups that fail to form, and members of two numbers never meet."""
    team._form()
    first, second = team.working[:2]
    whole = team.await_answers

    def lose(answers: Mapping[Member, Any], limits: Limits, on_answer: Any) -> None:
        if "join" in answers.values():
            raise LostError({second: Loss("worker", "died")})
        whole(answers, limits, on_answer)

    monkeypatch.setattr(team, "await_answers", lose)
    with pytest.raises(LostError) as raised:
        team._join([first, second])
    assert raised.value.losses == {first: UNMET, second: Loss("worker", "died")}
    assert UNMET.gone


def test_with_fewer_workers_a_step_may_take_as_long_as_the_first() -> None:
    limits = StepLimits(ClusterConfig())
    first = limits.of(8).call_s
    for _ in range(5):
        limits.took(15.0)
    assert limits.of(8).call_s == 75.0
    assert limits.of(1).call_s == first
    limits.took(120.0)
    assert limits.of(1).call_s == 600.0
    assert limits.of(2).call_s == 600.0


def test_a_worker_of_another_number_of_shards_is_asked_for_the_earlier_blocks_again(
    team: Team,
) -> None:
    from raymerge.distributed.actor_group import _Asked

    team._form()
    group = object.__new__(ActorGroup)
    group._team, group._blocks, group._homes = team, {}, {}
    actor = team.working[0].actor

    def ask(block: int) -> list[int]:
        actor.asked.clear()
        group._send(_Asked(StatisticsRequest("block_grams", 0, 4, 0, block=block)))
        return [request.block for request in actor.told("statistics")]

    assert ask(0) == [0]
    assert ask(1) == [1]
    team._members[1].where = team._members[2].where = team._members[3].where = None
    team._form()
    assert team.working[0].actor is actor
    assert ask(2) == [0, 1, 2]
    assert ask(3) == [3]

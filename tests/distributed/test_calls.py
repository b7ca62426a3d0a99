"""The time limits of steps."""

from __future__ import annotations

from raymerge.config import ClusterConfig
from raymerge.distributed.calls import StepLimits


def test_with_fewer_workers_a_step_may_take_as_long_as_the_first() -> None:
    limits = StepLimits(ClusterConfig())
    first = limits.for_workers(8).call_s
    for _ in range(5):
        limits.record(15.0)
    assert limits.for_workers(8).call_s == 75.0
    assert limits.for_workers(1).call_s == first
    limits.record(120.0)
    assert limits.for_workers(1).call_s == 600.0
    assert limits.for_workers(2).call_s == 600.0

"""Hundreds of seeded faults in whole runs of learning: `python tests/faults/soak.py --faults 200`.

Every campaign learns λ on the tests' tiny world, with faults of random workers, phases and steps.
λ, the moments and every step's loss are compared with those of an undisturbed run on as many
workers and shards. Writes JSON; exits 1 if a campaign hung or gave wrong results.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
os.environ.update(HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")

import numpy as np
import psutil
import ray
import torch
from group_requests import layer_names, load_request, model_source
from injection import STEP_PHASES, Fault, Kind, count_injected, faulty_worker
from world import World, make_world

from raymerge.config import ClusterConfig
from raymerge.distributed.actor_group import ActorGroup
from raymerge.distributed.placement import Placement
from raymerge.engine.driver.loop import StepRecord, learn
from raymerge.engine.driver.monitor import Monitor
from raymerge.engine.driver.state import LearningState
from raymerge.engine.messages import Incident, WorkerSpec
from raymerge.errors import RaymergeError
from raymerge.merging.optimizer import Adam

SHAPES = ((2, 1), (2, 2), (4, 2))
KINDS: dict[Kind, int] = {"kill": 4, "exit": 2, "freeze": 1, "break": 3}
"""Relative frequencies of the kinds of fault."""
FAULTS_PER_CAMPAIGN, SILENT_S = 20, 240


@dataclass
class Trajectory:
    """One run of learning: its final state, and the loss of every step."""

    state: LearningState
    losses: list[float | None] = field(default_factory=list)
    incidents: Sequence[Incident] = ()


@dataclass(frozen=True)
class Campaign:
    """The outcome of one campaign; ``deviation`` is the largest |Δλ|."""

    workers: int
    shards: int
    injected: int
    ended: str
    error: str
    same_bits: bool
    deviation: float
    incidents: tuple[dict[str, Any], ...]


class SilentError(Exception):
    """No step has finished for ``SILENT_S``."""


def draw(rng: random.Random, workers: int, count: int) -> list[Fault]:
    """Draw ``count`` faults, one per step; one step in eight has two, of different workers."""
    faults, step = [], 0
    while len(faults) < count:
        step += 1
        both = rng.random() < 1 / 8 and len(faults) + 2 <= count
        for rank in rng.sample(range(workers), 2 if both else 1):
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            faults.append(Fault(kind, rank, rng.choice(STEP_PHASES), step))
    faults[0] = Fault("kill", faults[0].rank, "load")
    return faults


def run(
    world: World, shape: tuple[int, int], faults: Sequence[Fault], marks: Path, steps: int
) -> Trajectory:
    """Learn for ``steps`` steps; raises the error of a run that fails."""
    config = ClusterConfig(hang_timeout_s=3.0, max_worker_failures=None, max_start_failures=None)
    layers = layer_names(world)
    group = ActorGroup(
        model_source(world),
        WorkerSpec(),
        Placement(*shape, 1, 0.0),
        config,
        faulty_worker(faults, marks),
    )
    trajectory = Trajectory(LearningState.initial(torch.full((4, len(layers)), 0.3)))
    names = world.parse().task_names

    def observe(record: StepRecord, state: LearningState) -> None:
        signal.alarm(SILENT_S)
        trajectory.losses.append(record.loss)

    # Every step restarts the alarm, which raises SilentError.
    try:
        signal.alarm(SILENT_S)
        group.load(load_request(world, steps=steps))
        trajectory.state = learn(
            group, Adam(lr=0.01), trajectory.state, steps, Monitor(names, range(4)), observe
        )
        trajectory.incidents = list(group.incidents)
        return trajectory
    finally:
        signal.alarm(0)
        group.close()


def campaign(
    world: World,
    shape: tuple[int, int],
    faults: Sequence[Fault],
    folder: Path,
    reference: Trajectory,
) -> Campaign:
    marks, steps = folder / "marks", len(reference.losses)
    ended, error, same, deviation = "recovered", "", False, float("nan")
    trajectory = None
    try:
        trajectory = run(world, shape, faults, marks, steps)
    except SilentError:
        ended = "hung"
    except RaymergeError as failure:
        ended, error = "failed", str(failure)
    if trajectory is not None:
        pairs = [
            (getattr(trajectory.state.adam, n), getattr(reference.state.adam, n))
            for n in ("lambdas", "mean", "square")
        ]
        same = trajectory.losses == reference.losses and all(torch.equal(*pair) for pair in pairs)
        deviation = float((pairs[0][0] - pairs[0][1]).abs().max())
    incidents = () if trajectory is None else tuple(asdict(i) for i in trajectory.incidents)
    return Campaign(*shape, count_injected(marks), ended, error, same, deviation, incidents)


def soak(count: int, seed: int) -> dict[str, Any]:
    """Run campaigns, over the shapes in turn, until ``count`` faults have been drawn."""
    rng, steps = random.Random(seed), FAULTS_PER_CAMPAIGN + 4
    campaigns: list[Campaign] = []
    drawn: list[Fault] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        world = make_world(folder / "world")
        references = {
            shape: run(world, shape, [], folder / f"calm-{n}", steps)
            for n, shape in enumerate(SHAPES)
        }
        while len(drawn) < count:
            shape = SHAPES[len(campaigns) % len(SHAPES)]
            faults = draw(rng, shape[0], min(FAULTS_PER_CAMPAIGN, count - len(drawn)))
            drawn += faults
            at = folder / f"campaign-{len(campaigns)}"
            at.mkdir()
            campaigns.append(campaign(world, shape, faults, at, references[shape]))
            last = campaigns[-1]
            print(f"{len(drawn):4d} of {count}: {last.ended}, to the bit: {last.same_bits}",
                  f"{last.error}", flush=True)  # fmt: skip
    return summary(campaigns, drawn, seed)


def summary(campaigns: Sequence[Campaign], drawn: Sequence[Fault], seed: int) -> dict[str, Any]:
    """Return the figures of docs/reliability.md."""
    incidents = [incident for one in campaigns for incident in one.incidents]
    good = [one for one in campaigns if one.ended == "recovered"]
    failed = [one for one in campaigns if one.ended == "failed"]
    return {
        "seed": seed,
        "drawn": dict(Counter(fault.kind for fault in drawn)),
        "phases": dict(Counter(fault.phase for fault in drawn)),
        "injected": sum(one.injected for one in campaigns),
        "recovered": sum(one.injected for one in good if one.same_bits),
        "failed_cleanly": sum(one.injected for one in failed),
        "hung_or_wrong": sum(
            one.injected for one in campaigns if one not in failed and not one.same_bits
        ),
        "largest_deviation": max((one.deviation for one in good), default=None),
        "incidents": len(incidents),
        "detect_s": quantiles([incident["detect_s"] for incident in incidents]),
        "recover_s": quantiles([incident["recover_s"] for incident in incidents]),
        "campaigns": [asdict(one) for one in campaigns],
    }


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    median, p95 = np.quantile(seconds, [0.5, 0.95])
    return {"median": float(median), "p95": float(p95), "max": max(seconds)}


def left_behind(before: set[int]) -> list[str]:
    """Return the names of child processes that should have ended with the workers."""
    return [p.name() for p in psutil.Process().children(recursive=True) if p.pid not in before]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("soak.json"))
    args = parser.parse_args()

    def silent(*_: object) -> None:
        raise SilentError

    signal.signal(signal.SIGALRM, silent)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    ray.init(
        address="local", num_cpus=6, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR", object_store_memory=200_000_000,
    )  # fmt: skip
    began = time.monotonic()
    try:
        out = soak(args.faults, args.seed)
    finally:
        ray.shutdown()
    time.sleep(5)
    out |= {"seconds": time.monotonic() - began, "left_behind": left_behind(before)}
    args.output.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in out.items() if key != "campaigns"}, indent=1))
    return 1 if out["hung_or_wrong"] or out["left_behind"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

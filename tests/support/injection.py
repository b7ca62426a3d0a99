"""Workers that fail on purpose, in a given phase of a given step."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray import cloudpickle

from raymerge.engine.worker.worker import MergeWorker
from raymerge.errors import PeerLostError

STEP_PHASES = ("merge", "gather", "compute", "reduce", "inner_products")
Kind = Literal["kill", "freeze", "exit", "break"]


@dataclass(frozen=True)
class Fault:
    """A fault of worker ``rank`` when it begins ``phase`` of ``step``, injected ``times`` times.

    ``kill``: SIGKILL. ``freeze``: SIGSTOP. ``exit``: the process ends by itself. ``break``: the
    connection to its peers breaks.
    """

    kind: Kind
    rank: int
    phase: str
    step: int | None = None
    times: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.rank}-{self.phase}-{self.step}"


class FaultyWorker(MergeWorker):
    """Base of the classes that ``faulty_worker`` makes, one per list of faults."""

    faults: Sequence[Fault] = ()
    marks = ""

    def begin(self, phase: str, step: int | None = None) -> None:
        super().begin(phase, step)
        for fault in self.faults:
            if (fault.rank, fault.phase, fault.step) == (self.spec.rank, phase, step):
                for attempt in range(fault.times):
                    if _first(Path(self.marks) / f"{fault.name}-{attempt}"):
                        _inject(fault)
                        break


def faulty_worker(faults: Sequence[Fault], marks: Path) -> type[FaultyWorker]:
    """Return a worker class with these faults; each injected one leaves a file in ``marks``."""
    marks.mkdir(parents=True, exist_ok=True)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know this folder
    members = {"faults": tuple(faults), "marks": str(marks)}
    return type("FaultyWorker", (FaultyWorker,), members)


def count_injected(marks: Path) -> int:
    """Return the number of faults that were injected."""
    return len(list(marks.iterdir()))


def _first(mark: Path) -> bool:
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _inject(fault: Fault) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "exit":
        os._exit(1)
    elif fault.kind == "break":
        raise PeerLostError("connection reset, on purpose")

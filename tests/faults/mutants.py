"""Faults put into the code itself, which the tests must catch: `python tests/faults/mutants.py`.

Each mutant changes a few lines in a copy of the project and names the tests that must fail then,
and pass without it. Writes JSON; exits 1 if a mutant is not caught. `test_mutants.py` checks that
the quoted lines are those of today's code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """``changes``: pairs of texts, old and new; each old one is once in ``file``.

    ``tests``: the arguments of pytest.
    """

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    tests: str


MUTANTS = (
    Mutant(
        "results are summed in order of arrival",
        "engine/driver/loop.py",
        (("ordered = sorted(results, key=lambda result: result.rank)", "ordered = list(results)"),
         ("if keys != [(rank, request.step)", "if sorted(keys) != [(rank, request.step)")),
        "tests/engine/driver/test_loop.py::test_the_sum_does_not_depend_on_the_order_of_arrival",
    ),
    Mutant(
        "the driver accepts a result of an old generation",
        "distributed/actor_group.py",
        (("if result.generation != generation:", "if False:"),),
        "tests/distributed/test_actor_group.py::test_a_result_of_an_abandoned_generation_is_refused",
    ),
    Mutant(
        "a worker serves a request of an old generation",
        "engine/worker/worker.py",
        (("if request.generation < self._generation:", "if False:"),),
        "tests/engine/worker/test_shard.py::test_a_request_of_an_abandoned_generation_is_refused",
    ),
    Mutant(
        "a state is written in place",
        "runs/state.py",
        (('temporary = Path(tempfile.mkdtemp(prefix=".step-", dir=self.folder))',
          "temporary = target\n        temporary.mkdir(exist_ok=True)"),
         ("shutil.rmtree(target, ignore_errors=True)  # a damaged one", "pass  # a damaged one"),
         ("temporary.replace(target)\n", "pass\n"),
         ("        finally:\n            shutil.rmtree(temporary, ignore_errors=True)",
          "        finally:\n            pass")),
        "tests/runs/test_state.py::test_killed_a_hundred_times_while_it_writes_a_whole_state_is_there",
    ),
    Mutant(
        "a state is read without its checksum",
        "runs/state.py",
        (('if file_sha256(path / _TENSORS) != manifest["sha256"][_TENSORS]:', "if False:"),),
        "tests/runs/test_state.py::test_no_flipped_bit_is_ever_taken_for_a_state",
    ),
    Mutant(
        "two drivers may write one run",
        "runs/state.py",
        (("if newest > self._attempt:", "if False:"),),
        "tests/runs/test_state.py::test_an_older_attempt_cannot_save",
    ),
    Mutant(
        "a state is a step ahead of its line in metrics.jsonl",
        "runs/folder.py",
        (("        try:\n            self._metrics.write(",
          "        self._state = state\n        try:\n            self._metrics.write("),),
        "tests/runs/test_folder.py",
    ),
    Mutant(
        "a step that gives NaN is taken",
        "engine/driver/loop.py",
        (("    require_finite(total, request, monitor.tasks, group)\n", ""),),
        "tests/engine/driver/test_loop.py::test_a_step_that_is_not_finite_names_the_task_and_changes_nothing",
    ),
    Mutant(
        "skipped steps count in Adam's bias correction",
        "merging/optimizer.py",
        (("return self.step - self.skipped", "return self.step"),),
        "tests/engine/driver/test_loop.py::test_a_skipped_step_leaves_no_trace",
    ),
    Mutant(
        "failures do not count against the budget",
        "distributed/failures.py",
        (("if limit is None or spent <= limit:", "if True:"),),
        "tests/distributed/test_failures.py",
    ),
    Mutant(
        "an aborted rank keeps its connections",
        "engine/worker/collectives.py",
        (("            else:\n                _disconnect()",
          "            else:\n                pass"),),
        "tests/engine/worker/test_collectives.py",
    ),
    Mutant(
        "a worker without a heartbeat counts as idle",
        "distributed/calls.py",
        (("return heartbeat is not None and not heartbeat.waits_for_peers\n",
          "return heartbeat is None or not heartbeat.waits_for_peers\n"),),
        "tests/distributed/test_actor_group.py -k without_a_heartbeat",
    ),
    Mutant(
        "a restarted worker does not load",
        "distributed/actor_group.py",
        (("missing = [worker for worker in self._groups.workers if worker.report is None]",
          "missing = [] if self._groups.generation > 1 else list(self._groups.workers)"),),
        "tests/faults/test_recovery.py -k kill-1-gather",
    ),
    Mutant(
        "the head is polled within the steps",
        "distributed/preemption.py",
        (("        silent_s = time.monotonic() - self._answered_at\n",
          "        self._draining = frozenset(self._query())\n"
          "        silent_s = time.monotonic() - self._answered_at\n"),),
        "tests/distributed/test_preemption.py",
    ),
)  # fmt: skip


def mutated(mutant: Mutant, package: Path) -> str:
    """Return the changed text of the mutant's file; exits if an old text is not in it once."""
    text = (package / mutant.file).read_text(encoding="utf-8")
    for old, new in mutant.changes:
        if text.count(old) != 1:
            raise SystemExit(f"{mutant.name}: {old!r} is {text.count(old)} times in {mutant.file}")
        text = text.replace(old, new)
    return text


def tests_pass(tests: Sequence[str], project: Path) -> bool:
    """Return whether the tests pass in this copy of the project."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--timeout", "120", *tests],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},  # before what is installed
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise SystemExit(f"{' '.join(tests)}: no tests were run\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def not_code(folder: str, names: list[str]) -> set[str]:
    """Return what is left out of a copy: hidden files, caches, and the runs at the root."""
    ignored = shutil.ignore_patterns(".*", "__pycache__")(folder, names)
    return ignored | ({"runs"} if Path(folder) == ROOT else set())


def judge(mutant: Mutant) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as scratch:
        project, tests = Path(scratch) / "project", mutant.tests.split()
        shutil.copytree(ROOT, project, ignore=not_code)
        sound = tests_pass(tests, project)
        changed = mutated(mutant, project / "raymerge")
        (project / "raymerge" / mutant.file).write_text(changed, encoding="utf-8")
        caught = not tests_pass(tests, project)
    verdict = (
        "caught" if caught and sound else "NOT CAUGHT" if sound else "fails without the mutant"
    )
    print(f"{verdict}: {mutant.name}", flush=True)
    return {**asdict(mutant), "verdict": verdict}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="run only mutants whose name contains this")
    parser.add_argument("--output", type=Path, default=Path("mutants.json"))
    args = parser.parse_args()
    judged = [judge(mutant) for mutant in MUTANTS if args.only in mutant.name]
    args.output.write_text(json.dumps(judged, indent=1) + "\n", encoding="utf-8")
    return 0 if all(each["verdict"] == "caught" for each in judged) else 1


if __name__ == "__main__":
    raise SystemExit(main())

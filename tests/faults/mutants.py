"""Faults put into the code itself, which the tests must catch: `python tests/faults/mutants.py`.

Each mutant is a copy of the project with a few lines changed, and the tests that are to fail on it.
They must pass on the code as it is. Writes JSON; exits 1 where a mutant lives.
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
    """``changes``: (old, new) texts, each once in ``file``. ``tests``: what pytest is to run."""

    name: str
    file: str
    changes: tuple[tuple[str, str], ...]
    tests: str


MUTANTS = (
    Mutant(
        "results are summed in order of arrival",
        "driver.py",
        (("ordered = sorted(results, key=lambda result: result.rank)", "ordered = list(results)"),
         ("if answers != [(rank, request.step)", "if sorted(answers) != [(rank, request.step)")),
        "tests/engine/driver/test_loop.py::test_the_sum_does_not_depend_on_the_order_of_arrival",
    ),
    Mutant(
        "the driver takes an answer of an old generation",
        "distributed/group.py",
        (("if result.generation != generation:", "if False:"),),
        "tests/distributed/test_actor_group.py::test_an_answer_of_an_abandoned_generation_is_refused",
    ),
    Mutant(
        "a worker serves a request of an old generation",
        "worker.py",
        (("if request.generation < self._generation:", "if False:"),),
        "tests/engine/worker/test_shard.py::test_a_request_of_an_abandoned_generation_is_refused",
    ),
    Mutant(
        "a state is written in place",
        "state.py",
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
        "state.py",
        (('if file_sha256(path / _TENSORS) != manifest["sha256"][_TENSORS]:', "if False:"),),
        "tests/runs/test_state.py::test_no_flipped_bit_is_ever_taken_for_a_state",
    ),
    Mutant(
        "two drivers may write one run",
        "state.py",
        (("if newest > self._attempt:", "if False:"),),
        "tests/runs/test_state.py::test_an_older_attempt_cannot_save",
    ),
    Mutant(
        "a state is a step ahead of its line in metrics.jsonl",
        "rundir.py",
        (("        try:\n            self._metrics.write(",
          "        self._state = state\n        try:\n            self._metrics.write("),),
        "tests/runs/test_folder.py",
    ),
    Mutant(
        "a step that is NaN is taken",
        "driver.py",
        (("    require_finite(total, request, watch.tasks, group)\n", ""),),
        "tests/engine/driver/test_loop.py::test_a_step_that_is_not_finite_names_the_task_and_changes_nothing",
    ),
    Mutant(
        "skipped steps count in Adam's bias correction",
        "merging/optimizer.py",
        (('return self.step - int(self.memory.get("skipped", 0))', "return self.step"),),
        "tests/engine/driver/test_loop.py::test_a_skipped_step_leaves_no_trace",
    ),
    Mutant(
        "failures cost nothing",
        "distributed/failures.py",
        (("if limit is None or self.spent[kind] <= limit:", "if True:"),),
        "tests/distributed/test_failures.py",
    ),
    Mutant(
        "a rank that is freed keeps its connections",
        "collectives.py",
        (("            else:\n                _disconnect()",
          "            else:\n                pass"),),
        "tests/engine/worker/test_collectives.py",
    ),
    Mutant(
        "a worker that answers no ping is taken to be free",
        "distributed/calls.py",
        (("return pulse is not None and not pulse.waits_for_peers\n",
          "return pulse is None or not pulse.waits_for_peers\n"),),
        "tests/distributed/test_actor_group.py -k says_nothing",
    ),
    Mutant(
        "a successor does not load",
        "distributed/group.py",
        (("missing = [member for member in self._team.working if member.report is None]",
          "missing = [] if self._team.generation > 1 else list(self._team.working)"),),
        "tests/faults/test_recovery.py -k kill-1-gather",
    ),
    Mutant(
        "the head is asked within the steps",
        "distributed/notices.py",
        (("        silent_s = time.monotonic() - self._heard\n",
          "        self._now = frozenset(self._ask())\n"
          "        silent_s = time.monotonic() - self._heard\n"),),
        "tests/distributed/test_preemption.py",
    ),
)  # fmt: skip


def mutate(mutant: Mutant, package: Path) -> None:
    file = package / mutant.file
    text = file.read_text(encoding="utf-8")
    for old, new in mutant.changes:
        if text.count(old) != 1:
            raise SystemExit(f"{mutant.name}: {old!r} is {text.count(old)} times in {mutant.file}")
        text = text.replace(old, new)
    file.write_text(text, encoding="utf-8")


def tests_pass(tests: Sequence[str], project: Path) -> bool:
    """In this copy of the project."""
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


def judge(mutant: Mutant) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as scratch:
        project, tests = Path(scratch) / "project", mutant.tests.split()
        shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
        sound = tests_pass(tests, project)
        mutate(mutant, project / "raymerge")
        caught = not tests_pass(tests, project)
    verdict = "caught" if caught and sound else "LIVES" if sound else "fails without the mutant"
    print(f"{verdict}: {mutant.name}", flush=True)
    return {**asdict(mutant), "verdict": verdict}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="those whose name has this in it")
    parser.add_argument("--output", type=Path, default=Path("mutants.json"))
    args = parser.parse_args()
    judged = [judge(mutant) for mutant in MUTANTS if args.only in mutant.name]
    args.output.write_text(json.dumps(judged, indent=1) + "\n", encoding="utf-8")
    return 0 if all(each["verdict"] == "caught" for each in judged) else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""The list of mutants fits today's code: every quoted text and every named test exists."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "tests/faults/mutants.py"))


@pytest.mark.parametrize("mutant", SCRIPT["MUTANTS"], ids=lambda mutant: mutant.name)
def test_a_mutant_applies_and_names_an_existing_test(mutant: Any) -> None:
    package = ROOT / "raymerge"
    assert SCRIPT["mutated"](mutant, package) != (package / mutant.file).read_text("utf-8")
    file, _, name = mutant.tests.split()[0].partition("::")
    assert not name or f"def {name}(" in (ROOT / file).read_text("utf-8")


def test_a_text_that_is_not_in_the_file_is_reported() -> None:
    mutant = SCRIPT["Mutant"]("outdated", "errors.py", (("no such line", ""),), "")
    with pytest.raises(SystemExit, match=r"outdated: 'no such line' is 0 times in errors\.py"):
        SCRIPT["mutated"](mutant, ROOT / "raymerge")

"""The check of the fuzz tests detects every violation of its rule."""

from __future__ import annotations

import time
from collections.abc import Callable

import fuzzing
import numpy as np
import pytest
from fuzzing import COUNTS, Ground, TooLongError

from raymerge.errors import UserError


class TwoLinesError(UserError):
    def __str__(self) -> str:
        return "a\nb"


def fail(error: Exception) -> None:
    raise error


BROKEN: dict[str, tuple[Callable[[Ground], object], type[BaseException]]] = {
    "another exception": (lambda ground: fail(KeyError("x")), KeyError),
    "two lines": (lambda ground: fail(TwoLinesError()), AssertionError),
    "a file outside": (lambda ground: ground.canary.touch(), AssertionError),
    "a file changed": (lambda g: (g.root / "outside/kept").write_text("x"), AssertionError),
    "a file beside": (lambda ground: (ground.inside / "x").touch(), AssertionError),
    "memory": (lambda ground: np.zeros(4 * fuzzing.SPARE_BYTES, np.uint8), MemoryError),
    "no end": (lambda ground: time.sleep(60), TooLongError),
}


@pytest.mark.parametrize("how", BROKEN)
def test_every_violation_is_detected(
    ground: Ground, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "LONGEST_S", 1)
    ground.clean()
    read, error = BROKEN[how]
    with pytest.raises(error):
        ground.examine("oracle", lambda: read(ground))
    ground.canary.unlink(missing_ok=True)
    del COUNTS["oracle"]

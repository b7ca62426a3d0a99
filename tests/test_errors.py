"""Every message is one line that a terminal shows as it is, also after a journey."""

from __future__ import annotations

import pickle

import pytest
import torch

from raymerge.errors import CheckpointError, NonFiniteError, printable
from raymerge.models.checkpoints.inspect import inspect_checkpoint, inspection_text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("λ of a b, 3 × 4 …", "λ of a b, 3 × 4 …"),
        ("a\nb", "a b"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\x1eb\u2028c", "a\\x1eb\\u2028c"),
        ("a\ud800", "a\\ud800"),
    ],
)
def test_names_of_files_move_no_cursor(text: str, shown: str) -> None:
    assert printable(text) == shown
    for error in (CheckpointError(text), pickle.loads(pickle.dumps(CheckpointError(text)))):
        assert str(error) == shown
    assert str(NonFiniteError("loss is NaN", 2)).startswith("step 3: loss is NaN; ")


def test_inspect_shows_keys_as_they_are_not(tmp_path) -> None:
    torch.save({"a\x1b]0;title\x07": torch.zeros(1)}, tmp_path / "x.pt")
    text = inspection_text(inspect_checkpoint(str(tmp_path / "x.pt")))
    assert "a\\x1b]0;title\\x07" in text
    assert "\x1b" not in text

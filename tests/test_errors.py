"""Every message is one line that a terminal shows as it is, also after a journey."""

from __future__ import annotations

import pickle

import pytest
import torch

from raymerge.errors import (
    CheckpointError,
    NonFiniteError,
    UserError,
    did_you_mean,
    escape_unprintable,
    excerpt,
    one_line,
    printable_lines,
    unknown_name,
)
from raymerge.files.urls import redact
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
    assert escape_unprintable(text) == shown
    for error in (CheckpointError(text), pickle.loads(pickle.dumps(CheckpointError(text)))):
        assert str(error) == shown
    assert str(NonFiniteError("loss is NaN", 2)).startswith("step 3: loss is NaN; ")


def test_inspect_shows_keys_as_they_are_not(tmp_path) -> None:
    torch.save({"a\x1b]0;title\x07": torch.zeros(1)}, tmp_path / "x.pt")
    text = inspection_text(inspect_checkpoint(str(tmp_path / "x.pt")))
    assert "a\\x1b]0;title\\x07" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("  two\n\tlines "), "two lines"),
        (ValueError(), "ValueError"),
        (OSError("x" * 200), "x" * 159 + "…"),
    ],
)
def test_an_error_fits_on_one_line(error: Exception, line: str) -> None:
    assert one_line(error) == line
    assert one_line("a b c", 3) == "a …"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mnits", "; did you mean MNIST?"),
        ("mnist", "; did you mean MNIST?"),
        ("cars", ""),
        (["MNIST"], ""),
    ],
)
def test_the_nearest_known_name_is_proposed(name: object, hint: str) -> None:
    assert did_you_mean(name, ["MNIST", "DTD"]) == hint
    assert unknown_name(name, ["MNIST", "DTD"]) == f"{name!r} is unknown{hint} (known: MNIST, DTD)"


def test_a_message_of_megabytes_keeps_its_head_and_its_remedy():
    error = UserError(f"tasks[0]: label {'x' * 900_000} is no class; write another")
    assert len(str(error)) < 2100
    assert str(error).startswith("tasks[0]: label xxx")
    assert str(error).endswith("is no class; write another")


def test_lines_are_printed_without_codes_for_the_terminal():
    assert printable_lines("a\x1b[31m\nb\u202e") == "a\\x1b[31m\nb\\u202e"


@pytest.mark.parametrize("lead", [990, 995, 999, 1003, 1010])
def test_no_part_of_a_password_is_left_where_a_long_message_is_cut(lead: int) -> None:
    url = "https://me:s3cr3tpassword@host/x"
    for text in (f"{'a' * lead} {url} {'b' * 3000}", f"{'a' * 3000} {url} {'b' * (lead - 20)}"):
        line = redact(str(UserError(text)))
        assert "s3" not in line
        assert "password" not in line
        assert len(line) < 2100


def test_an_excerpt_shows_no_part_of_a_password() -> None:
    for value in (
        "https://me:s3cr3t@host/a/long/path/x.pt",
        ["https://u:s3cr3t@host/a/long/path.pt"],
    ):
        assert "s3" not in redact(excerpt(value))
    assert excerpt("https://h/x.pt") == "'https://h/x.pt'"

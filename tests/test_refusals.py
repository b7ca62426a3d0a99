"""Every refusal says what to do about it.

A message has a remedy if a clause opens with a verb of advice (after a mark, "or", "and"), asks a
question, or says what is required ("must", "needs", "expected", "at most"). Texts of helpers that
write remedies (``unknown_name``, ``explain``, ``_missing``) count as one. An error passed on
with a place before it is judged where it was raised. Whether advice is good is left to people.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "raymerge"
_ERRORS = ("UserError", "ConfigError", "CheckpointError", "RemoteError", "DataError", "RunError")
_VERBS = (
    "add|ask|check|choose|convert|copy|correct|delete|describe|download|draw|drop|export|fetch|fine-tune|"
    "free|give|increase|install|keep|leave|list|load|log in|lower|make|merge|move|name|omit|open|"
    "pip|pass|pick|push|put|raise|reduce|remove|rename|repair|replace|restore|resume|run|save|see|"
    "select|set|shorten|sort|start|store|submit|take|turn|unpack|update|upgrade|use|wait|write"
)
_ADVICE = re.compile(
    rf"(?:[;:,(]|\bor\b|\band\b)\s*(?:\{{\}} )?(?:{_VERBS})\b"
    r"|\b(?:must|needs?|expected|at most|at least|only|did you mean|known)\b|\?",
    re.IGNORECASE,
)
_HELPER = re.compile(
    r"remedy|hint|unknown_name|explain|_login|no_column|_missing|_without_config|not_here|"
    r"foreign\[1\]|\bform$|mismatch|_index|choose",
    re.IGNORECASE,
)
_PASSED_ON = re.compile(
    r"(?<!\.)\b(?:\w*error|problems?|message|text|reason)\b(?:\[0\])?\)*$|^_reason\("
)


def has_remedy(message: str) -> bool:
    """Return whether a message, with its values in braces, says what to do."""
    values = re.findall(r"\{([^{}]*)\}", message)
    ends = re.sub(r"\{more\}$", "", message)
    is_passed_on = (
        ends.endswith("}")
        and bool(values)
        and (_PASSED_ON.search(re.findall(r"\{([^{}]*)\}", ends)[-1]) is not None)
    )
    words = re.sub(r"\{[^{}]*\}", "{}", message)
    return bool(_ADVICE.search(words)) or any(map(_HELPER.search, values)) or is_passed_on


def _text(node: ast.expr) -> str:
    """Return a message as it stands in the source, its values in braces."""
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(map(_text, node.values))
        case ast.FormattedValue():
            return f"{{{ast.unparse(node.value)}}}"
        case ast.BinOp():
            return _text(node.left) + _text(node.right)
        case ast.IfExp():
            return f"{_text(node.body)} {_text(node.orelse)}"
    return f"{{{ast.unparse(node)}}}"


def refusals(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the message of each error that a file raises for users."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=[message, *_])):
                if name in _ERRORS:
                    yield node.lineno, _text(message)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("output x: is in use; choose another folder", True),
        ("steps must be an integer", True),
        ("config {path}: {explain(error, Config)}", True),
        ("{key} ({task.name}): {error}", True),
        ("checkpoint {path}: is damaged", False),
        ("checkpoint {path}: cannot be used", False),
        ("config {path}: cannot be read: {error.strerror}", False),
        ("{url}: no such folder, or it is empty", False),
        ("{sum(counts)} images, not {expected}", False),
    ],
)
def test_what_counts_as_a_remedy(message: str, expected: bool) -> None:
    assert has_remedy(message) == expected


def test_every_refusal_has_a_remedy() -> None:
    without = [
        f"{file.relative_to(PACKAGE)}:{line}: {message}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for line, message in refusals(file.read_text(encoding="utf-8"))
        if not has_remedy(message)
    ]
    assert without == []

"""Docstrings of the package are sentences, and long functions have comments in their body."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import raymerge

PACKAGE = Path(raymerge.__file__).parent
OPENINGS = ("Of ", "Who ", "Whether ", "What ", "Where ")
MOST_LINES = 25


def violations(source: str) -> list[str]:
    """Return ``line: reason`` for each docstring and function that breaks a rule."""
    nodes = list(ast.walk(ast.parse(source)))
    comments = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    openings = [
        (line, f"docstring opens with {text.split()[0]!r}")
        for node in nodes
        for line, text in _docstrings(node)
        if text.startswith(OPENINGS)
    ]
    silent = [
        (node.lineno, f"{node.name} has {_lines(node)} lines and no comment")
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and _lines(node) > MOST_LINES
        and not comments & set(range(node.body[0].lineno - 1, _end(node) + 1))
    ]
    return [f"{line}: {reason}" for line, reason in sorted(openings + silent)]


def _docstrings(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the texts that stand alone as statements, also those below attributes."""
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for statement in node.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            yield statement.lineno, str(statement.value.value).strip()


def _end(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _lines(node: ast.stmt) -> int:
    return _end(node) - node.lineno + 1


def _names() -> list[str]:
    return [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize("name", _names())
def test_docstrings_are_sentences_and_long_functions_have_comments(name: str) -> None:
    path = PACKAGE / name
    found = violations(path.read_text(encoding="utf-8"))
    assert [f"{path}:{each}" for each in found] == []


def test_violations_are_reported_with_their_line() -> None:
    body = "    x = 1\n" * MOST_LINES
    source = f'"""Of a module."""\nx = 1\n"""Whether."""\n"""Where x is."""\ndef f():\n{body}'
    assert violations(source) == [
        "1: docstring opens with 'Of'",
        "4: docstring opens with 'Where'",
        "5: f has 26 lines and no comment",
    ]
    assert violations(f"def f():\n    # why\n{body}") == []

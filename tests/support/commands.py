"""Running ``raymerge`` in tests: in this process for speed, or as a process where that matters."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import yaml
from world import World

from raymerge.cli import main

LOCAL = {"workers": 0, "cpus_per_worker": 1}  # one thread: these models are too small for more


@dataclass(frozen=True)
class CommandResult:
    """The exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str


class Commands:
    """Calls ``raymerge`` in this process and captures its output."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *argv: object) -> CommandResult:
        self._capsys.readouterr()
        try:
            code = main([str(arg) for arg in argv])
        except SystemExit as exit:  # argparse
            code = exit.code if isinstance(exit.code, int) else 1
        captured = self._capsys.readouterr()
        return CommandResult(code, captured.out, captured.err)

    def ok(self, *argv: object) -> CommandResult:
        """Run a command that must succeed."""
        ran = self(*argv)
        assert ran.code == 0, ran.err
        return ran


def cache_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tokenizer: reading its vocabulary takes as long as one of these small merges."""
    monkeypatch.setattr(open_clip, "get_tokenizer", _get_tokenizer)


_get_tokenizer = functools.cache(open_clip.get_tokenizer)


def refused(ran: CommandResult, *mentions: str) -> None:
    """Assert the contract for wrong input: exit code 2 and one line with what, where and remedy."""
    assert (ran.code, ran.out) == (2, ""), (ran.code, ran.out, ran.err)
    assert ran.err.count("\n") == 1, ran.err
    assert ran.err.endswith("\n"), ran.err
    assert ran.err.startswith("raymerge: error: "), ran.err
    assert "Traceback" not in ran.err, ran.err
    for mention in mentions:
        assert mention in ran.err, (mention, ran.err)


def tree(*roots: Path) -> dict[str, str]:
    """Return every file, folder and link below the roots, with the hash of its content."""
    return {str(path): _digest(path) for root in roots for path in sorted(root.rglob("*"))}


def _digest(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return "link" if path.is_symlink() else "folder"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def config_data(world: World, **changes: Any) -> dict[str, Any]:
    """Return a copy of the world's config that runs on one thread of this process."""
    data = {**deepcopy(dict(world.config)), "cluster": dict(LOCAL)}
    data.update(changes)
    return data


def write_config(path: Path, data: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(data), sort_keys=False))
    return path


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_steps(metrics: Path) -> list[int]:
    """Return the step of each line of a metrics.jsonl."""
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()]


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a child process: one thread, no display."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", **changes}


def script() -> Path:
    """Return the path of the installed console script, even if it is not on the PATH."""
    return Path(sys.executable).with_name("raymerge")


def python(code: str, *argv: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python source in a fresh interpreter; the caller checks its exit code."""
    return process([sys.executable, "-c", code, *map(str, argv)], **env)


def process(argv: Sequence[object], **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; the caller checks its exit code."""
    return subprocess.run(
        [str(arg) for arg in argv],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

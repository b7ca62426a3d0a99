"""One code and one data on all nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from world import World

from raymerge.distributed.agreement import agreement_check, require_agreement
from raymerge.engine.worker.clip_source import ClipSource
from raymerge.engine.worker.identity import Finding, Identity, own_identity, sample_digest
from raymerge.errors import RunError

OWN = Identity({"raymerge's code": "aa", "torch": "2.9"}, {"tasks[0].checkpoint": Finding("d1")})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"code": {**OWN.code, "torch": "2.8"}},
            "node 10.0.0.2: has torch 2.8, and the driver 2.9",
        ),
        ({"code": {"torch": "2.9"}}, "has raymerge's code not installed, and the driver aa"),
        ({"inputs": {"tasks[0].checkpoint": Finding("d2")}}, "is another one than the driver's"),
        (
            {"inputs": {"tasks[0].checkpoint": Finding("", "/a.pt: no such file")}},
            r"node 10.0.0.2: tasks\[0\].checkpoint: /a.pt: no such file; put the same files",
        ),
        ({"inputs": {}}, "is not reported"),
    ],
)
def test_a_difference_names_node_part_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        require_agreement("10.0.0.2", replace(OWN, **changes), OWN)


def test_equal_nodes_agree() -> None:
    require_agreement("10.0.0.2", OWN, OWN)
    agreement_check(dict)("10.0.0.2", own_identity({}))


def _identity(world: World, tasks: list[dict[str, Any]]) -> Identity:
    config = world.parse(tasks=tasks)
    return own_identity(ClipSource(config.model, config.tasks).inputs())


def test_what_a_node_has_under_the_same_path_is_noticed(world: World, tmp_path: Path) -> None:
    """Another expert, an image more, a file that is missing: each in its own place."""
    tasks = [dict(task) for task in world.config["tasks"]]
    own = _identity(world, tasks)
    assert _identity(world, tasks) == own
    assert {"model", "tasks[0].checkpoint", "tasks[3].test"} <= own.inputs.keys()
    other = tmp_path / "other.safetensors"
    content = bytearray(Path(tasks[0]["checkpoint"]).read_bytes())
    content[-8:] = b"\0" * 8
    other.write_bytes(content)
    changed = [{**tasks[0], "checkpoint": str(other)}, *tasks[1:]]
    with pytest.raises(RunError, match=r"tasks\[0\].checkpoint: is another one"):
        require_agreement("b", _identity(world, changed), own)
    missing = [tasks[0], {**tasks[1], "adapt": str(tmp_path / "nowhere")}, *tasks[2:]]
    with pytest.raises(RunError, match=r"tasks\[1\].adapt: .*nowhere: no such folder"):
        require_agreement("b", _identity(world, missing), own)


def test_the_digest_of_a_file_sees_its_size_and_its_ends(tmp_path: Path) -> None:
    file = tmp_path / "x"
    seen = set()
    for content in (
        bytes(100_000),
        bytes(100_001),
        b"1" + bytes(99_999),
        bytes(99_999) + b"1",
        b"",
    ):
        file.write_bytes(content)
        seen.add(sample_digest(file))
    assert len(seen) == 5

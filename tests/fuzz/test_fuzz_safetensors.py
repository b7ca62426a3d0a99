"""Safetensors: false headers, and indexes whose shards lie elsewhere."""

from __future__ import annotations

import json
from typing import Any

import torch
from fuzzing import (
    ODD,
    ODD_TEXTS,
    Ground,
    changed,
    json_bytes,
    json_files,
    mutants,
    read_checkpoint,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from raymerge.models.checkpoints.locate import files_of

STATE = {
    "visual.class_embedding": torch.arange(4.0),
    "visual.conv1.weight": torch.zeros(4, 3, 2, 2),
    "visual.steps": torch.zeros(2, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
}
FILE = save(STATE)
LENGTH = int.from_bytes(FILE[:8], "little")
HEADER, BODY = json.loads(FILE[8 : 8 + LENGTH]), FILE[8 + LENGTH :]


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + BODY


DTYPES = ("F64", "F4", "F8_E8M0", "U64", "C64", "I8", "BOOL", "bf16")


@given(content=mutants([FILE]) | changed(HEADER, (*ODD, *DTYPES)).map(json_bytes).map(with_header))
def test_safetensors(ground: Ground, content: bytes) -> None:
    path = ground.clean() / "x.safetensors"
    path.write_bytes(content)
    ground.examine("safetensors headers", lambda: read_checkpoint(path))


NAMES = (
    "a.safetensors", "../outside/kept", "/etc/passwd", "a\\b", "C:x", "sub/a.safetensors",
    "model.safetensors.index.json", "link.safetensors",
)  # fmt: skip
INDEX: dict[str, Any] = {
    "metadata": {"total_size": 1},
    "weight_map": dict.fromkeys(STATE, "a.safetensors"),
}


@given(content=json_files(INDEX, (*ODD, *ODD_TEXTS, *NAMES, *NAMES)))
def test_indexes(ground: Ground, content: bytes) -> None:
    folder = ground.clean()
    (folder / "a.safetensors").write_bytes(FILE)
    (folder / "link.safetensors").symlink_to("a.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_bytes(content)

    def read() -> None:
        read_checkpoint(index)
        assert all(file.parent == folder for file in files_of(index))

    ground.examine("sharded indexes", read)


@given(names=st.lists(st.text(max_size=8), min_size=1, max_size=3))
def test_names_of_shards(ground: Ground, names: list[str]) -> None:
    index = ground.clean() / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {str(i): name for i, name in enumerate(names)}}))
    ground.examine("sharded indexes", lambda: read_checkpoint(index))

"""Names in an index stay in its folder, and JSON files have bounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raymerge.errors import CheckpointError
from raymerge.models.checkpoints import locate
from raymerge.models.checkpoints.digests import hash_ahead
from raymerge.models.checkpoints.locate import files_of, read_json

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a\\b",
        "C:a",
        "a\0b",
        "a\nb",
        "x" * 256,
        3,
        None,
        INDEX,
    ],
)
def test_an_index_names_files_beside_it_only(tmp_path: Path, name: object) -> None:
    index = tmp_path / INDEX
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="which is not a weights file beside it"):
        files_of(index)
    hash_ahead([str(index)])  # ignores what opening reports


@pytest.mark.parametrize("content", ["[]", '{"weight_map": []}', '{"weight_map": 3}', "{}"])
def test_an_index_without_a_map(tmp_path: Path, content: str) -> None:
    index = tmp_path / INDEX
    index.write_text(content)
    with pytest.raises(CheckpointError, match="has no weight_map"):
        files_of(index)


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_json(tmp_path / "x.json")


def test_large_json_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate, "_MAX_JSON_BYTES", 1 << 20)
    (tmp_path / "x.json").write_text("[" + " " * (1 << 20) + "]")
    with pytest.raises(CheckpointError, match="it has more than 1 MiB"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[1]")
    assert read_json(tmp_path / "x.json") == [1]

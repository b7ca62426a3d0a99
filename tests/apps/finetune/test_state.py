"""States of training: whole or absent, checksummed, fenced."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from raymerge.apps.finetune.state import TrainingStates
from raymerge.errors import RunError, UserError
from raymerge.files.attempts import claim_attempt


def _states(root: Path, fingerprint: str = "f") -> TrainingStates:
    return TrainingStates(root / "experts" / "a", fingerprint, root, claim_attempt(root))


def _tensors(value: float) -> dict[str, torch.Tensor]:
    flat = torch.full((6,), value)
    return {"weights.a": flat[:4].view(2, 2), "weights.b": flat[4:], "step": torch.tensor(value)}


def test_the_newest_of_two_comes_back_to_the_bit(tmp_path: Path) -> None:
    states = _states(tmp_path)
    assert states.newest() is None
    for step in (2, 4, 6):
        states.save(step, _tensors(step / 7))
    assert states.steps() == [4, 6]
    newest = _states(tmp_path).newest()
    assert newest is not None
    assert newest[0] == 6
    for name, tensor in _tensors(6 / 7).items():
        assert torch.equal(newest[1][name], tensor)
    assert not [path for path in states.folder.iterdir() if path.name.startswith(".")]


def test_a_damaged_one_is_skipped_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    states = _states(tmp_path)
    states.save(2, _tensors(2))
    states.save(4, _tensors(4))
    path = states.folder / "step-00000004" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        newest = states.newest()
    assert newest is not None
    assert newest[0] == 2
    assert "a: state of step 4 is damaged (checksum differs)" in caplog.text
    states.save(3, _tensors(3))  # those of later steps go
    assert states.steps() == [2, 3]


def test_another_config_is_refused(tmp_path: Path) -> None:
    _states(tmp_path).save(2, _tensors(2))
    with pytest.raises(UserError, match="another config"):
        _states(tmp_path, "other").newest()
    with pytest.raises(UserError, match="another config"):
        _states(tmp_path, "other").require_same_run()
    _states(tmp_path).require_same_run()


def test_an_older_attempt_can_no_longer_save(tmp_path: Path) -> None:
    old, new = _states(tmp_path), _states(tmp_path)
    new.save(2, _tensors(2))
    with pytest.raises(RunError, match="attempt 2 has taken over this run from attempt 1"):
        old.save(4, _tensors(4))
    assert new.steps() == [2]


def test_a_full_disk_is_one_line_and_leaves_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = _states(tmp_path)
    states.save(2, _tensors(2))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("raymerge.apps.finetune.state.save_file", full)
    with pytest.raises(RunError, match="No space left"):
        states.save(4, _tensors(4))
    assert states.steps() == [2]
    assert len(list(states.folder.iterdir())) == 1


@pytest.mark.parametrize("content", ["[]", "3", "{}", "[" * 100_000, "null"])
def test_a_manifest_that_is_none_is_a_damaged_state(tmp_path: Path, content: str) -> None:
    states = _states(tmp_path)
    states.save(2, _tensors(2))
    states.save(4, _tensors(4))
    (states.folder / "step-00000004" / "manifest.json").write_text(content)
    states.require_same_run()
    newest = states.newest()
    assert newest is not None
    assert newest[0] == 2

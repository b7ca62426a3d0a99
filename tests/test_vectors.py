"""Memory for the task vectors: zeros of the right kind; a mapped file that leaves nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from raymerge.errors import RunError
from raymerge.merging.layout import CELL
from raymerge.messages import VectorStorage
from raymerge.vectors import allocate

CPU = torch.device("cpu")


@pytest.mark.parametrize("location", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_zeros_that_can_be_written(tmp_path, dtype, location):
    vectors_CKn = allocate(VectorStorage(dtype, location, str(tmp_path)), 3, 2, CPU)
    assert vectors_CKn.shape == (3, 2, CELL)
    assert vectors_CKn.dtype == getattr(torch, dtype)
    assert vectors_CKn.is_contiguous()
    assert vectors_CKn.count_nonzero() == 0
    vectors_CKn[1, 1] = 2.5
    assert vectors_CKn.float().sum() == 2.5 * CELL


def _mappings(folder: str) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if folder in line]


def test_a_file_on_disk_has_no_name(tmp_path):
    vectors_CKn = allocate(VectorStorage("float32", "disk", str(tmp_path)), 4, 2, CPU)
    assert list(tmp_path.iterdir()) == []
    (mapped,) = _mappings(str(tmp_path))
    assert mapped.endswith("(deleted)")
    del vectors_CKn
    assert _mappings(str(tmp_path)) == []


def test_two_workers_in_one_folder_do_not_share(tmp_path):
    storage = VectorStorage("float32", "disk", str(tmp_path))
    one, two = allocate(storage, 1, 1, CPU), allocate(storage, 1, 1, CPU)
    one.fill_(1.0)
    assert two.count_nonzero() == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_room_is_a_run_error_and_leaves_nothing(tmp_path, monkeypatch, dtype):
    asked = []

    def full(handle: int, start: int, size: int) -> None:
        asked.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"no room for 0\.\d GB of task vectors \(No space left"):
        allocate(VectorStorage(dtype, "disk", str(tmp_path)), 5000, 2, CPU)
    assert asked == [5000 * 2 * CELL * (4 if dtype == "float32" else 2)]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match=r"vectors\.folder .*/gone: cannot be written: No such file"):
        allocate(VectorStorage("float32", "disk", str(tmp_path / "gone")), 1, 1, CPU)


def test_no_cells_at_all(tmp_path):
    for location in ("device", "disk"):
        storage = VectorStorage("float32", location, str(tmp_path))
        assert allocate(storage, 0, 2, CPU).shape == (0, 2, CELL)

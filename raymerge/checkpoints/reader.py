"""Open a state dict without reading its tensors: safetensors, or torch files through weights_only.

The kind is detected from the content, not from the name. Only the columns that are asked for are
read, into memory that the caller owns, so opening K checkpoints costs no memory.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import resource
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raymerge.checkpoints.locate import locate, one_line
from raymerge.errors import CheckpointError

_NESTED = ("state_dict", "model_state_dict")
_SPARE_FILES = 32
_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Checkpoint(Protocol):
    """An opened state dict: headers in memory, tensors read when asked for."""

    path: Path
    kind: str
    specs: Mapping[str, TensorSpec]

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        """Write columns ``start:start + n`` of the flattened tensor into ``out_n`` (CPU, any
        floating dtype). Raises :class:`CheckpointError` for a damaged file."""
        ...


class SafetensorsCheckpoint:
    """A ``.safetensors`` file: checked by its own library, read with positioned reads.

    Not memory-mapped: pages of a mapping count as this process's memory until it is closed, K
    whole models in the end.
    """

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = _open(path)
            with safe_open(path, framework="pt") as file:  # checks the header against the size
                self.specs: Mapping[str, TensorSpec] = {
                    key: _slice_spec(file.get_slice(key))
                    for key in file.keys()  # noqa: SIM118
                }
            self._starts = _data_starts(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {path}: damaged safetensors file ({one_line(error)}); fetch it again"
            ) from error

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        dtype = self.specs[key].dtype
        same = out_n.dtype == dtype and out_n.is_contiguous()
        values_n = out_n if same else torch.empty(len(out_n), dtype=dtype)
        try:
            self._read(self._starts[key] + start * dtype.itemsize, values_n)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {self.path}: {key} cannot be read ({one_line(error)}); fetch it again"
            ) from error
        if not same:
            out_n.copy_(values_n)

    def _read(self, position: int, out_n: Tensor) -> None:
        left = memoryview(out_n.view(torch.uint8).numpy())  # type: ignore[arg-type]
        while len(left):
            count = os.preadv(self._file.fileno(), [left], position)
            if not count:
                raise OSError("the file ends early")
            left, position = left[count:], position + count


class TorchCheckpoint:
    """A ``torch.save`` file, through ``weights_only=True``: nothing in it can run code."""

    kind = "torch"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _state_dict(_load_weights_only(path), path)
        self.specs: Mapping[str, TensorSpec] = {
            key: TensorSpec(tuple(t.shape), t.dtype) for key, t in self._tensors.items()
        }

    def fill(self, key: str, start: int, out_n: Tensor) -> None:
        stored = self._tensors[key].detach().reshape(-1)
        out_n.copy_(stored[start : start + len(out_n)])


def read_tensor(checkpoint: Checkpoint, key: str, dtype: torch.dtype | None = None) -> Tensor:
    """One whole tensor on the CPU, in its stored dtype unless another is given."""
    spec = checkpoint.specs[key]
    out_n = torch.empty(math.prod(spec.shape), dtype=dtype or spec.dtype)
    checkpoint.fill(key, 0, out_n)
    return out_n.view(spec.shape)


def open_checkpoint(reference: str | Path) -> Checkpoint:
    """Open by content. Raises :class:`CheckpointError` for missing, damaged or unsafe files."""
    path = locate(str(reference))
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"checkpoint {path}: the file is empty; fetch it again")
    if path.suffix == ".safetensors" or (len(head) == 9 and head[8:9] == b"{"):
        return SafetensorsCheckpoint(path)
    return TorchCheckpoint(path)


def _open(path: Path) -> FileIO:
    """Open for reading; a thousand experts are more files than a process may open by default."""
    file = path.open("rb", buffering=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if file.fileno() > soft - _SPARE_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return file


def _data_starts(path: Path) -> dict[str, int]:
    """Where each tensor's bytes start in a file whose header has been checked."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        key: 8 + length + int(entry["data_offsets"][0])
        for key, entry in header.items()
        if key != "__metadata__"
    }


def _slice_spec(piece: Any) -> TensorSpec:
    return TensorSpec(tuple(piece.get_shape()), SAFETENSORS_DTYPES[piece.get_dtype()])


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _load_weights_only(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(4) == _ZIP_MAGIC
    try:
        with warnings.catch_warnings():  # torch warns of odd pickles before it refuses them
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"checkpoint {path}: {_refusal(str(error))}") from None
    except Exception as error:  # a damaged pickle fails anywhere: struct.error, EOFError, …
        raise CheckpointError(
            f"checkpoint {path}: damaged or not a torch file ({one_line(error)}); fetch it again"
        ) from error


def _refusal(message: str) -> str:
    found = re.search(
        r"(?:GLOBAL|global:?|class|function:?)\s+([A-Za-z_][\w.]*\.\w[\w.]*)", message
    )
    if found or ("Unsupported" in message and "global" in message.lower()):
        what = found.group(1) if found else "a global"
        return (
            f"refused: the pickle wants {what}, and running code from a checkpoint is unsafe; "
            "save its state_dict instead"
        )
    detail = message.rpartition("WeightsUnpickler error:")[2].partition("Check the doc")[0]
    if "Unsupported operand" in detail:  # pickle.dump, not torch.save: what it calls is not known
        return (
            f"refused: a pickle that cannot be read safely ({one_line(ValueError(detail))}); it is "
            "unsafe to run, save its state_dict with torch.save instead"
        )
    return f"damaged or not a torch file ({one_line(ValueError(detail))}); fetch it again"


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"checkpoint {path}: holds a {type(loaded).__name__}, not a state dict (name → tensor)"
        )
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"checkpoint {path}: holds no tensor; expected a state dict")
    return tensors

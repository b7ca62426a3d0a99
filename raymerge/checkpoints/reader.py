"""Open a state dict without reading its tensors: safetensors, or torch files through weights_only.

The kind is detected from the content, not from the name. Tensors come as memory-mapped views where
the format allows it, so opening K checkpoints costs no memory.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from raymerge.errors import CheckpointError

WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_model.bin")
_NESTED = ("state_dict", "model_state_dict")
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

    def read(self, key: str) -> Tensor:
        """One tensor on the CPU in its stored dtype, memory-mapped where possible."""
        ...


class SafetensorsCheckpoint:
    """A ``.safetensors`` file, through its own library."""

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            self.specs: Mapping[str, TensorSpec] = {
                key: _slice_spec(self._file.get_slice(key))
                for key in self._file.keys()  # noqa: SIM118
            }
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {path}: damaged safetensors file ({_reason(error)}); fetch it again"
            ) from error

    def read(self, key: str) -> Tensor:
        try:
            tensor: Tensor = self._file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"checkpoint {self.path}: {key} is damaged ({_reason(error)}); fetch it again"
            ) from error
        return tensor


class TorchCheckpoint:
    """A ``torch.save`` file, through ``weights_only=True``: nothing in it can run code."""

    kind = "torch"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = _state_dict(_load_weights_only(path), path)
        self.specs: Mapping[str, TensorSpec] = {
            key: TensorSpec(tuple(t.shape), t.dtype) for key, t in self._tensors.items()
        }

    def read(self, key: str) -> Tensor:
        return self._tensors[key].detach()


def locate(reference: str) -> Path:
    """The file behind a checkpoint reference: a file, an open_clip folder, or a hub id."""
    if reference.startswith("hf-hub:"):
        return _download(reference.removeprefix("hf-hub:"))
    path = Path(reference.removeprefix("local-dir:"))
    try:
        return _located(path)
    except OSError as error:  # no permission on the way, or too long a name
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error.strerror}") from error


def _located(path: Path) -> Path:
    if path.is_dir():
        for name in WEIGHT_FILES:
            if (path / name).is_file():
                return path / name
        raise CheckpointError(
            f"checkpoint {path}: the folder holds none of {', '.join(WEIGHT_FILES)}"
        )
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    return path


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


def sha256(path: Path) -> str:
    """The file's SHA-256, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def _slice_spec(piece: Any) -> TensorSpec:
    return TensorSpec(tuple(piece.get_shape()), _SAFETENSORS_DTYPES[piece.get_dtype()])


_SAFETENSORS_DTYPES = {
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
            f"checkpoint {path}: damaged or not a torch file ({_reason(error)}); fetch it again"
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
            f"refused: a pickle that cannot be read safely ({_reason(ValueError(detail))}); it is "
            "unsafe to run, save its state_dict with torch.save instead"
        )
    return f"damaged or not a torch file ({_reason(ValueError(detail))}); fetch it again"


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


def _download(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )

    for name in WEIGHT_FILES:
        try:
            return Path(hf_hub_download(repository, name))
        except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(
                error, LocalEntryNotFoundError
            ):
                continue
            raise CheckpointError(
                f"checkpoint hf-hub:{repository}: cannot be fetched ({_reason(error)})"
            ) from error
    raise CheckpointError(
        f"checkpoint hf-hub:{repository}: holds none of {', '.join(WEIGHT_FILES)}"
    )


def _reason(error: BaseException, limit: int = 120) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def read_json(path: Path) -> Any:
    """A JSON file, or a :class:`CheckpointError` in one line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {_reason(error)}") from error

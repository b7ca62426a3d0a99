"""State dicts of any model family, opened together and read part by part.

They are checked to have the same tensors; what is done with the numbers is left to a method.

Legend: K models, R rows (K, and the base last if there is one), n columns of one tensor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from raymerge.errors import CheckpointError, UserError, one_line, unknown_name
from raymerge.files.atomic import exists
from raymerge.files.urls import is_remote
from raymerge.merging.layout import CELL
from raymerge.models.checkpoints import locate
from raymerge.models.checkpoints.checkpoint import (
    SAFETENSORS_DTYPES,
    Checkpoint,
    ViewCheckpoint,
    read_tensor,
)
from raymerge.models.checkpoints.huggingface import (
    HuggingFaceCheckpoint,
    is_huggingface,
    stored_keys,
)
from raymerge.models.checkpoints.locate import split_part
from raymerge.models.checkpoints.lora import LoraCheckpoint
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.opening import open_state_dict as open_file
from raymerge.models.checkpoints.recognise import prefixes_of
from raymerge.models.checkpoints.visual_tower import all_finite, require_finite
from raymerge.models.convert import HuggingFaceView

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HUB_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer*", "model*.safetensors")
_BLOCK_BYTES = 4 << 20  # of all rows: fits into a core's cache
_LEAST_COLUMNS = 8 * CELL
_MOST_HELD = 1 << 22  # entries of a vector that is held as a whole
_SAMPLED = 1 << 18  # entries of a sample, about


def find(reference: str, root: Path) -> str:
    """Return the URL, file or folder of a reference.

    A path is taken from here, as the tools do, else from ``root``; then it may be a model of the
    hub, which is downloaded. Raises :class:`CheckpointError`.
    """
    if is_remote(reference):
        return reference
    place, part = split_part(reference)
    name = place.removeprefix("local-dir:").removeprefix("hf-hub:")
    path = find_local(name, root)
    if path is not None:
        return f"{path}#{part}" if part else path
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and Path(name).suffix not in (
        ".safetensors", ".pt", ".pth", ".bin", ".ckpt",
    ):  # fmt: skip
        return str(_download(name))
    raise CheckpointError(
        f"checkpoint {reference}: no such file or folder, here or in {root}; check the path"
    )


def find_local(name: str, root: Path) -> str | None:
    """Return the absolute path of a file or folder, from here or else from ``root``; or None."""
    path = Path(name).expanduser()
    return next((str(each.absolute()) for each in (path, root / path) if exists(each)), None)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(_HUB_FILES)))
        if not any(folder.glob("model*.safetensors")):
            snapshot_download(repository, allow_patterns=["pytorch_model*"])
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {repository}: no such file or folder, and it cannot be fetched from the "
            f"hub ({one_line(error)}); check the name"
        ) from error
    return folder


def open_state_dict(reference: str) -> Checkpoint:
    """Open a file, or a folder as transformers writes it: one file, or shards with an index."""
    place, part = split_part(reference)
    for name in _WEIGHTS if Path(place).is_dir() else ():
        for file in (Path(place, f"{name}.index.json"), Path(place, name)):
            if file.is_file():
                return open_file(f"{file}#{part}" if part else file)
    return open_file(reference)


def _named_alike(row: Checkpoint, other: Checkpoint) -> Checkpoint:
    """Return a model under the names of another, where a wrapper has put a prefix in front."""
    prefix = next(iter(prefixes_of(row.specs, other.specs)), "")
    if not prefix or row is other:
        return row
    keys = {key.removeprefix(prefix): key for key in row.specs if key.startswith(prefix)}
    return ViewCheckpoint(row.path, row.kind, {name: (row, key) for name, key in keys.items()})


class AdaptedModel(ViewCheckpoint):
    """A Hugging Face CLIP with a LoRA adapter merged into it, under its own names.

    Raises :class:`CheckpointError` if the two do not fit.
    """

    def __init__(self, adapter: str, base: Checkpoint) -> None:
        opened = open_checkpoint(adapter)
        if not isinstance(opened, LoraCheckpoint) or not is_huggingface(base.specs):
            raise CheckpointError(
                f"checkpoint {opened.path}: a LoRA adapter over a Hugging Face CLIP is expected; "
                f"it is {opened.kind}, over {base.path}"
            )
        own = HuggingFaceView(opened.complete(HuggingFaceCheckpoint(base), "visual."))
        stored = (stored_keys(f"visual.{name}") for name in opened.changes)
        changed = {key: (own, key) for each in stored if each is not None for key in each.keys}
        missing = sorted(changed.keys() - base.specs.keys())
        if missing:
            raise CheckpointError(
                f"checkpoint {base.path}: {missing[0]} is not in it, and {opened.path} changes it; "
                "give the adapter's base model"
            )
        super().__init__(
            opened.path, opened.kind, {**{k: (base, k) for k in base.specs}, **changed}
        )
        self.base = base


def files_of(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """Return the files that hold a checkpoint's tensors; of an adapted model the base's first."""
    if isinstance(checkpoint, AdaptedModel):
        return (*files_of(checkpoint.base), checkpoint.path)
    files = locate.files_of(checkpoint.path)
    return tuple(files[1:] or files)  # the shards of an index, without the index


@dataclass(frozen=True)
class Entry:
    """One floating-point tensor of the merge: computed in ``dtype``, written as ``out``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    out: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Part:
    """Columns ``start:stop`` of a tensor, flattened."""

    entry: Entry
    start: int
    stop: int


class Inputs:
    """K models and perhaps a base, checked to have the same names, shapes and buffers.

    The names are those of the models: tensors of the base alone are left out, as in mergekit,
    unless ``base_named``. ``only``: the prefix of the names to merge. ``dtype``: the dtype of the
    merge, by default the widest of the stored ones. ``out``: the written dtype, ``base`` for the
    base's (or the first model's) own, by default that of the merge. Raises
    :class:`CheckpointError`.
    """

    def __init__(
        self,
        models: Sequence[Checkpoint],
        base: Checkpoint | None,
        *,
        dtype: torch.dtype | None = None,
        out: torch.dtype | str | None = None,
        only: str = "",
        base_named: bool = False,
    ) -> None:
        first = models[0] if base is None else base
        self.models, self.base = tuple(_named_alike(each, first) for each in models), base
        self.rows = (*self.models, *([] if base is None else [base]))
        # Names and shapes are compared before anything is read.
        naming = self.rows if base_named else self.models
        names = sorted({key for row in naming for key in row.specs if key.startswith(only)})
        self._require_same(names)
        # Integer tensors must be equal and are copied; the others are merged.
        self.buffers = [name for name in names if not self._floating(name)]
        self._require_equal_buffers()
        self.entries = [
            self._entry(name, dtype, out) for name in names if name not in set(self.buffers)
        ]
        if not self.entries:
            raise CheckpointError(
                f"checkpoint {self.rows[0].path}: holds no floating-point tensor to merge; "
                "name a model's weights"
            )
        merged_names = set(names)
        self.left_out = (
            [] if base is None else sorted(k for k in base.specs if k not in merged_names)
        )

    def _require_same(self, names: Sequence[str]) -> None:
        for row in self.rows:
            missing = [name for name in names if name not in row.specs]
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                other = next(r for r in self.rows if missing[0] in r.specs)
                raise CheckpointError(
                    f"checkpoint {row.path}: {missing[0]}{more} missing, though in {other.path}; "
                    "all models of a merge must have the same tensors"
                )
        first = self.rows[-1]
        for row in self.rows:
            for name in names:
                if row.specs[name].shape != first.specs[name].shape:
                    raise CheckpointError(
                        f"checkpoint {row.path}: {name} has shape {list(row.specs[name].shape)}, "
                        f"but {list(first.specs[name].shape)} in {first.path}; "
                        "merge models of one architecture"
                    )

    def _floating(self, name: str) -> bool:
        return all(row.specs[name].dtype.is_floating_point for row in self.rows)

    def _require_equal_buffers(self) -> None:
        for name in self.buffers:
            first = read_tensor(self.rows[0], name)
            for row in self.rows[1:]:
                if row.specs[name].dtype != first.dtype or not torch.equal(
                    read_tensor(row, name), first
                ):
                    raise CheckpointError(
                        f"checkpoint {row.path}: {name} is not floating point and differs from "
                        f"that of {self.rows[0].path}; it cannot be merged; leave this model out"
                    )

    def _entry(self, name: str, dtype: torch.dtype | None, out: torch.dtype | str | None) -> Entry:
        stored = [row.specs[name].dtype for row in self.rows]
        work = dtype or stored[0]
        for other in stored if dtype is None else ():
            if other != work and 1 in (other.itemsize, work.itemsize):
                raise CheckpointError(
                    f"{name} is {other} in one model and {work} in another; convert one of them"
                )
            work = torch.promote_types(work, other)
        if work.itemsize < 2 or work not in SAFETENSORS_DTYPES.values():
            raise CheckpointError(
                f"checkpoint {self.rows[0].path}: {name} is {_plain(work)}, which cannot be "
                "computed with; set dtype: float32"
            )
        if out == "base":
            out = self.rows[-1 if self.base is not None else 0].specs[name].dtype
        written = out if isinstance(out, torch.dtype) else work
        return Entry(name, self.rows[0].specs[name].shape, work, written)

    # --- reading ---------------------------------------------------------------------------

    def read(self, part: Part) -> Tensor:
        """Return the rows (R, n) of a part. Raises :class:`CheckpointError` for NaN and Inf."""
        out_Rn = torch.empty(len(self.rows), part.stop - part.start, dtype=part.entry.dtype)
        for row, out_n in zip(self.rows, out_Rn, strict=True):
            row.fill(part.entry.name, part.start, out_n)
        if not all_finite(out_Rn):
            self._require_finite(part, out_Rn)
        return out_Rn

    def vector(self, model: int, part: Part) -> Tensor:
        """Return the task vector (n,) of one model: θ − θ₀."""
        assert self.base is not None
        pair_2n = torch.empty(2, part.stop - part.start, dtype=part.entry.dtype)
        for row, out_n in zip((self.base, self.models[model]), pair_2n, strict=True):
            row.fill(part.entry.name, part.start, out_n)
        if not all_finite(pair_2n):
            self.read(part)
        return pair_2n[1] - pair_2n[0]

    def _require_finite(self, part: Part, values_Rn: Tensor) -> None:
        name = part.entry.name
        for row, values_n in zip(self.rows, values_Rn, strict=True):
            stored_n = torch.empty(len(values_n), dtype=row.specs[name].dtype)
            row.fill(name, part.start, stored_n)
            require_finite(stored_n, row, name)
            if not all_finite(values_n):
                raise CheckpointError(
                    f"checkpoint {row.path}: {name} overflows {_plain(part.entry.dtype)}; "
                    "set another dtype"
                )

    def parts(self) -> Iterator[Part]:
        """Yield parts that cover every column once; all rows of a part fit into a core's cache."""
        columns = max(_LEAST_COLUMNS, _BLOCK_BYTES // (4 * max(4, len(self.rows))) // CELL * CELL)
        for entry in self.entries:
            yield from _cut(entry, columns)

    def vectors(self, model: int, entries: Sequence[Entry]) -> Callable[[], Iterator[Tensor]]:
        """Return a function that iterates over the parts of one model's task vector.

        A small vector is read once and held.
        """
        if sum(entry.numel for entry in entries) <= _MOST_HELD:
            vectors = [self.vector(model, Part(e, 0, e.numel)) for e in entries]
            return lambda: iter(vectors)
        parts = [part for entry in entries for part in _cut(entry, _BLOCK_BYTES // 4)]
        return lambda: (self.vector(model, part) for part in parts)

    def sample(self, model: int, entries: Sequence[Entry]) -> Tensor | None:
        """Return entries of that vector taken evenly; None if it is held as a whole."""
        total = sum(entry.numel for entry in entries)
        if total <= _MOST_HELD:
            return None
        every = total // _SAMPLED + 1
        cells = [part for entry in entries for part in _cut(entry, CELL)][::every]
        return torch.cat([self.vector(model, part).float() for part in cells])


def _cut(entry: Entry, columns: int) -> Iterator[Part]:
    for start in range(0, entry.numel, columns):
        yield Part(entry, start, min(start + columns, entry.numel))


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def dtype_named(value: object, key: str) -> torch.dtype | None:
    """Return the dtype of a name such as ``torch.bfloat16``; None for None.

    Raises :class:`UserError` for an unknown name.
    """
    if value is None:
        return None
    dtype = _DTYPES.get(str(value).removeprefix("torch."))
    if dtype is None:
        raise UserError(f"{key}: {unknown_name(value, _DTYPES)}")
    return dtype

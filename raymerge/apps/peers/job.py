"""One merge of raw state dicts: check the output, merge part by part, write the folder.

What is merged, and how, is decided by the reader of the file (mergekit, fusion_bench).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raymerge.apps.peers.methods import Method
from raymerge.apps.peers.state_dicts import Inputs, Part, files_of
from raymerge.errors import CheckpointError, UserError, escape_unprintable
from raymerge.files.atomic import stage_file, write_json, write_text
from raymerge.files.output_folder import OutputFolder, nearest_folder
from raymerge.files.progress import progress_bar
from raymerge.files.threads import parallel_map
from raymerge.models.checkpoints.checkpoint import TensorSpec, read_tensor
from raymerge.models.checkpoints.digests import hash_ahead, remember, sha256
from raymerge.models.checkpoints.locate import read_json
from raymerge.models.checkpoints.safetensors_file import SafetensorsWriter
from raymerge.models.checkpoints.visual_tower import all_finite
from raymerge.runs.model_card import code, plain

WEIGHTS = "model.safetensors"
_MODEL_CARD = """---
{front}---

# {title}

{summary}

Made by raymerge from the {tool} file {config}.

## Files

| file | SHA-256 |
|---|---|
{hashes}
"""
# The files of a transformers model other than its weights.
_CONFIG = "config.json"
_MODEL_FILES = (
    _CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_CARD = "README.md"
_OWN_FILES = (WEIGHTS, _CARD, *_MODEL_FILES)


@dataclass(frozen=True)
class Job:
    """A merge described in another tool's file, checked and ready to run.

    ``summary``: the merge in words, in lines. ``text``: the file, copied to the output folder.
    """

    tool: str
    title: str
    summary: tuple[str, ...]
    inputs: Inputs
    method: Method
    config_name: str
    text: str
    output: str | None = None
    tags: tuple[str, ...] = ()

    # --- plan ------------------------------------------------------------------------------

    @property
    def written_bytes(self) -> int:
        """The size of the merged weights."""
        merged = sum(entry.numel * entry.out.itemsize for entry in self.inputs.entries)
        buffers = [self.inputs.rows[0].specs[name] for name in self.inputs.buffers]
        return merged + sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in buffers)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return {
            "tool": self.tool,
            "method": self.title,
            "understood": list(self.summary),
            "tensors": len(self.inputs.entries) + len(self.inputs.buffers),
            "numbers": sum(entry.numel for entry in self.inputs.entries),
            "written_bytes": self.written_bytes,
        }

    def text_plan(self) -> str:
        """Return the plan as text."""
        numbers = sum(entry.numel for entry in self.inputs.entries)
        tensors = len(self.inputs.entries) + len(self.inputs.buffers)
        written = f"writes  {tensors} tensors, {numbers:,} numbers, {self.written_bytes / 1e6:,.1f}"
        return "\n".join([*self.summary, f"{written} MB; memory of a few tensors"])

    # --- the merge -------------------------------------------------------------------------

    def run(self, output: str | None, *, overwrite: bool = False) -> Path:
        """Write the output folder. Raises :class:`UserError` before anything is written."""
        target = self._output_folder(output, overwrite)
        folder = target.path
        self._model_files()
        print("\n".join(map(escape_unprintable, self.summary)), file=sys.stderr)
        # The weights are complete before anything in the folder is replaced.
        files = sorted({file for row in self.inputs.rows for file in files_of(row)})
        hash_ahead(str(file) for file in files)
        with stage_file(folder / WEIGHTS, nearest_folder(folder)) as (temporary, commit):
            self._merge(temporary)
            target.claim([folder / n for n in _OWN_FILES if (folder / n).exists()])
            write_text(folder / self.config_name, self.text)  # marks the folder
            target.require_own()
            commit()

        # Config and tokenizer, the model card.
        self._copy_model_files(folder)
        card = self._model_card(files)
        target.require_own()
        write_text(folder / _CARD, card)
        target.finish()
        remember()
        return folder

    def _output_folder(self, output: str | None, overwrite: bool) -> OutputFolder:
        name = output or self.output
        if name is None:
            raise UserError("output: missing; name a folder with --output")
        writer = f"a merge of {self.tool}'s files"
        target = OutputFolder(Path(name), [self.config_name], _CARD, writer=writer)
        target.check({"overwrite": overwrite})
        folder = target.path
        if any(file.parent == folder for row in self.inputs.rows for file in files_of(row)):
            raise UserError(f"output {folder}: holds a model that is merged; choose another folder")
        return target

    def _merge(self, path: Path) -> None:
        inputs = self.inputs
        specs = {entry.name: TensorSpec(entry.shape, entry.out) for entry in inputs.entries}
        specs |= {name: inputs.rows[0].specs[name] for name in inputs.buffers}
        merge = self.method.prepare(inputs)  # passes over whole tensors, if it needs any
        with (
            SafetensorsWriter(path, specs) as writer,
            progress_bar("merging", unit="col", total=sum(e.numel for e in inputs.entries)) as bar,
        ):
            # Buffers are equal in all models and are copied.
            for name in inputs.buffers:
                writer.write(name, 0, read_tensor(inputs.rows[0], name))

            # Floating-point tensors are merged part by part, which bounds memory.
            def work(part: Part) -> int:
                merged_n = merge(part, inputs.read(part)).to(part.entry.out)
                if not all_finite(merged_n):
                    raise UserError(
                        f"{part.entry.name}: the merged numbers overflow; use smaller weights or "
                        "another dtype"
                    )
                writer.write(part.entry.name, part.start, merged_n)
                return len(merged_n)

            for columns in parallel_map(work, inputs.parts()):
                bar(columns)

    # --- the folder ------------------------------------------------------------------------

    def _copy_model_files(self, folder: Path) -> None:
        """Copy a transformers model's config and tokenizer from the base, or the first model."""
        for source in self._model_files():
            if source.name == _CONFIG:
                self._copy_config(source, folder / source.name)
            else:
                (folder / source.name).write_bytes(source.read_bytes())

    def _model_files(self) -> list[Path]:
        """Return the files to copy. Raises :class:`CheckpointError` for a damaged config."""
        rows = self.inputs.rows
        weights = files_of(rows[-1] if self.inputs.base is not None else rows[0])[0]
        if not weights.name.startswith(("model", "pytorch_model")):
            return []
        sources = (weights.parent / name for name in _MODEL_FILES)
        found = [source for source in sources if source.is_file()]
        for source in found:
            if source.name == _CONFIG:
                _settings(source)
        return found

    def _copy_config(self, source: Path, target: Path) -> None:
        config = _settings(source)
        written = {entry.out for entry in self.inputs.entries}
        for key in ("torch_dtype", "dtype") if len(written) == 1 else ():
            if key in config:
                config[key] = str(next(iter(written))).removeprefix("torch.")
        write_json(target, config)

    def _model_card(self, files: Sequence[Path]) -> str:
        front = {"tags": ["merge", "model-merging", "raymerge", *self.tags]}
        common = Path(os.path.commonpath([file.parent for file in files]))
        return _MODEL_CARD.format(
            front=yaml.safe_dump(front, sort_keys=False),
            title=plain(self.title),
            summary="\n".join(f"- {plain(line.strip())}" for line in self.summary),
            tool=self.tool,
            config=code(self.config_name),
            hashes="\n".join(
                f"| {code(str(f.relative_to(common)))} | `{sha256(f)}` |" for f in files
            ),
        )


def _settings(source: Path) -> dict[str, Any]:
    """Return a model's ``config.json``. Raises :class:`CheckpointError` where it is no such."""
    settings = read_json(source)
    try:
        json.dumps(settings, allow_nan=False)
        is_sound = isinstance(settings, dict)
    except ValueError:  # NaN, which JSON does not have
        is_sound = False
    if not is_sound:
        raise CheckpointError(f"{source}: is no model's settings; write it again, or remove it")
    return dict(settings)

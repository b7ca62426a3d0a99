"""One merge of raw state dicts, start to end: check, merge part by part, write the folder."""

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
from raymerge.errors import UserError
from raymerge.files.atomic import stage_file, write_json, write_text
from raymerge.files.output_folder import nearest_folder, require_output
from raymerge.files.progress import progress_bar
from raymerge.files.threads import parallel_map
from raymerge.models.checkpoints.checkpoint import TensorSpec, read_tensor
from raymerge.models.checkpoints.digests import hash_ahead, remember, sha256
from raymerge.models.checkpoints.visual_tower import all_finite
from raymerge.models.checkpoints.writer import SafetensorsWriter

WEIGHTS = "model.safetensors"
_CARD = """---
{front}---

# {title}

{told}

Made by raymerge from the {tool} file `{config}`.

## Files

| file | SHA-256 |
|---|---|
{hashes}
"""
# What stands beside a transformers model's weights and is not one of its weights.
_BESIDE = (
    "config.json",
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


@dataclass(frozen=True)
class Job:
    """A merge in another tool's file, understood and checked.

    ``told``: what was understood, a line each. ``text``: the file, kept in the output folder.
    """

    tool: str
    title: str
    told: tuple[str, ...]
    inputs: Inputs
    method: Method
    config_name: str
    text: str
    output: str | None = None
    tags: tuple[str, ...] = ()

    # --- what it takes ---------------------------------------------------------------------

    @property
    def written_bytes(self) -> int:
        merged = sum(entry.numel * entry.out.itemsize for entry in self.inputs.entries)
        kept = [self.inputs.rows[0].specs[name] for name in self.inputs.buffers]
        return merged + sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in kept)

    def to_json(self) -> dict[str, Any]:
        return {
            "tool": self.tool,
            "method": self.title,
            "understood": list(self.told),
            "tensors": len(self.inputs.entries) + len(self.inputs.buffers),
            "numbers": sum(entry.numel for entry in self.inputs.entries),
            "written_bytes": self.written_bytes,
        }

    def text_plan(self) -> str:
        numbers = sum(entry.numel for entry in self.inputs.entries)
        tensors = len(self.inputs.entries) + len(self.inputs.buffers)
        written = f"writes  {tensors} tensors, {numbers:,} numbers, {self.written_bytes / 1e6:,.1f}"
        return "\n".join([*self.told, f"{written} MB; memory of a few tensors"])

    # --- the merge -------------------------------------------------------------------------

    def run(self, output: str | None, *, overwrite: bool = False) -> Path:
        """Write the output folder. Raises :class:`UserError` before anything is written."""
        folder = self._folder(output, overwrite)
        print("\n".join(self.told), file=sys.stderr)
        files = sorted({file for row in self.inputs.rows for file in files_of(row)})
        hash_ahead(str(file) for file in files)
        with stage_file(folder / WEIGHTS, nearest_folder(folder)) as (temporary, commit):
            self._merge(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            commit()
        self._copy_beside(folder)
        write_text(folder / self.config_name, self.text)
        write_text(folder / "README.md", self._card(files))
        remember()
        return folder

    def _folder(self, output: str | None, overwrite: bool) -> Path:
        given = output or self.output
        if given is None:
            raise UserError("output: missing; name a folder with --output")
        folder = Path(given).absolute()
        writer = f"a merge of {self.tool}'s files"
        require_output(folder, [self.config_name], writer=writer, flags={"overwrite": overwrite})
        if any(file.parent == folder for row in self.inputs.rows for file in files_of(row)):
            raise UserError(f"output {folder}: holds a model that is merged; give another folder")
        return folder

    def _merge(self, path: Path) -> None:
        inputs = self.inputs
        specs = {entry.name: TensorSpec(entry.shape, entry.out) for entry in inputs.entries}
        specs |= {name: inputs.rows[0].specs[name] for name in inputs.buffers}
        merge = self.method.prepare(inputs)
        with (
            SafetensorsWriter(path, specs) as writer,
            progress_bar("merging", unit="col", total=sum(e.numel for e in inputs.entries)) as bar,
        ):
            for name in inputs.buffers:
                writer.write(name, 0, read_tensor(inputs.rows[0], name))

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

    def _copy_beside(self, folder: Path) -> None:
        """A transformers model's config and tokenizer, of the base or else the first model."""
        rows = self.inputs.rows
        weights = files_of(rows[-1] if self.inputs.base is not None else rows[0])[0]
        if not weights.name.startswith(("model", "pytorch_model")):
            return
        for name in _BESIDE:
            source = weights.parent / name
            if not source.is_file():
                continue
            if name == "config.json":
                self._copy_config(source, folder / name)
            else:
                (folder / name).write_bytes(source.read_bytes())

    def _copy_config(self, source: Path, target: Path) -> None:
        config = json.loads(source.read_text(encoding="utf-8"))
        written = {entry.out for entry in self.inputs.entries}
        for key in ("torch_dtype", "dtype") if len(written) == 1 else ():
            if key in config:
                config[key] = str(next(iter(written))).removeprefix("torch.")
        write_json(target, config)

    def _card(self, files: Sequence[Path]) -> str:
        front = {"tags": ["merge", "model-merging", "raymerge", *self.tags]}
        common = Path(os.path.commonpath([file.parent for file in files]))
        return _CARD.format(
            front=yaml.safe_dump(front, sort_keys=False),
            title=self.title,
            told="\n".join(f"- {line.strip()}" for line in self.told),
            tool=self.tool,
            config=self.config_name,
            hashes="\n".join(f"| `{f.relative_to(common)}` | `{sha256(f)}` |" for f in files),
        )

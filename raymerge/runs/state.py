"""Run state on disk: λ and the moments, so that ``--resume`` continues as if nothing had happened.

    state/step-00000120/{state.safetensors, manifest.json}   the newest few, checksummed
    state/attempt-0002                                       who may write (fencing)

A state folder appears by one rename, so it is whole or absent; a damaged one is skipped with a word
and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from raymerge.config import Config, FwHard, FwSoft
from raymerge.errors import RunError, UserError
from raymerge.files.atomic import sync
from raymerge.files.attempts import claim_attempt, newest_attempt, numbers
from raymerge.files.urls import redacted_values
from raymerge.merging.optimizer import AdamState

logger = logging.getLogger(__name__)

_STEP = re.compile(r"step-(\d{8,})")
_TENSORS = "state.safetensors"
_MANIFEST = "manifest.json"
_MEMORY = "memory."
_DAMAGE = (ValueError, LookupError, TypeError, RecursionError, SafetensorError)


class StateStore:
    """The ``state/`` folder of one run. ``claim`` before ``save``."""

    def __init__(
        self, folder: Path, fingerprint: str, tasks: Sequence[str], layers: Sequence[str], keep: int
    ) -> None:
        self.folder = folder
        self._identity = {"config": fingerprint, "tasks": list(tasks), "layers": list(layers)}
        self._keep = keep
        self._attempt: int | None = None

    def claim(self) -> None:
        """Take the next attempt number. A driver with a lower one can no longer save."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step-*"):  # by a driver that was killed while it saved
            shutil.rmtree(left, ignore_errors=True)
        if self._attempt is None:
            self._attempt = claim_attempt(self.folder)

    def save(self, state: AdamState) -> None:
        """Write one state atomically and drop all but the newest ``keep``.

        States of later steps are damaged ones that this run went back from: they go as well.

        Raises :class:`RunError` if another driver has claimed this run since, or the disk is full.
        """
        if self._attempt is None:
            raise RuntimeError("save() before claim()")
        newest = newest_attempt(self.folder)
        if newest > self._attempt:
            raise RunError(
                f"{self.folder}: attempt {newest} has taken over this run from attempt "
                f"{self._attempt}; only one driver may write it"
            )
        try:
            self._write(state)
        except OSError as error:
            raise RunError(f"{self.folder}: state not saved: {error.strerror or error}") from error
        steps = self.steps()
        kept = [step for step in steps if step <= state.step][-self._keep :]
        for step in steps:
            if step not in kept:
                shutil.rmtree(self._path(step), ignore_errors=True)

    def newest(self) -> AdamState | None:
        """The newest whole state, or None. Raises :class:`UserError` if it is of another config."""
        for step in sorted(numbers(self.folder, _STEP), reverse=True):
            try:
                return self._read(self._path(step))
            except (OSError, *_DAMAGE) as error:
                logger.warning(
                    "state of step %d is damaged (%s); using the one before", step, error
                )
        return None

    def steps(self) -> list[int]:
        return sorted(numbers(self.folder, _STEP))

    def _write(self, state: AdamState) -> None:
        target = self._path(state.step)
        tensors = {"lambdas": state.lambdas, "mean": state.mean, "square": state.square}
        tensors |= {_MEMORY + name: value for name, value in state.memory.items()}
        # The format takes neither strides nor memory that two tensors share.
        plain = torch.contiguous_format
        payload = save({name: t.clone(memory_format=plain) for name, t in tensors.items()})
        manifest = {
            "step": state.step,
            "attempt": self._attempt,
            "versions": {"raymerge": version("raymerge"), "torch": torch.__version__},
            "sha256": {_TENSORS: hashlib.sha256(payload).hexdigest()},
            **self._identity,
        }
        temporary = Path(tempfile.mkdtemp(prefix=".step-", dir=self.folder))
        try:
            _write_synced(temporary / _TENSORS, payload)
            _write_synced(temporary / _MANIFEST, json.dumps(manifest, indent=2).encode())
            shutil.rmtree(target, ignore_errors=True)  # a damaged one; a sound one is not run again
            temporary.replace(target)
            sync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _read(self, path: Path) -> AdamState:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        payload = (path / _TENSORS).read_bytes()
        if hashlib.sha256(payload).hexdigest() != manifest["sha256"][_TENSORS]:
            raise ValueError("checksum differs")
        if path != self._path(manifest["step"]):
            raise ValueError(f"its manifest is of step {manifest['step']}")
        for key, mine in self._identity.items():
            if manifest[key] != mine:
                raise UserError(
                    f"{path}: was saved by another run (its {key} differ); resume with the config "
                    "that started it, or give another output folder"
                )
        tensors = load(payload)
        shape = (len(self._identity["tasks"]), len(self._identity["layers"]))
        for name in ("lambdas", "mean", "square"):
            if tensors[name].shape != shape or tensors[name].dtype != torch.float64:
                raise ValueError(f"{name} is not {shape} float64")
        memory = {k.removeprefix(_MEMORY): v for k, v in tensors.items() if k.startswith(_MEMORY)}
        return AdamState(
            tensors["lambdas"], tensors["mean"], tensors["square"], manifest["step"], memory
        )

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def fingerprint(config: Config) -> str:
    """SHA-256 of what decides λ at a step: not the cluster, nor the output, nor where the vectors
    lie, nor (at a constant rate) how many steps, or Frank-Wolfe iterations, are asked for."""
    left_out = {"card", "cluster", "output", "state", "finetune", "tracking"}
    data = redacted_values(config.model_dump(mode="json", exclude=left_out))
    if isinstance(config.method, FwHard | FwSoft):
        del data["method"]["iterations"]
    del data["optimizer"]["nonfinite"]  # it stopped at the state that it would have gone on from
    # Soft Frank-Wolfe runs all of the optimizer's steps in every iteration.
    if config.optimizer.schedule == "constant" and not isinstance(config.method, FwSoft):
        del data["optimizer"]["steps"]
    for task in data["tasks"]:
        del task["test"], task["train"]
        if task["head"] is None:  # as before there were saved heads
            del task["head"]
    del data["vectors"]["folder"]
    if config.vectors.dtype != "auto":  # else the place decides the precision
        del data["vectors"]["location"]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _write_synced(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())

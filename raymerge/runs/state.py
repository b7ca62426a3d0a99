"""Saved state of merging and of fine-tuning, from which ``--resume`` continues.

    step-00000120/{state.safetensors, manifest.json}   the newest few, checksummed
    attempt-0002                                       the driver that may write (fencing)

A state is a step and named tensors. Its folder appears by one rename, so it is complete or absent;
a damaged one is skipped with a warning and the one before it is used. Which tensors a state holds
is decided by its owner: :func:`learning_states` for merging, the trainer for fine-tuning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raymerge.config import Config
from raymerge.engine.driver.state import LearningState
from raymerge.errors import RunError, UserError
from raymerge.files.atomic import sync
from raymerge.files.fencing import claim_attempt, newest_attempt, numbers
from raymerge.files.urls import redact_values
from raymerge.merging.registry import method_of
from raymerge.models.checkpoints.digests import file_sha256

logger = logging.getLogger(__name__)

S = TypeVar("S")
SavedTensors = tuple[int, Mapping[str, Tensor]]
"""The step and the named tensors of one state, as they lie on disk."""

_STEP = re.compile(r"step-(\d{8,})")
_TENSORS = "state.safetensors"
_MANIFEST = "manifest.json"
_DAMAGE = (ValueError, LookupError, TypeError, RecursionError, SafetensorError)


class StateStore(Generic[S]):
    """The saved states of one run or of one training target, in ``folder``.

    ``identity``: manifest entries that must agree for a state to be resumed. ``encode`` and
    ``decode`` convert a state to its step and tensors and back; ``decode`` raises ValueError or
    LookupError for tensors that are no such state. ``attempts``: the folder in which attempts are
    claimed, by default ``folder``. Call ``claim`` before ``save``.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        keep: int,
        encode: Callable[[S], SavedTensors],
        decode: Callable[[SavedTensors], S],
        attempts: Path | None = None,
    ) -> None:
        self.folder = folder
        self._identity, self._keep = dict(identity), keep
        self._encode, self._decode = encode, decode
        self._attempts = attempts or folder
        self._attempt: int | None = None

    def claim(self, attempt: int | None = None) -> None:
        """Take the next attempt number, or ``attempt`` if the run has claimed one already.

        A driver with a lower number can no longer save.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step-*"):  # from a driver that was killed in a save
            shutil.rmtree(leftover, ignore_errors=True)
        if self._attempt is None:
            self._attempt = claim_attempt(self._attempts) if attempt is None else attempt

    def save(self, state: S) -> None:
        """Write one state atomically and remove all but the newest ``keep``.

        States of later steps are damaged ones that this run went back from: they are removed too.

        Raises :class:`RunError` if another driver has claimed this run since, or the disk is full.
        """
        if self._attempt is None:
            raise RuntimeError("save() before claim()")
        newest = newest_attempt(self._attempts)
        if newest > self._attempt:
            raise RunError(
                f"{self.folder}: attempt {newest} has taken over this run from attempt "
                f"{self._attempt}; only one driver may write it: give each a folder"
            )
        # The new state is whole before older ones are removed.
        step, tensors = self._encode(state)
        try:
            self._write(step, tensors)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(
                f"{self.folder}: state not saved: {reason}; free space, or choose another folder"
            ) from error
        steps = self.steps()
        last_steps = [each for each in steps if each <= step][-self._keep :]
        for each in set(steps).difference(last_steps):
            shutil.rmtree(self._path(each), ignore_errors=True)

    def newest(self) -> S | None:
        """Return the newest undamaged state, or None.

        Raises :class:`UserError` if it was saved by another run.
        """
        for step in reversed(self.steps()):
            try:
                return self._read(self._path(step))
            except (OSError, *_DAMAGE) as error:
                logger.warning(
                    "%s: state of step %d is damaged (%s); using the one before",
                    self.folder.name, step, error,
                )  # fmt: skip
        return None

    def require_same_run(self) -> None:
        """Raise :class:`UserError` if a state was saved by another run. Reads no tensor."""
        for step in self.steps():
            try:
                self._manifest(self._path(step))
            except (OSError, *_DAMAGE):
                continue  # damaged: ``newest`` logs it

    def steps(self) -> list[int]:
        """Return the steps that have a state, damaged or not, in ascending order."""
        return sorted(numbers(self.folder, _STEP))

    def clear(self) -> None:
        """Remove the folder with every state in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        target = self._path(step)
        temporary = Path(tempfile.mkdtemp(prefix=".step-", dir=self.folder))
        try:
            save_file(dict(tensors), temporary / _TENSORS)
            sync(temporary / _TENSORS)
            manifest = {
                "step": step,
                "attempt": self._attempt,
                "versions": {"raymerge": version("raymerge"), "torch": torch.__version__},
                "sha256": {_TENSORS: file_sha256(temporary / _TENSORS)},
                **self._identity,
            }
            _write_synced(temporary / _MANIFEST, json.dumps(manifest, indent=2).encode())
            shutil.rmtree(target, ignore_errors=True)  # a damaged one: sound steps are not repeated
            temporary.replace(target)
            sync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _read(self, path: Path) -> S:
        manifest = self._manifest(path)
        if file_sha256(path / _TENSORS) != manifest["sha256"][_TENSORS]:
            raise ValueError("checksum differs")
        if path != self._path(manifest["step"]):
            raise ValueError(f"its manifest is of step {manifest['step']}")
        return self._decode((manifest["step"], load_file(path / _TENSORS)))

    def _manifest(self, path: Path) -> dict[str, Any]:
        """Read the manifest. Raises :class:`UserError` if its identity is another run's."""
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        for key, value in self._identity.items():
            if manifest[key] != value:
                raise UserError(
                    f"{path}: was saved by another run (its {key} differs); resume with the config "
                    "and images that started it, or choose another output folder"
                )
        return manifest

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def _write_synced(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


# --- the state of a merge ------------------------------------------------------------------------


def learning_states(
    folder: Path, fingerprint: str, tasks: Sequence[str], layers: Sequence[str], keep: int
) -> StateStore[LearningState]:
    """Return the store of one merge: λ (K, L) and what learning remembers beside it."""
    identity = {"config": fingerprint, "tasks": list(tasks), "layers": list(layers)}
    shape = (len(tasks), len(layers))
    return StateStore(
        folder, identity, keep, _learning_tensors, lambda saved: _learning_state(saved, shape)
    )


def _learning_tensors(state: LearningState) -> SavedTensors:
    # safetensors accepts neither strides nor two tensors that share memory.
    plain = torch.contiguous_format
    tensors = {name: t.clone(memory_format=plain) for name, t in state.tensors().items()}
    return state.step, tensors


def _learning_state(saved: SavedTensors, shape: tuple[int, int]) -> LearningState:
    step, tensors = saved
    for name in ("lambdas", "mean", "square"):
        if tensors[name].shape != shape or tensors[name].dtype != torch.float64:
            raise ValueError(f"{name} is not {shape} float64")
    return LearningState.from_tensors(step, tensors)


def fingerprint(config: Config) -> str:
    """Return the SHA-256 of the settings that decide λ at a step.

    Left out are the cluster, the output, where the task vectors lie and (at a constant learning
    rate) how many steps or Frank-Wolfe iterations are asked for.
    """
    left_out = {"card", "cluster", "output", "state", "finetune", "tracking"}
    data = redact_values(config.model_dump(mode="json", exclude=left_out))
    method = method_of(config.method)
    if method.steps_key.startswith("method."):
        del data["method"][method.steps_key.removeprefix("method.")]
    del data["optimizer"]["nonfinite"]  # a stopped run continues from the state it stopped at
    if config.optimizer.schedule == "constant" and not method.inner_steps:
        del data["optimizer"]["steps"]
    for task in data["tasks"]:
        del task["test"], task["train"]
        if task["head"] is None:  # configs from before saved heads have no such key
            del task["head"]
    del data["vectors"]["folder"]
    if config.vectors.dtype != "auto":  # with auto, the location decides the precision
        del data["vectors"]["location"]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

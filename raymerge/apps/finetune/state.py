"""What ``--resume`` continues from: the weights and the optimiser's moments of one target.

    <target>/step-00000200/{state.safetensors, manifest.json}   the newest two, checksummed
    attempt-0002                                                who may write (fencing)

A state folder appears by one rename, so it is whole or absent; a damaged one is skipped with a word
and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raymerge.errors import RunError, UserError
from raymerge.files.atomic import sync
from raymerge.files.attempts import newest_attempt, numbers

logger = logging.getLogger(__name__)

_KEEP = 2
_HASH_BYTES = 32 << 20
_STEP = re.compile(r"step-(\d{8,})")
_TENSORS = "state.safetensors"
_MANIFEST = "manifest.json"
_DAMAGE = (ValueError, LookupError, TypeError, RecursionError, SafetensorError)


class TrainingStates:
    """The states of one target. ``attempts``: the folder in which attempts are claimed."""

    def __init__(self, folder: Path, fingerprint: str, attempts: Path, attempt: int) -> None:
        self.folder = folder
        self._fingerprint = fingerprint
        self._attempts, self._attempt = attempts, attempt

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one state atomically and drop all but the newest two.

        Raises :class:`RunError` if another run has claimed this output since, or the disk is full.
        """
        newest = newest_attempt(self._attempts)
        if newest > self._attempt:
            raise RunError(
                f"{self.folder}: attempt {newest} has taken over this run from attempt "
                f"{self._attempt}; only one may write it"
            )
        try:
            self._write(step, tensors)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{self.folder}: state not saved: {error}") from error
        kept = [each for each in self.steps() if each <= step][-_KEEP:]
        for each in self.steps():
            if each not in kept:
                shutil.rmtree(self._path(each), ignore_errors=True)

    def newest(self) -> tuple[int, dict[str, Tensor]] | None:
        """The step and the tensors of the newest whole state, or None.

        Raises :class:`UserError` if it is of another config.
        """
        for step in reversed(self.steps()):
            try:
                return step, self._read(self._path(step))
            except (OSError, *_DAMAGE) as error:
                logger.warning(
                    "%s: state of step %d is damaged (%s); using the one before",
                    self.folder.name, step, error,
                )  # fmt: skip
        return None

    def require_same_run(self) -> None:
        """Raise :class:`UserError` if a state is of another config. Reads no tensor."""
        for step in self.steps():
            try:
                manifest = json.loads((self._path(step) / _MANIFEST).read_text(encoding="utf-8"))
                given = manifest["fingerprint"]
            except (OSError, *_DAMAGE):
                continue  # a damaged one; ``newest`` will say so
            self._require_fingerprint(given)

    def steps(self) -> list[int]:
        return sorted(numbers(self.folder, _STEP))

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step-*"):  # by a run that was killed while it saved
            shutil.rmtree(left, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=".step-", dir=self.folder))
        try:
            save_file(dict(tensors), temporary / _TENSORS)
            manifest = {
                "step": step,
                "attempt": self._attempt,
                "fingerprint": self._fingerprint,
                "sha256": {_TENSORS: _sha256(temporary / _TENSORS)},
            }
            (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
            for path in (temporary / _TENSORS, temporary / _MANIFEST):
                sync(path)
            shutil.rmtree(self._path(step), ignore_errors=True)  # a damaged one
            temporary.replace(self._path(step))
            sync(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _read(self, path: Path) -> dict[str, Tensor]:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        self._require_fingerprint(manifest["fingerprint"])
        if _sha256(path / _TENSORS) != manifest["sha256"][_TENSORS]:
            raise ValueError("checksum differs")
        if path != self._path(manifest["step"]):
            raise ValueError(f"its manifest is of step {manifest['step']}")
        return load_file(path / _TENSORS)

    def _require_fingerprint(self, given: object) -> None:
        if given != self._fingerprint:
            raise UserError(
                f"{self.folder}: was saved by a run with another config or other images; resume "
                "with those that started it, or give another output folder"
            )

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()

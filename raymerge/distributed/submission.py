"""Identify a submitted run among a cluster's jobs, and choose the job to follow or to start."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from raymerge.errors import UserError

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables with the address of the dashboard, in order of precedence."""


@dataclass(frozen=True)
class Submission:
    """A merge as a job. ``text``: the config. ``output``: the run's folder on the cluster."""

    text: str
    output: str

    @property
    def name(self) -> str:
        """The name of all jobs of this run, without their numbers; depends on ``output`` only."""
        word = re.sub(r"[^A-Za-z0-9]+", "-", PurePosixPath(self.output).name).strip("-")[:40]
        return "-".join(filter(None, ("raymerge", word, _hash(self.output)[:8])))

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata, which everyone can read who lists the cluster's jobs."""
        return {"raymerge_output": self.output, "raymerge_config": _hash(self.text)}


@dataclass(frozen=True)
class KnownJob:
    """A job of the cluster, running or ended."""

    id: str
    running: bool
    metadata: Mapping[str, str]


def choose(submission: Submission, jobs: Iterable[KnownJob]) -> tuple[str, bool]:
    """Return the id of the run's job, and whether it is running already.

    A running job is followed. Otherwise the id has the next number, and that job resumes the output
    folder. Raises :class:`UserError` if a running job writes the same folder with another config.
    """
    number = 0
    for job in jobs:
        name, _, count = job.id.rpartition("-")
        if name != submission.name or not count.isdigit():
            continue
        if not job.running:
            number = max(number, int(count))
            continue
        if job.metadata.get("raymerge_config") != submission.metadata["raymerge_config"]:
            raise UserError(
                f"output {submission.output}: job {job.id} is writing it with another config; "
                "stop that job, or give another --output"
            )
        return job.id, True
    return f"{submission.name}-{number + 1}", False


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

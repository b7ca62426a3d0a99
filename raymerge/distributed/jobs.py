"""Ray jobs: send a merge to a cluster's dashboard, follow its log, give back its exit code."""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
import re
import shlex
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from raymerge.distributed.submission import ADDRESS_VARIABLES, KnownJob, Submission, choose
from raymerge.errors import RunError, one_line

CONFIG_NAME = "config.yaml"
# --resume in an unused folder starts afresh, so that one command serves the first job and the next.
ENTRYPOINT = shlex.join(["python", "-m", "raymerge", "merge", CONFIG_NAME, "--resume"])
_TALKATIVE = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
_REACH_S = 15.0
_RETRY_S = 1.0
_LOST_S = 60.0
_BROKEN = (OSError, RuntimeError, aiohttp.ClientError)
"""What a connection ends with, by the mood of Ray, requests and aiohttp."""

Log = Callable[[str], None]
"""Takes a line for the user about the job, which is no output of it."""


def submit(address: str, submission: Submission, *, wait: bool, log: Log) -> int:
    """Start the run's job, or find it running; its exit code, or 0 at once without ``wait``.

    The job's output goes to stdout as it comes, or without ``wait`` the job's id. Raises
    :class:`~raymerge.errors.UserError` when another config is at work in the output folder, and
    :class:`RunError` when the cluster cannot be reached or refuses. Ctrl-C leaves the job running.
    """
    with _explained(address):
        client = _connect(address)
        job, found = _start(client, submission)
    log(f"job {job} at {address}: {'is running already' if found else 'submitted'}")
    if not wait:
        print(job)
        return 0
    try:
        with _explained(address):
            return _exit_code(_follow(client, job, address), log)
    except KeyboardInterrupt:
        print(flush=True)  # the log may stand in the middle of a line
        log(
            f"job {job} goes on; the same command follows it again, and "
            f"`ray job stop --address {address} {job}` ends it"
        )
        raise


# --- the cluster ---------------------------------------------------------------------------------


def _connect(address: str) -> Any:
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    _require_answer(address)
    with _without(ADDRESS_VARIABLES):  # which Ray would prefer to the address that it is given
        return JobSubmissionClient(address)


def _require_answer(address: str) -> None:
    """Ray's own client has no time limit: an address without a machine would take minutes."""
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=_REACH_S).close()
    except urllib.error.HTTPError:
        return  # it answers; the client knows what that means
    except http.client.HTTPException as error:
        raise RunError(
            f"{address} does not speak HTTP ({type(error).__name__}); give the URL of the "
            "cluster's dashboard, such as http://HEAD:8265"
        ) from None


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """What goes wrong between here and the dashboard, in one line."""
    try:
        yield
    except AuthenticationError as error:
        raise RunError(
            f"the cluster at {address} asks for its token ({_line(error)}); set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to it"
        ) from None
    except BrokenPipeError:  # of our own stdout
        raise
    except (RuntimeError, ValueError, KeyError) as error:  # no JSON is a ValueError and an OSError
        raise RunError(
            f"the cluster at {address} refuses ({_line(error)}); is this a Ray dashboard, of "
            "about the Ray version that is installed here?"
        ) from None
    except (OSError, aiohttp.ClientError) as error:
        raise RunError(
            f"cannot reach the cluster at {address} ({_line(error)}); is its head running, and "
            "its dashboard's port open or forwarded to this machine?"
        ) from None


def _line(error: Exception) -> str:
    """The first sentence of what is often a page."""
    text = str(getattr(error, "reason", None) or error).strip()
    return re.split(r"\n|\. ", text)[0][:200] or type(error).__name__


# --- one job -------------------------------------------------------------------------------------


def _start(client: Any, submission: Submission) -> tuple[str, bool]:
    """The run's job, started unless it runs already."""
    job, found = choose(submission, _known(client))
    if found:
        return job, True
    with tempfile.TemporaryDirectory(prefix="raymerge-") as folder:
        (Path(folder) / CONFIG_NAME).write_text(submission.text, encoding="utf-8")
        try:
            client.submit_job(
                entrypoint=ENTRYPOINT,
                submission_id=job,
                # Everyone who reaches the API can read this: no environment variables, ever.
                runtime_env={"working_dir": folder},
                metadata=submission.metadata,
            )
        except RuntimeError:
            job, found = choose(submission, _known(client))
            if not found:
                raise
    return job, found  # found: the same command, sent twice at one time


def _known(client: Any) -> list[KnownJob]:
    return [
        KnownJob(job.submission_id, not job.status.is_terminal(), job.metadata or {})
        for job in client.list_jobs()
        if job.submission_id
    ]


def _follow(client: Any, job: str, address: str) -> Any:
    """Print the job's log until it ends; Ray's details of it. A lost connection is tried again."""
    log, lost = _JobOutput(client, job), 0.0
    while True:
        began = time.monotonic()
        try:
            asyncio.run(log.follow())
            details = client.get_job_info(job)
            if details.status.is_terminal():
                return details
            lost = 0.0
        except BrokenPipeError:
            raise
        except _BROKEN as error:
            lost = lost or began
            if time.monotonic() - lost > _LOST_S:
                raise RunError(
                    f"lost the cluster at {address} for {_LOST_S:.0f} s ({_line(error)}); job "
                    f"{job} may go on, and the same command follows it again"
                ) from None
        time.sleep(_RETRY_S)


class _JobOutput:
    """A job's log on stdout, each piece once, however often the connection is made."""

    def __init__(self, client: Any, job: str) -> None:
        self._client, self._job, self._printed = client, job, 0

    async def follow(self) -> None:
        """Print what is new until the job ends; Ray sends the log from its start."""
        position = 0
        async for text in self._client.tail_job_logs(self._job):
            print(text[max(0, self._printed - position) :], end="", flush=True)
            position += len(text)
            self._printed = max(self._printed, position)


def _exit_code(details: Any, log: Log) -> int:
    """The job's own: 130 when it was stopped, 128 + n for signal n, 1 when Ray knows none."""
    job = details.submission_id
    if details.status == JobStatus.SUCCEEDED:
        log(f"job {job} succeeded")
        return 0
    if details.status == JobStatus.STOPPED:
        log(f"job {job} was stopped; the same command resumes it")
        return 130
    code = details.driver_exit_code
    if not code:
        log(f"job {job} failed: {one_line(details.message or 'no message', 300)}")
        return 1
    remedy = "mend its input" if code == 2 else "the same command resumes it"
    log(f"job {job} failed with exit code {code}; {remedy}")
    return int(code) if code > 0 else 128 - int(code)

"""Submit a merge to a cluster as a Ray job, follow its output and return its exit code.

Which job a submission continues is decided in ``submission``.
"""

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
# --resume in an unused folder starts a new run, so that all jobs of a run have the same command.
ENTRYPOINT = shlex.join(["python", "-m", "raymerge", "merge", CONFIG_NAME, "--resume"])
_NOISY_LOGGERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
_CONNECT_TIMEOUT_S = 15.0
_RETRY_S = 1.0
_RECONNECT_TIMEOUT_S = 60.0
_CONNECTION_ERRORS = (OSError, RuntimeError, aiohttp.ClientError)
"""The errors of a lost connection, raised by Ray, requests and aiohttp."""

Log = Callable[[str], None]
"""Receives one line for the user about the job, as opposed to the job's own output."""


def submit(address: str, submission: Submission, *, wait: bool, log: Log) -> int:
    """Start the run's job, or follow it if it is running; returns its exit code.

    Prints the job's output as it comes; without ``wait``, prints the job's id and returns 0 at
    once. Raises :class:`~raymerge.errors.UserError` if a running job writes the output folder with
    another config, and :class:`RunError` if the cluster is unreachable or refuses the job. Ctrl-C
    leaves the job running.
    """
    with _explain_errors(address):
        client = _connect(address)
        job, is_running = _start(client, submission)
    log(f"job {job} at {address}: {'is running already' if is_running else 'submitted'}")
    if not wait:
        print(job)
        return 0
    try:
        with _explain_errors(address):
            return _exit_code(_follow(client, job, address), log)
    except KeyboardInterrupt:
        print(flush=True)  # the output may have stopped in the middle of a line
        log(
            f"job {job} keeps running; the same command follows it again, and "
            f"`ray job stop --address {address} {job}` ends it"
        )
        raise


# --- the cluster ---------------------------------------------------------------------------------


def _connect(address: str) -> Any:
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    _require_answer(address)
    with _unset(ADDRESS_VARIABLES):  # Ray would prefer them to its argument
        return JobSubmissionClient(address)


def _require_answer(address: str) -> None:
    """Check that the address answers, because Ray's own client has no time limit."""
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=_CONNECT_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answers, and the client interprets the status
    except http.client.HTTPException as error:
        raise RunError(
            f"{address} does not speak HTTP ({type(error).__name__}); give the URL of the "
            "cluster's dashboard, such as http://HEAD:8265"
        ) from None


@contextmanager
def _unset(names: tuple[str, ...]) -> Iterator[None]:
    values = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(values)


@contextmanager
def _explain_errors(address: str) -> Iterator[None]:
    """Turn errors of the connection to the dashboard into errors of one line."""
    try:
        yield
    except AuthenticationError as error:
        raise RunError(
            f"the cluster at {address} asks for its token ({_sentence(error)}); set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to it"
        ) from None
    except BrokenPipeError:  # our own stdout was closed
        raise
    # Before OSError, because invalid JSON is a ValueError and an OSError.
    except (RuntimeError, ValueError, KeyError) as error:
        raise RunError(
            f"the cluster at {address} refuses ({_sentence(error)}); is this a Ray dashboard, of "
            "about the Ray version that is installed here?"
        ) from None
    except (OSError, aiohttp.ClientError) as error:
        raise RunError(
            f"cannot reach the cluster at {address} ({_sentence(error)}); is its head running, and "
            "its dashboard's port open or forwarded to this machine?"
        ) from None


def _sentence(error: Exception) -> str:
    """Return the first sentence of an error, whose text may fill a page."""
    text = str(getattr(error, "reason", None) or error).strip()
    return re.split(r"\n|\. ", text)[0][:200] or type(error).__name__


# --- one job -------------------------------------------------------------------------------------


def _start(client: Any, submission: Submission) -> tuple[str, bool]:
    """Return the id of the run's job and whether it was running; start it if not."""
    job, is_running = choose(submission, _list_jobs(client))
    if is_running:
        return job, True
    with tempfile.TemporaryDirectory(prefix="raymerge-") as folder:
        (Path(folder) / CONFIG_NAME).write_text(submission.text, encoding="utf-8")
        try:
            client.submit_job(
                entrypoint=ENTRYPOINT,
                submission_id=job,
                # Everyone who reaches the API can read this: never pass environment variables.
                runtime_env={"working_dir": folder},
                metadata=submission.metadata,
            )
        except RuntimeError:
            job, is_running = choose(submission, _list_jobs(client))
            if not is_running:
                raise
    return job, is_running  # it is if the same command was sent twice at the same time


def _list_jobs(client: Any) -> list[KnownJob]:
    return [
        KnownJob(job.submission_id, not job.status.is_terminal(), job.metadata or {})
        for job in client.list_jobs()
        if job.submission_id
    ]


def _follow(client: Any, job: str, address: str) -> Any:
    """Print the job's output until it ends; returns Ray's details of it. Reconnects if needed."""
    output, lost_at = _JobOutput(client, job), 0.0
    while True:
        began = time.monotonic()
        try:
            asyncio.run(output.follow())
            details = client.get_job_info(job)
            if details.status.is_terminal():
                return details
            lost_at = 0.0
        except BrokenPipeError:
            raise
        except _CONNECTION_ERRORS as error:
            lost_at = lost_at or began
            if time.monotonic() - lost_at > _RECONNECT_TIMEOUT_S:
                raise RunError(
                    f"lost the cluster at {address} for {_RECONNECT_TIMEOUT_S:.0f} s "
                    f"({_sentence(error)}); job {job} may still be running: run the same command "
                    "to follow it again"
                ) from None
        time.sleep(_RETRY_S)


class _JobOutput:
    """Prints a job's output once, however often the connection is made."""

    def __init__(self, client: Any, job: str) -> None:
        self._client, self._job, self._printed = client, job, 0

    async def follow(self) -> None:
        """Print what is new until the job ends; each connection sends the output from its start."""
        position = 0
        async for text in self._client.tail_job_logs(self._job):
            print(text[max(0, self._printed - position) :], end="", flush=True)
            position += len(text)
            self._printed = max(self._printed, position)


def _exit_code(details: Any, log: Log) -> int:
    """Return the job's exit code: 130 if stopped, 128 + n for signal n, 1 if Ray has none."""
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
    remedy = "fix its input" if code == 2 else "the same command resumes it"
    log(f"job {job} failed with exit code {code}; {remedy}")
    return int(code) if code > 0 else 128 - int(code)

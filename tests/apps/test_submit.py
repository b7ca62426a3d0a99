"""`raymerge submit` before and around the job: the config sent, refused input, the job's number.

The job itself, on a real cluster: distributed/test_job.py.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Commands, refused, tree, write_config

from raymerge.apps import submit
from raymerge.apps.submit import dashboard_address, prepare
from raymerge.config import load_config
from raymerge.distributed.submission import KnownJob, Submission, choose
from raymerge.errors import RunError, UserError

HEAD = "http://head:8265"
SUBMISSION = Submission("seed: 1\n", "/shared/runs/my merge!")


def _config(**changes: Any) -> dict[str, Any]:
    """Return a config of files that only the cluster has."""
    task = {"classnames": ["cat", "dog"], "adapt": "/shared/data/pets"}
    data = {
        "model": "local-dir:/shared/pretrained",
        "tasks": [
            {"name": "pets", "checkpoint": "/shared/experts/pets.pt", **task},
            {"name": "farm", "checkpoint": "s3://bucket/farm.pt", **task},
        ],
        "output": "/shared/runs/merged",
    }
    return {**data, **changes}


@pytest.fixture
def raymerge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return Commands(capsys)


# --- what travels --------------------------------------------------------------------------------


def test_the_resolved_config_is_sent_and_reads_back_as_the_config(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    data = _config(preset="fast", cluster={"workers": 2, "address": "10.0.0.1:6379"})
    data["tasks"][0]["classnames"] = "names.txt"
    path = write_config(tmp_path / "merge.yaml", data)
    sent = prepare(path, ["seed=7"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.yaml").write_text(sent.text)
    here = load_config(path, ["seed=7"])
    cluster = here.cluster.model_copy(update={"address": None})  # the job is where it was sent
    assert load_config(elsewhere / "config.yaml") == here.model_copy(update={"cluster": cluster})
    assert here.seed == 7
    assert here.optimizer.steps == 50
    assert sent.output == "/shared/runs/merged"


RELATIVE = {
    "model": ({"model": "local-dir:pretrained"}, "model.arch: local-dir:pretrained"),
    "pretrained": (
        {"model": {"arch": "ViT-B-32", "pretrained": "x/vit.pt"}},
        "model.pretrained: x/vit.pt",
    ),
    "output": ({"output": "runs/merged"}, "output: runs/merged"),
    "vectors": ({"vectors": {"folder": "../spill"}}, "vectors.folder: ../spill"),
    "checkpoint": (
        {"tasks": [{"name": "a", "checkpoint": "experts/a.pt"}]},
        "tasks[0].checkpoint: experts/a.pt",
    ),
    "data": (
        {"tasks": [{**_config()["tasks"][0], "adapt": "data/{000..003}.tar?limit=5"}]},
        "tasks[0].adapt: data/{000..003}.tar?limit=5",
    ),
    "root": (
        {"tasks": [{**_config()["tasks"][0], "adapt": "torchvision:MNIST:train?root=a b/é"}]},
        "tasks[0].adapt: torchvision:MNIST:train?root=a b/%C3%A9",
    ),
}


@pytest.mark.parametrize("case", RELATIVE)
def test_a_relative_reference_is_refused_by_its_key_and_word(case: str, tmp_path: Path) -> None:
    changes, told = RELATIVE[case]
    folder = tmp_path / "über & over"
    folder.mkdir()
    path = write_config(folder / "merge.yaml", _config(**changes))
    with pytest.raises(UserError) as caught:
        prepare(path)
    assert f"config {path}: {told} starts from a folder of this machine; " in str(caught.value)
    assert "--root" in str(caught.value)


@pytest.mark.parametrize("case", RELATIVE)
def test_with_a_root_relative_references_start_there(case: str, tmp_path: Path) -> None:
    path = write_config(tmp_path / "merge.yaml", _config(**RELATIVE[case][0]))
    there = tmp_path / "on" / "the cluster"
    there.mkdir(parents=True)
    expected = load_config(write_config(there / "merge.yaml", _config(**RELATIVE[case][0])))
    (tmp_path / "sent.yaml").write_text(prepare(path, root=str(there)).text)
    assert load_config(tmp_path / "sent.yaml") == expected


def test_an_absolute_path_below_the_configs_own_folder_is_allowed(tmp_path: Path) -> None:
    path = write_config(tmp_path / "merge.yaml", _config(output=str(tmp_path / "merged")))
    assert prepare(path).output == str(tmp_path / "merged")


def test_the_output_option_overrides_and_starts_from_the_root(tmp_path: Path) -> None:
    path = write_config(tmp_path / "merge.yaml", _config())
    assert prepare(path, output="/other").output == "/other"
    assert prepare(path, root="/shared", output="/other/").output == "/other"
    sent = prepare(path, root="/shared", output="runs/x")
    assert sent.output == yaml.safe_load(sent.text)["output"] == "/shared/runs/x"


# --- what is refused, before anything is sent ----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "argv", "mentions"),
    [
        ({"optimzer": {}}, (), ("optimzer: unknown key; did you mean optimizer?",)),
        ({"output": None}, (), ("output: missing", "--output")),
        ({}, ("--output", "runs/x"), ("output runs/x: is relative", "absolute path")),
        ({}, ("--output", "s3://bucket/x"), ("output s3://bucket/x: is a URL", "mounted")),
        ({}, ("--root", "shared"), ("--root shared: is relative",)),
        ({}, ("-o", "seed"), ("override 'seed': write it as key.path=value",)),
        (
            {"model": "https://me:s3cr3t@host/vit"},
            (),
            ("model.arch: https://host/vit has a password or a signature", "on the nodes"),
        ),
        (
            {"tasks": [{"name": "a", "checkpoint": "https://host/a.pt?X-Amz-Signature=s3cr3t"}]},
            (),
            ("tasks[0].checkpoint: https://host/a.pt has a password or a signature",),
        ),
        ({"merge_method": "linear", "models": []}, (), ("merge.yaml",)),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    changes: dict[str, Any],
    argv: Sequence[str],
    mentions: Sequence[str],
    raymerge: Commands,
    tmp_path: Path,
) -> None:
    path = write_config(tmp_path / "merge.yaml", _config(**changes))
    before = tree(tmp_path)
    ran = raymerge("submit", path, "--address", HEAD, *argv)
    refused(ran, *mentions)
    assert "s3cr3t" not in ran.err
    assert tree(tmp_path) == before


def test_another_tools_config_is_refused_with_the_way_to_run_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import ones

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"w": ones(2)}, tmp_path / name / "model.safetensors")
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("a", "b")]
    path = write_config(tmp_path / "m.yaml", {"merge_method": "linear", "models": models})
    with pytest.raises(UserError, match=r"is another tool's file, .*; use `ray job submit"):
        prepare(path)


def test_a_config_too_large_for_ray_is_refused_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _config()
    data["tasks"][1]["classnames"] = [letter * 100_000 for letter in "abcde"]
    path = write_config(tmp_path / "merge.yaml", data)
    size = len(prepare(path).text)
    monkeypatch.setattr(submit, "_UPLOAD_BYTES", size)
    assert prepare(path).text
    monkeypatch.setattr(submit, "_UPLOAD_BYTES", size - 1)
    with pytest.raises(UserError) as caught:
        prepare(path)
    assert f"it has {size / 2**20:.1f} MiB" in str(caught.value)
    assert re.search(r"templates of farm \(0\.5 MiB\), pets \(0\.0 MiB\)", str(caught.value))


@pytest.mark.parametrize(
    ("address", "mentions"),
    [
        (None, ("--address: missing", "http://HEAD:8265", "RAY_ADDRESS")),
        ("head:6379", ("address head:6379: is not a dashboard's URL",)),
        ("ray://head:10001", ("address ray://head:10001: is not a dashboard's URL",)),
        ("http://", ("is not a dashboard's URL",)),
    ],
)
def test_an_address_that_accepts_no_jobs_is_refused(
    address: str | None, mentions: Sequence[str], raymerge: Commands, tmp_path: Path
) -> None:
    path = write_config(tmp_path / "merge.yaml", _config())
    argv = () if address is None else ("--address", address)
    refused(raymerge("submit", path, *argv), *mentions)


def test_the_address_option_overrides_rays_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"{HEAD}/")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert dashboard_address(None) == HEAD
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://proxy")
    assert dashboard_address(None) == "https://proxy"
    assert dashboard_address("http://mine:1/") == "http://mine:1"


# --- which job it is -----------------------------------------------------------------------------


def _job(number: int, running: bool, submission: Submission = SUBMISSION) -> KnownJob:
    return KnownJob(f"{submission.name}-{number}", running, submission.metadata)


def test_a_run_is_identified_by_its_folder() -> None:
    assert re.fullmatch(r"raymerge-my-merge-[0-9a-f]{8}", SUBMISSION.name)
    assert SUBMISSION.name == Submission("seed: 2\n", SUBMISSION.output).name
    assert SUBMISSION.name != Submission(SUBMISSION.text, "/other/runs/my merge!").name
    assert re.fullmatch(r"raymerge-[0-9a-f]{8}", Submission("", "/é").name)


def test_the_first_job_is_number_1_and_ended_ones_count() -> None:
    other = Submission(SUBMISSION.text, "/other/runs/my merge!")
    assert choose(SUBMISSION, [_job(7, True, other)]) == (f"{SUBMISSION.name}-1", False)
    ended = [_job(10, False), _job(2, False), KnownJob(f"{SUBMISSION.name}-mine", True, {})]
    assert choose(SUBMISSION, ended) == (f"{SUBMISSION.name}-11", False)


def test_a_job_that_has_not_ended_is_followed() -> None:
    assert choose(SUBMISSION, [_job(1, False), _job(2, True)]) == (f"{SUBMISSION.name}-2", True)


def test_another_config_in_a_folder_that_is_being_written_is_refused() -> None:
    changed = Submission("seed: 2\n", SUBMISSION.output)
    with pytest.raises(UserError, match=r"job .*-3 is writing it with another config; stop"):
        choose(changed, [_job(3, True)])
    assert choose(changed, [_job(3, False)]) == (f"{SUBMISSION.name}-4", False)


# --- around the job: a dashboard that is none, connections that break ----------------------------


@contextmanager
def _server(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (404, b"", "refuses (Version check returned 404)"),
        (200, b"<html>", "refuses (Expecting value"),
        (
            200,
            b'{"ray_version": "1.13.0"}',
            "refuses (Ray version 1.13.0 is running on the cluster)",
        ),
        (500, b"", "(500 Server Error"),
        (401, b"Unauthorized", "asks for its token (Authentication required: Unauthorized)"),
        (403, b"Forbidden", "asks for its token (Authentication failed: Forbidden)"),
    ],
)
def test_an_address_that_is_no_ray_dashboard_is_one_line(
    status: int, body: bytes, told: str, raymerge: Commands, tmp_path: Path
) -> None:
    path = write_config(tmp_path / "merge.yaml", _config())
    with _server(status, body) as address:
        ran = raymerge("submit", path, "--address", address)
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1), ran.err
    assert ran.err.startswith("raymerge: error: ")
    assert f"cluster at {address} " in ran.err
    assert told in ran.err


def test_an_address_without_a_server_is_one_line(raymerge: Commands, tmp_path: Path) -> None:
    path = write_config(tmp_path / "merge.yaml", _config())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        ran = raymerge("submit", path, "--address", address)
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1), ran.err
    assert f"cannot reach the cluster at {address} ([Errno 111] Connection refused)" in ran.err


@dataclass
class _Details:
    submission_id: str
    status: Any
    driver_exit_code: int | None = None
    message: str = ""
    metadata: dict[str, str] | None = None


@dataclass
class _Client:
    """A stand-in for Ray's client for one job. ``tails``: each connection's output or error."""

    tails: list[list[str | BaseException]] = field(default_factory=list)
    jobs: list[_Details] = field(default_factory=list)
    refuses: Exception | None = None
    sent: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for piece in self.tails.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def get_job_info(self, job: str) -> _Details:
        return self.jobs[-1]

    def list_jobs(self) -> list[_Details]:
        return self.jobs

    def submit_job(self, **given: Any) -> None:
        self.sent = given
        folder = Path(given["runtime_env"]["working_dir"])
        self.files = {path.name: path.read_text() for path in folder.iterdir()}
        status = _status("SUCCEEDED" if self.refuses is None else "RUNNING")
        self.jobs.append(_Details(given["submission_id"], status, 0, "", given["metadata"]))
        if self.refuses is not None:
            raise self.refuses


def _status(name: str) -> Any:
    from ray.job_submission import JobStatus

    return JobStatus(name)


class _Run:
    """Runs `submit` with a stand-in for Ray's client; ``log`` holds what it logs of the job."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.log: list[str] = []

    def __call__(self, client: _Client, wait: bool = True) -> int:
        from raymerge.distributed import jobs

        self._monkeypatch.setattr(jobs, "_connect", lambda address: client)
        return jobs.submit(HEAD, SUBMISSION, wait=wait, log=self.log.append)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> _Run:
    from raymerge.distributed import jobs

    monkeypatch.setattr(jobs, "_RETRY_S", 0.0)
    return _Run(monkeypatch)


def test_nothing_but_the_config_is_sent(run: _Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cr3t")
    client = _Client(tails=[[]])
    assert run(client) == 0
    assert client.files == {"config.yaml": SUBMISSION.text}
    assert set(client.sent["runtime_env"]) == {"working_dir"}
    assert client.sent["entrypoint"] == "python -m raymerge merge config.yaml --resume"
    assert "s3cr3t" not in json.dumps(client.sent)
    assert not Path(client.sent["runtime_env"]["working_dir"]).exists()


def test_a_broken_connection_is_reopened_and_prints_nothing_twice(
    run: _Run, capsys: pytest.CaptureFixture[str]
) -> None:
    client = _Client(
        tails=[
            ["one\n", "tw", RuntimeError("WebSocket closed")],
            [ConnectionResetError()],
            ["one\ntwo\n", "three\n"],
        ]
    )
    assert run(client) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_cluster_that_does_not_come_back_is_an_error(
    run: _Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raymerge.distributed import jobs

    monkeypatch.setattr(jobs, "_RECONNECT_TIMEOUT_S", 0.0)
    with pytest.raises(RunError, match=r"lost the cluster .* may still be running: run the same"):
        run(_Client(tails=[[OSError("no route")]]))


def test_a_closed_stdout_is_not_a_lost_cluster(run: _Run) -> None:
    with pytest.raises(BrokenPipeError):
        run(_Client(tails=[[BrokenPipeError()]]))


@pytest.mark.parametrize(
    ("status", "driver", "code", "told"),
    [
        ("SUCCEEDED", 0, 0, "succeeded"),
        ("FAILED", 1, 1, "failed with exit code 1; the same command resumes it"),
        ("FAILED", 2, 2, "failed with exit code 2; fix its input"),
        ("FAILED", -9, 137, "failed with exit code -9; the same command resumes it"),
        ("FAILED", None, 1, "failed: its node died"),
        ("STOPPED", None, 130, "was stopped; the same command resumes it"),
    ],
)
def test_the_exit_code_is_the_jobs(
    status: str, driver: int | None, code: int, told: str, run: _Run
) -> None:
    client = _Client(tails=[[]])
    client.jobs = [_Details("-", _status("STOPPED"))]
    ended = _Details(f"{SUBMISSION.name}-1", _status(status), driver, "its node\ndied")
    client.get_job_info = lambda job: ended  # type: ignore[method-assign]
    job = ended.submission_id
    assert run(client) == code
    assert run.log == [f"job {job} at {HEAD}: submitted", f"job {job} {told}"]


def test_the_same_command_sent_twice_at_one_time_is_one_job(run: _Run) -> None:
    client = _Client(refuses=RuntimeError("already exists"))
    job = f"{SUBMISSION.name}-1"
    assert run(client, wait=False) == 0
    assert run.log == [f"job {job} at {HEAD}: is running already"]


def test_a_refused_job_is_an_error(run: _Run) -> None:
    client = _Client(refuses=RuntimeError("Request failed with status code 500. More."))
    client.list_jobs = lambda: []  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"refuses \(Request failed with status code 500\)"):
        run(client)


def test_ctrl_c_leaves_the_job_running_and_prints_how_to_stop_it(run: _Run) -> None:
    job = f"{SUBMISSION.name}-1"
    with pytest.raises(KeyboardInterrupt):
        run(_Client(tails=[["one\n", KeyboardInterrupt()]]))
    assert run.log[-1] == (
        f"job {job} keeps running; the same command follows it again, and "
        f"`ray job stop --address {HEAD} {job}` ends it"
    )


def test_rays_own_variables_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    from raymerge.distributed import jobs

    monkeypatch.setenv("RAY_ADDRESS", "http://other:1")
    with _server(200, b'{"ray_version": "2.60.0"}') as address:
        client = jobs._connect(address)
    assert client.get_address() == address
    assert os.environ["RAY_ADDRESS"] == "http://other:1"

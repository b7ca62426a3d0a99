"""Real protocols against servers on this machine: S3 (moto) and HTTP, with and without ranges."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from world import World, write_image

from raymerge.errors import RemoteError
from raymerge.files import download, remote
from raymerge.files.atomic import cache_folder
from raymerge.files.remote import fetch, fetch_folder

CONTENT = os.urandom(50_000)
CONFIG = {"model_cfg": {}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_WAIT_S", 0.0)
    monkeypatch.setattr(download, "_CHUNK_BYTES", 10_000)
    return tmp_path / "cache" / "remote"


# --- S3 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "testing"),
            ("AWS_SECRET_ACCESS_KEY", "testing"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_CONFIG_FILE", os.devnull),
            ("AWS_SHARED_CREDENTIALS_FILE", os.devnull),
        ):
            patch.setenv(name, value)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str) -> Iterator[Any]:
    import boto3

    bucket = boto3.resource("s3", endpoint_url=endpoint).Bucket(f"b{uuid.uuid4().hex}")
    bucket.create()
    yield bucket
    bucket.objects.all().delete()


def test_a_file_of_s3(bucket: Any) -> None:
    bucket.put_object(Key="x/expert.pt", Body=CONTENT)
    url = f"s3://{bucket.name}/x/expert.pt"
    path = fetch(url)
    assert (path.name, path.read_bytes()) == ("expert.pt", CONTENT)
    bucket.put_object(Key="x/expert.pt", Body=CONTENT[::-1])
    assert fetch(url).read_bytes() == CONTENT[::-1]


def test_its_tag_is_checked(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put_object(Key="a.pt", Body=CONTENT)
    plain = download._chunks
    damaged = iter([b"damaged!"])

    def chunks(file: Any, start: int) -> Iterator[bytes]:
        assert list(file.checksums) == ["md5"]
        for chunk in plain(file, start):
            yield next(damaged, chunk[:8]) + chunk[8:]

    monkeypatch.setattr(download, "_chunks", chunks)
    assert fetch(f"s3://{bucket.name}/a.pt").read_bytes() == CONTENT


def test_what_s3_does_not_have(bucket: Any) -> None:
    with pytest.raises(RemoteError, match=rf"^s3://{bucket.name}/no.pt: no such file or folder$"):
        fetch(f"s3://{bucket.name}/no.pt")
    with pytest.raises(RemoteError, match=r"^s3://no-such-bucket/a: no such file or folder$"):
        fetch("s3://no-such-bucket/a")


def test_a_folder_of_s3(bucket: Any) -> None:
    bucket.put_object(Key="data/", Body=b"")  # as consoles mark a folder
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        bucket.put_object(Key=f"data/{name}", Body=name.encode())
    folder = fetch_folder(f"s3://{bucket.name}/data/")
    found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.png")}
    assert found == {name: name for name in ("a/1.png", "a/2.png", "b/3.png")}


def test_inspecting_s3(bucket: Any, capsys: pytest.CaptureFixture[str], world: World) -> None:
    from raymerge.cli import main

    expert = Path(world.config["tasks"][0]["checkpoint"])
    bucket.upload_file(str(expert), "colour.safetensors")
    assert main(["inspect", f"s3://{bucket.name}/colour.safetensors"]) == 0
    assert "ViT, width 64" in capsys.readouterr().out
    assert main(["inspect", f"s3://{bucket.name}/other.safetensors"]) == 2
    assert capsys.readouterr().err == (
        f"raymerge: error: checkpoint s3://{bucket.name}/other.safetensors: no such file or "
        "folder\n"
    )


# --- HTTP ----------------------------------------------------------------------------------------


class _Plain(http.server.SimpleHTTPRequestHandler):
    """Whole files, with Last-Modified; knows no ranges, and does not say so."""

    closed: tuple[str, ...] = ()

    def send_head(self) -> Any:
        if self.path.startswith("/closed"):
            self.send_error(403)
            return None
        return super().send_head()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    pytest.importorskip("aiohttp")
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(_Plain, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_without_ranges(site: tuple[Path, str]) -> None:
    folder, address = site
    (folder / "a.pt").write_bytes(CONTENT)
    assert fetch(f"{address}/a.pt").read_bytes() == CONTENT
    (folder / "a.pt").write_bytes(CONTENT[::-1])
    os.utime(folder / "a.pt", (1, 1))
    assert fetch(f"{address}/a.pt?token=t").read_bytes() == CONTENT[::-1]


class _Flood(http.server.BaseHTTPRequestHandler):
    """Sends far more than is asked for, or than it has announced, or without an end."""

    protocol_version = "HTTP/1.1"
    sent = 0
    announced = 10_000_000

    def _head(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_HEAD(self) -> None:
        if "unsized" in self.path:
            return self._head(200, Connection="close")
        return self._head(200, Content_Length=str(self.announced), Last_Modified="then")

    def do_GET(self) -> None:
        if "range" in self.path:
            self._head(206, Content_Range=f"bytes 0-99/{self.announced}", Connection="close")
        elif "page" in self.path:
            self._head(200, Content_Type="text/html", Connection="close")
        else:
            self._head(200, Connection="close")
        self.close_connection = True
        block = b"0" * (1 << 20)
        with contextlib.suppress(OSError):
            for _ in range(1 << 10):
                self.wfile.write(block)
                type(self).sent += len(block)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def flood(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    _Flood.sent = 0
    monkeypatch.setattr(download, "_WAIT_S", 0.0)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Flood)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def _partials() -> list[Path]:
    folder = cache_folder() / "remote" / "partial"
    return list(folder.iterdir()) if folder.exists() else []


def test_a_range_is_answered_with_gigabytes(flood: str, tmp_path: Path) -> None:
    """The client reads no more than it asked for, and keeps nothing that cannot be continued."""
    with pytest.raises(RemoteError, match="more came than the 10,000 bytes that were asked"):
        fetch(f"{flood}/range/a.pt")
    with pytest.raises(RemoteError, match="more came than the 8 bytes that were asked for"):
        remote.outline(f"{flood}/range/a.safetensors", tmp_path)
    assert _Flood.sent < 200 << 20
    assert sum(path.stat().st_size for path in _partials()) == 0


def test_a_body_without_an_end_is_refused_and_removed(
    flood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_MOST_UNSIZED_BYTES", 20 << 20)
    with pytest.raises(RemoteError, match="sent over 20,971,520 bytes without saying how many"):
        fetch(f"{flood}/unsized/a.pt")
    assert _Flood.sent < 100 << 20
    assert not _partials()


def test_a_body_longer_than_announced_is_refused_and_removed(flood: str) -> None:
    with pytest.raises(RemoteError, match=r"[\d,]+ bytes came instead of 10,000,000"):
        fetch(f"{flood}/a.pt")
    assert not _partials()


def test_a_list_of_files_without_an_end_is_refused(flood: str) -> None:
    with pytest.raises(RemoteError, match="/page/: no such folder, or it is empty"):
        fetch_folder(f"{flood}/page/")
    assert _Flood.sent < 300 << 20


def test_what_a_server_refuses(site: tuple[Path, str]) -> None:
    _, address = site
    with pytest.raises(RemoteError, match=r"/a\.pt: no such file or folder$"):
        fetch(f"{address}/a.pt?token=t0k3n")
    with pytest.raises(RemoteError, match=r"/closed/a\.pt: no access; check the credentials"):
        fetch(f"{address}/closed/a.pt?token=t0k3n")


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(
        RemoteError, match=r"^http://127.0.0.1:9/a.pt: the server cannot be reached"
    ):
        fetch("http://me:hunter2@127.0.0.1:9/a.pt")


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def remote_world(world: World) -> Iterator[dict[str, Any]]:
    """The world's config with everything in memory://."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(world.root), "/world", recursive=True)
    root, config = str(world.root), json.dumps(dict(world.config))
    data = json.loads(config.replace(root, "memory://world"))
    data["model"] = "memory://world/pretrained"
    yield data
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def test_a_merge_of_what_is_remote_is_the_merge_of_what_is_here(
    remote_world: dict[str, Any], world: World, tmp_path: Path
) -> None:
    from raymerge.config import parse_config
    from raymerge.runs.merge import merge

    far = merge(parse_config({**remote_world, "output": str(tmp_path / "far")}, root=tmp_path))
    near = merge(world.parse(tmp_path / "near"))
    assert far.lambdas is not None
    assert near.lambdas is not None
    assert far.lambdas.equal(near.lambdas)
    assert far.scores == near.scores
    hashes = json.loads((tmp_path / "far" / "environment.json").read_text())["hashes"]
    theirs = json.loads((tmp_path / "near" / "environment.json").read_text())["hashes"]
    assert "memory://world/experts/colour.safetensors" in hashes
    assert "memory://world/pretrained/open_clip_model.safetensors" in hashes
    assert list(hashes.values()) == list(theirs.values())


@pytest.mark.slow
def test_workers_fetch_for_themselves(local_ray: None, world: World, tmp_path: Path) -> None:
    from raymerge.config import parse_config
    from raymerge.runs.merge import evaluate, merge

    text = json.dumps(dict(world.config)).replace(f'"{world.root}', f'"file://{world.root}')
    data = json.loads(text)
    data["model"] = f"file://{world.root}/pretrained"
    data["cluster"] = {"workers": 2, "cpus_per_worker": 1}
    far = merge(parse_config({**data, "output": str(tmp_path / "far")}, root=tmp_path))
    near = merge(world.parse(tmp_path / "near"))
    assert far.lambdas is not None
    assert near.lambdas is not None
    assert far.lambdas.sub(near.lambdas).abs().max() < 1e-5
    config = parse_config(data, root=tmp_path)
    assert evaluate(config).keys() == far.scores.keys()  # of the pretrained model, by its URL


def test_an_adapter_is_fetched_with_its_config(tmp_path: Path) -> None:
    import fsspec

    from raymerge.models.checkpoints.locate import locate

    memory = fsspec.filesystem("memory")
    memory.pipe("/lora/adapter_model.safetensors", b"weights")
    memory.pipe("/lora/adapter_config.json", b"{}")
    memory.pipe("/lora/README.md", b"text")
    for reference in ("memory://lora", "memory://lora/adapter_model.safetensors"):
        path = locate(reference)
        names = sorted(path.name for path in path.parent.iterdir())
        assert names == ["adapter_config.json", "adapter_model.safetensors"]
    memory.store.clear()


def test_a_plan_reads_headers_only(
    remote_world: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    from raymerge.config import parse_config
    from raymerge.runs.plan.make import check_headers

    for task in remote_world["tasks"]:
        del task["adapt"], task["test"]
    data = {**remote_world, "method": "average", "output": str(tmp_path / "out")}
    plan, problems = check_headers(parse_config(data, root=tmp_path))
    assert problems == []
    assert plan is not None
    assert plan.tasks[0].checkpoint == "memory://world/experts/colour.safetensors"
    assert "fetches what is new of 5 remote checkpoints" in plan.notes[-1]
    assert not [p for p in (cache / "blobs").iterdir() if p.stat().st_size > 10_000]


def test_a_mistake_is_found_before_anything_large_is_fetched(
    remote_world: dict[str, Any], tmp_path: Path, cache: Path
) -> None:
    import fsspec
    import torch

    from raymerge.config import parse_config
    from raymerge.errors import CheckpointError
    from raymerge.runs.merge import merge

    save_file({"visual.wrong": torch.ones(9)}, tmp_path / "wrong.safetensors")
    fsspec.filesystem("memory").put(str(tmp_path / "wrong.safetensors"), "/world/wrong.safetensors")
    remote_world["tasks"][2]["checkpoint"] = "memory://world/wrong.safetensors"
    data = {**remote_world, "output": str(tmp_path / "out")}
    with pytest.raises(CheckpointError, match=r"tasks\[2\].*memory://world/wrong.safetensors"):
        merge(parse_config(data, root=tmp_path))
    assert not [p for p in (cache / "blobs").iterdir() if p.stat().st_size > 100_000]


def test_data_in_shards_by_url(tmp_path: Path) -> None:
    import tarfile

    import fsspec
    import numpy as np

    from raymerge.data.sources import unlabeled_images
    from raymerge.errors import DataError

    rng = np.random.default_rng(0)
    for shard in range(2):
        image = write_image(tmp_path / f"{shard}.png", rng)
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as tar:
            tar.add(image, arcname=f"{shard}.png")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "s-*.tar"), "/shards/")
    assert len(unlabeled_images("memory://shards/s-{0..1}.tar", "adapt")) == 2
    assert len(unlabeled_images("memory://shards/s-1.tar?limit=1", "adapt")) == 1
    with pytest.raises(DataError, match=r"^tasks\[0\].adapt: memory://shards/.*s-2.tar: no such"):
        unlabeled_images("memory://shards/s-{0..2}.tar", "tasks[0].adapt")
    with pytest.raises(DataError, match=r"^adapt: memory://nothing: no such file or folder$"):
        unlabeled_images("memory://nothing", "adapt")
    memory.store.clear()

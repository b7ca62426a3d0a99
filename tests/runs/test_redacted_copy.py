"""A redacted copy contains nothing about the machine and the user that made the run."""

from __future__ import annotations

import functools
import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import LOCAL, Commands, cache_tokenizer, config_data, write_config
from huggingface_hub import HfApi
from world import World

from raymerge import load_config
from raymerge.config import TrackingConfig
from raymerge.runs.redacted_copy import redacted_copy, without_paths

SECRETS = ("hunter2", "s3cr3t", "t0k3n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/ckpts/sun397.pt", "sun397.pt"),
        ("local-dir:/home/ann/model", "local-dir:model"),
        ("file:///home/ann/a.pt", "file:a.pt"),
        ("~/data/x.parquet?label=fine", "x.parquet?label=fine"),
        ("torchvision:MNIST:test?root=/home/ann/tv&x=9", "torchvision:MNIST:test?root=tv&x=9"),
        (r"C:\Users\ann\a.pt", "a.pt"),
        ("s3://bucket/a.pt", "s3://bucket/a.pt"),
        ("hf-hub:org/name", "hf-hub:org/name"),
        ("openai", "openai"),
        ("/", "/"),
    ],
)  # fmt: skip
def test_what_is_left_of_a_reference(text: str, shown: str) -> None:
    assert without_paths([{"x": text}]) == [{"x": shown}]


def test_names_that_would_be_one_are_numbered() -> None:
    hashes = {"/a/finetuned.pt": "1", "/b/finetuned.pt": "2", "/c/x.pt": "3"}
    expected = {"finetuned.pt": "1", "finetuned.pt (2)": "2", "x.pt": "3"}
    assert without_paths(hashes) == expected


def test_class_names_are_not_paths() -> None:
    data = {"classnames": ["/m/01g317", "~x"], "name": "/m/x"}
    assert without_paths(data) == {"classnames": ["/m/01g317", "~x"], "name": "x"}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def served(world: World) -> Iterator[str]:
    """The experts behind HTTP, by a URL with a password and two signatures."""
    handler = functools.partial(Quiet, directory=str(world.root / "experts"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    yield f"http://me:hunter2@127.0.0.1:{port}/{{}}.safetensors?X-Amz-Signature=s3cr3t&token=t0k3n"
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(
    world: World,
    served: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Path, str]:
    """Return an output folder and everything that the command printed or logged."""
    cache_tokenizer(monkeypatch)
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.DEBUG, logger="raymerge")
    data = config_data(world, cluster=dict(LOCAL))
    data["tasks"][0]["checkpoint"] = served.format("colour")
    data["card"] = {"authors": [f"Ada <{served.format('ada')}>"], "license": "mit"}
    data["tracking"] = {"tensorboard": True, "wandb": {"mode": "offline"}}
    config = write_config(tmp_path / "c.yaml", data)
    raymerge, out = Commands(capsys), tmp_path / "out"
    ran = raymerge.ok("merge", config, "--output", out, "--also", "hf")
    missing = raymerge("merge", config, "-o", f"tasks.0.checkpoint={served.format('no')}",
                       "--output", tmp_path / "x")  # fmt: skip
    assert missing.code == 2
    assert "no.safetensors" in missing.err
    planned = raymerge.ok("plan", config, "--json")
    return out, "".join((ran.out, ran.err, missing.err, planned.out, planned.err, caplog.text))


def test_no_secret_of_a_url_is_written_or_logged(run: tuple[Path, str], tmp_path: Path) -> None:
    out, told = run
    files = [*out.rglob("*"), *(tmp_path / "cache").rglob("*")]
    contents = {str(file): file.read_bytes() for file in files if file.is_file()}
    assert "127.0.0.1" in (out / "config.yaml").read_text()  # what is left of the URL
    assert "Merged by Ada <http://127.0.0.1" in (out / "README.md").read_text()
    for secret in SECRETS:
        assert secret not in told
        assert [n for n, c in contents.items() if secret in n or secret.encode() in c] == []


def test_a_redacted_copy_has_no_path_of_this_machine(
    run: tuple[Path, str], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *args, **kwargs: None)  # asks the hub
    out, _ = run
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["cluster"]["address"] = "ray://head.example:10001"
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    results = json.loads((out / "results.json").read_text())
    results["incidents"] = [
        {"what": "step 3", "kind": "worker", "reason": "died on node 10.0.0.7 in /home/ann/x"}
    ]
    (out / "results.json").write_text(json.dumps(results))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with redacted_copy(out) as copy:
        sent = HfApi()._prepare_upload_folder_additions(copy, "")
        names = {operation.path_in_repo for operation in sent}
        texts = {
            file.name: file.read_text()
            for file in copy.rglob("*")
            if file.suffix in (".json", ".yaml", ".md", ".html", ".jsonl", ".txt")
        }
        public = load_config(copy / "config.yaml")
        assert public.task_names == world.parse().task_names
        assert public.tracking == TrackingConfig()  # whose account was told is nobody's business
    assert not copy.exists()
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert {"config.yaml", "README.md", "report.html", "hf/model.safetensors"} <= names
    assert not any(name.startswith(("state", "tensorboard", "wandb")) for name in names)
    places = (str(world.root), str(out.parent), "/home/", "10.0.0.7", "head.example")
    for name, text in texts.items():
        for place in places:
            assert place not in text, (name, place)
        absolute = re.findall(r"(?<![\w/.:<*])/(?:tmp|root|usr|var|mnt)/\S+", text)
        assert absolute == [], name
    kept = json.loads(texts["environment.json"])["hashes"]
    original = json.loads(before[out / "environment.json"])["hashes"]
    assert list(kept.values()) == list(original.values())
    assert json.loads(texts["results.json"])["incidents"][0]["reason"] == "worker"

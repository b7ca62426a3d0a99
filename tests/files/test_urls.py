"""URLs are shown without credentials."""

from __future__ import annotations

import logging
import time

import pytest

from raymerge.config import dump_config, parse_config
from raymerge.files.urls import is_remote, redact, redact_url, redact_values


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:pw@host/a.pt", "https://host/a.pt"),
        ("https://token@host/a.pt", "https://host/a.pt"),
        ("https://host/a.pt?X-Amz-Signature=abc&download=1", "https://host/a.pt?download=1"),
        ("https://host/a.pt?anything=1", "https://host/a.pt"),
        ("s3://KEY:SECRET@bucket/a.pt", "s3://bucket/a.pt"),
        ("sftp://me:pw@host/a.pt", "sftp://me@host/a.pt"),
        ("s3://bucket/a.pt?versionId=3", "s3://bucket/a.pt?versionId=3"),
        ("s3://bucket/t.parquet?label=fine&limit=9", "s3://bucket/t.parquet?label=fine&limit=9"),
    ],
)
def test_what_is_shown(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert redact_url(shown) == shown
    assert redact(f"x ({url}); y, '{url}': z") == f"x ({shown}); y, '{shown}': z"


@pytest.mark.parametrize(
    "url",
    ["hf://org/name@main/a.pt", "hf://gpt2@main/a", "abfs://container@account/a", "memory://a//b"],
)
def test_what_is_no_credential_stays(url: str) -> None:
    assert redact_url(url) == url


def test_what_is_remote() -> None:
    assert is_remote("s3://b/x")
    assert is_remote("file:///x")
    for local in ("a/b.pt", "hf-hub:a/b", "hf:a/b:train", "local-dir:x", "C:x", ""):
        assert not is_remote(local)


def test_only_whole_strings_are_replaced_in_data() -> None:
    data = {"a": ["s3://K:S@b/x", 3, "see https://h/?q=1"], "m": "local-dir:https://u:p@h/x"}
    expected = {"a": ["s3://b/x", 3, "see https://h/?q=1"], "m": "local-dir:https://h/x"}
    assert redact_values(data) == expected


def test_the_recorded_config_holds_no_credential_and_is_the_same_run(tmp_path) -> None:
    from raymerge.runs.state import fingerprint

    def config(signature: str):
        url = f"https://me:hunter2@host/a.pt?X-Amz-Signature={signature}"
        data = {"model": {"arch": "ViT-B-32", "pretrained": url}, "method": "average"}
        return parse_config({**data, "tasks": [{"name": "a", "checkpoint": url}]}, root=tmp_path)

    text = dump_config(config("abc"))
    assert "https://host/a.pt\n" in text
    assert "hunter2" not in text
    assert "abc" not in text
    assert fingerprint(config("abc")) == fingerprint(config("xyz"))


def test_a_refused_config_holds_no_credential(tmp_path) -> None:
    from raymerge.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        parse_config(
            {"model": {"arch": "https://me:hunter2@h/m", "pretrained": "x"}}, root=tmp_path
        )
    assert "hunter2" not in str(caught.value)


def test_logs_are_redacted() -> None:
    from raymerge.cli import _Redacting

    record = logging.LogRecord("httpx", 20, "", 0, "GET %s", ("https://h/a?token=t0k3n",), None)
    assert _Redacting("raymerge: %(message)s").format(record) == "raymerge: GET https://h/a"


@pytest.mark.parametrize(
    "text",
    [
        "https://me:it's-SECRET@host/x",
        'https://me:say"SECRET"@host/x.pt',
        "https://me:a|SECRET`<>@host/x",
        "https://me:p/SECRET@host/x",
        "cannot fetch https://me:SECRET@host/x, nor 'https://you:it's-SECRET@host/y'",
        "https://host/x?X-Amz-Signature=SECRET",
        "Authorization: Bearer SECRET-abc.def/x==",
        "token hf_SECRETabcdefghijklmnop was refused",
    ],
)
def test_no_secret_of_any_spelling_is_left(text):
    assert "SECRET" not in redact(text)


def test_addresses_without_secrets_stay_readable():
    for text in (
        "see 'https://host/a@1.2/b' and ask x@y.org",
        "https://host/a.pt#visual.trunk: no such part",
        "tasks[0].class_token: is unknown; HF_TOKEN: set it, or run `hf auth login`",
        "torchvision:EuroSAT?root=/data&split=test behind https://host/x?match=index",
        "hf://datasets/org/name@main/x.parquet",
        "s3://bucket/key, abfs://container@account/x",
        "basic settings",
    ):
        assert redact(text) == text


@pytest.mark.parametrize(
    "text",
    [
        # Passwords with marks that end a host, or an address.
        "https://me:it's-{}@host/x",
        "https://me:a {}@host/x",
        "https://me:a\\{}@host/x",
        "https://me:a?{}@host/x",
        "https://me:a#{}@host/x",
        "https://me:12/{}@host/x",
        "https://me:p@ss/{}@host/x",
        "https://me:a%40{}%2F@host/x",
        "https://{}@host/x",
        "https://me:{}@host/x and (https://you:{}@host/y).",
        # Parameters behind a quote, in a path and in a fragment; an address in a query.
        "https://host/it's?token={}",
        "https://host/x?a=it's&token={}",
        "https://host/x;token={}",
        "https://host/x#token={}",
        "https://host/x?next=https%3A%2F%2Fme%3A{}%40host",
        "https%3A%2F%2Fme%3A{}%40host%2Fx",
        # Headers, settings, and tokens by their form.
        "Authorization: {}",
        "{{'Authorization': 'Basic {}'}}",
        "X-Auth-Token: {}",
        "AWS_SECRET_ACCESS_KEY={}",
        "WANDB_API_KEY='{}'",
        "ghp_{}",
    ],
)
def test_secrets_of_every_kind_are_redacted(text):
    secret = "5ecr3tABCDEFGHIJKLMNOP"
    assert secret not in redact(f"x '{text.format(secret, secret)}': no such file")


@pytest.mark.parametrize(
    "part", ["a", "a-", "a.", ";a=,", "://a", "%3A%2F%2F", "token", "a:'", "@"]
)
def test_redaction_takes_time_in_proportion_to_the_text(part):
    began = time.perf_counter()
    redact("https://host/ " + part * 100_000)
    assert time.perf_counter() - began < 10

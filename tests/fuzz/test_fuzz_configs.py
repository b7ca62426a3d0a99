"""Configs: raymerge's own, an experiment's, mergekit's and fusion_bench's, and overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from fuzzing import DEEP, ODD, Ground, changed, mutants
from hypothesis import given
from hypothesis import strategies as st

from raymerge.apps.peers import open_foreign
from raymerge.config import dump_config, load_config
from raymerge.config.experiments import load_experiment
from raymerge.runs.state import fingerprint

CONFIG = {
    "model": {"arch": "ViT-B-32", "pretrained": "openai"},
    "tasks": [
        {
            "name": "a",
            "checkpoint": "a.pt",
            "classnames": ["x", "y"],
            "templates": ["a photo of a {}."],
            "adapt": "images",
            "test": "t.parquet?split=test",
        },
        {"name": "b", "checkpoint": "hf-hub:org/b"},
    ],
    "method": {"name": "adamerging", "granularity": "tensor", "init": 0.3, "clamp": "projected"},
    "optimizer": {"lr": 0.001, "steps": 5, "betas": [0.9, 0.999]},
    "cluster": {"workers": 2, "shards": 1},
    "card": {"license": "mit", "authors": ["Ada"]},
    "seed": 0,
    "output": "out",
}
SUITE = {
    "suite": {"name": "vit-8", "checkpoints": "ckpts/{task}.pt", "data": "data/{task}"},
    "model": "local-dir:m",
    "preset": "fast",
}
EXPERIMENT = {
    "experiment": {"name": "robustness", "severity": 2},
    "base": "demo",
    "methods": {"fast": {"preset": "fast"}, "ties": {"name": "ties", "density": 0.2}},
    "output": "out",
}
MERGEKIT = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "a", "parameters": {"weight": 0.5, "density": [0.1, 1.0]}}],
    "parameters": {"normalize": True, "lambda": 1.0},
    "dtype": "float32",
}
POOL = {"modelpool": {"models": {"_pretrained_": "base", "a": "x"}}, "method": {"name": "simple"}}
HOSTILE = [
    b"!!python/object/apply:os.system ['touch ../outside/canary']",
    b"model: !!python/object/new:os.system ['touch ../outside/canary']\ntasks: []",
    b"a: &a [x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\n"
    b"c: &c [*b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c]\n"
    b"e: &e [*d, *d, *d, *d, *d, *d, *d, *d]\nmodel: {arch: *e}\ntasks: *e\n",
    b"tasks: &a [*a]\nmodel: *a",
    b"model: &m {arch: *m, pretrained: *m}\ntasks: [*m]",
    b"? [a, b]\n: 1",
    b"x: 2001-99-99",
    b"x: !!bool maybe",
    b"x: !!timestamp never",
    b"x: !!int ''",
    b"x: 0b",
    b"x: !!float -",
    b"x: !!binary '*'",
    b"1: 2\nmethod: {1: 2, 2.5: x, null: y, [a]: z}",
    b"method: {name: ties, 1: 0.3}",
    b"a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b {k: *a, l: *a, m: *a, n: *a, o: *a, p: *a}\n"
    b"tasks: [" + b"*b, " * 500 + b"*b]",
    b"[" * 3000,
    b"x: 1" + b"0" * 5000,
    b"<<: 3",
    b"<<: [*x]",
    b"tasks: [{name: a, templates: ['{!r:>9999999999}{}']}]",
]


SHALLOW = tuple(value for value in ODD if value != DEEP)
"""The YAML parser takes a second to refuse deep nesting, so HOSTILE has only one such input."""


def yaml_of(data: Any) -> bytes:
    """Return YAML, including lone surrogates."""
    return yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass")


def files(original: Any) -> st.SearchStrategy[bytes]:
    whole = yaml.safe_dump(original).encode()
    odd = changed(original, SHALLOW).map(yaml_of)
    return odd | odd | mutants([whole, *HOSTILE]) | st.sampled_from(HOSTILE)


@given(content=files(CONFIG) | files(SUITE))
def test_configs(ground: Ground, content: bytes) -> None:
    path = ground.clean() / "config.yaml"
    path.write_bytes(content)

    def read() -> None:
        config = load_config(path)
        dump_config(config)
        fingerprint(config)

    ground.examine("configs", read)


@given(content=files(EXPERIMENT))
def test_experiments(ground: Ground, content: bytes) -> None:
    path = ground.clean() / "experiment.yaml"
    path.write_bytes(content)
    ground.examine("experiment configs", lambda: load_experiment(path, ()))


@given(content=files(MERGEKIT) | files(POOL))
def test_foreign_configs(ground: Ground, content: bytes) -> None:
    path = ground.clean() / "merge.yml"
    path.write_bytes(content)
    ground.examine("mergekit and fusion_bench configs", lambda: open_foreign(path))


KEYS = st.sampled_from(
    [
        "model",
        "tasks",
        "0",
        "9",
        "²",
        "٣",
        "-1",
        "9" * 5000,
        "name",
        "method",
        "suite",
        "x",
        "",
        "optimizer",
        "steps",
        "seed",
    ]
)
PATHS = st.lists(KEYS, max_size=4) | st.sampled_from(
    [["optimizer", "steps"], ["tasks", "0", "name"], ["method"], ["seed"], ["card", "authors"]]
)
VALUES = (
    st.integers().map(str)
    | st.text(max_size=20)
    | st.sampled_from(["ties", "[a, b]", "{}", *(each.decode() for each in HOSTILE)])
)


@given(keys=PATHS, value=VALUES)
def test_overrides(ground: Ground, keys: list[str], value: str) -> None:
    path = Path(ground.clean() / "config.yaml")
    path.write_text(yaml.safe_dump(CONFIG))
    override = ".".join(keys) + "=" + value
    ground.examine("overrides", lambda: load_config(path, [override]))

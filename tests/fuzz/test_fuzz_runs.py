"""Files of a run: coefficients, states of merging and training, and the inputs of a report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from fuzzing import ODD, Ground, json_bytes, json_files, mutants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from raymerge.report import write_report
from raymerge.runs.lambdas import read_lambdas
from raymerge.runs.state import StateStore, learning_states

TASKS, LAYERS = ("a", "b"), ("x", "y", "z")
LAMBDAS = {"tasks": list(TASKS), "layers": list(LAYERS), "values": [[0.1, 0.2, 0.3]] * 2}
HUGE = (*ODD, [[1e308] * 3] * 2, [[[0.1]]], [["0.1"] * 3] * 2, [[True] * 3] * 2)


@given(content=json_files(LAMBDAS, HUGE), config=json_files({"method": {"task_vectors": "raw"}}))
def test_lambdas(ground: Ground, content: bytes, config: bytes) -> None:
    folder = ground.clean()
    (folder / "lambdas.json").write_bytes(content)
    (folder / "config.yaml").write_bytes(config)

    def read() -> None:
        assert read_lambdas(str(folder), TASKS, LAYERS).shape == (2, 3)

    ground.examine("lambdas.json", read)


# --- states --------------------------------------------------------------------------------------

NUMBERS = {name: torch.ones(2, 3, dtype=torch.float64) for name in ("lambdas", "mean", "square")}
ARRAYS = save({**NUMBERS, "memory.x": torch.zeros(2)})


def manifest(payload: bytes) -> dict[str, Any]:
    return {
        "step": 3,
        "attempt": 1,
        "sha256": {"state.safetensors": hashlib.sha256(payload).hexdigest()},
        "config": "abc",
        "tasks": list(TASKS),
        "layers": list(LAYERS),
        "fingerprint": "f",
    }


def write_state(folder: Path, payload: bytes, manifest: bytes) -> None:
    (folder / "step-00000003").mkdir()
    (folder / "step-00000003" / "state.safetensors").write_bytes(payload)
    (folder / "step-00000003" / "manifest.json").write_bytes(manifest)


def resume(folder: Path) -> None:
    """Read both kinds of state: a damaged one is skipped, a valid one has the right shapes."""
    state = learning_states(folder, "abc", TASKS, LAYERS, 3).newest()
    assert state is None or state.lambdas.shape == (2, 3)
    states = StateStore(folder, {"fingerprint": "f"}, 2, lambda saved: saved, lambda saved: saved)
    states.require_same_run()
    states.newest()


ANY_STEP = st.sampled_from(("step-00000003", "step-99999999999999999999", "step-x", "attempt-0001"))


@given(data=st.data())
def test_states(ground: Ground, data: st.DataObject) -> None:
    folder = ground.clean()
    payload = data.draw(st.just(ARRAYS) | mutants([ARRAYS]))
    sound = manifest(payload if data.draw(st.booleans()) else ARRAYS)
    changed_manifest = data.draw(st.just(json_bytes(sound)) | json_files(sound))
    write_state(folder, payload, changed_manifest)
    (folder / data.draw(ANY_STEP)).mkdir(exist_ok=True)
    ground.examine("states", lambda: resume(folder))


SHAPES = st.sampled_from(([2, 3], [3, 2], [6], [0], [], [1, 2, 3]))
KINDS = st.sampled_from((torch.float64, torch.float32, torch.int64, torch.bool))


@given(arrays=st.dictionaries(st.sampled_from([*NUMBERS, "memory.x"]), st.tuples(SHAPES, KINDS)))
def test_states_of_other_shapes(ground: Ground, arrays: dict[str, Any]) -> None:
    """The states are valid but belong to another run."""
    folder = ground.clean()
    payload = save({name: torch.ones(*of[:1], dtype=of[1]) for name, of in arrays.items()})
    write_state(folder, payload, json_bytes(manifest(payload)))
    ground.examine("states", lambda: resume(folder))


# --- reports -------------------------------------------------------------------------------------

SCORE = {"top1": 0.5, "loss": 1.0, "entropy": 0.7, "examples": 10}
FILES: dict[str, Any] = {
    "results.json": {"method": "adamerging", "average": SCORE, "tasks": {"a": SCORE, "b": SCORE},
                     "timings": {"seconds": {"load": 1.0}},
                     "incidents": [{"what": "step 3", "reason": "died", "kind": "worker"}]},
    "lambdas.json": LAMBDAS,
    "environment.json": {"torch": "2", "hashes": {"a.pt": "00"}},
    "comparison.json": {"methods": {"ties": {"average": SCORE, "tasks": {"a": SCORE}}},
                        "uniform_scan": {"scalings": [0.1, 0.2], "top1": [0.4, 0.5]}},
}  # fmt: skip
STEP = {"step": 1, "loss": 1.0, "entropy": {"a": 0.5}, "lambdas": {"a": 0.3}, "seconds": 0.1}


@given(data=st.data(), name=st.sampled_from([*FILES, "metrics.jsonl", "config.yaml"]))
def test_reports(ground: Ground, data: st.DataObject, name: str) -> None:
    folder = ground.clean()
    for file, value in FILES.items():
        if file != "comparison.json" or name == file:
            (folder / file).write_bytes(json_bytes(value))
    (folder / "metrics.jsonl").write_text(json.dumps(STEP) + "\n")
    if name == "metrics.jsonl":
        lines = data.draw(st.lists(json_files(STEP), max_size=3))
        (folder / name).write_bytes(b"\n".join(lines))
    else:
        (folder / name).write_bytes(
            data.draw(json_files(FILES.get(name, {"method": {"name": "x"}})))
        )
    (folder / "report.html").touch()
    ground.examine("reports", lambda: write_report(folder))

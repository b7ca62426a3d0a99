"""Saved state: bit for bit, the newest undamaged one, of this run, by the newest driver only."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from raymerge import __version__
from raymerge.config import Config, parse_config
from raymerge.engine.driver.state import LearningState, MonitorState
from raymerge.errors import RunError, UserError
from raymerge.files.fencing import claim_attempt
from raymerge.merging.guard import GuardState
from raymerge.merging.optimizer import AdamState
from raymerge.runs.state import SavedTensors, StateStore, fingerprint, learning_states

TASKS, LAYERS = ("a", "b"), ("x", "y", "z")


def _state(step: int) -> LearningState:
    generator = torch.Generator().manual_seed(step)
    parts = [torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    return LearningState(AdamState(parts[0], parts[1], parts[2].square(), step))


def _store(
    folder: Path, config: str = "abc", keep: int = 3, **changes
) -> StateStore[LearningState]:
    return learning_states(
        folder, config, changes.get("tasks", TASKS), changes.get("layers", LAYERS), keep
    )


def _saved(folder: Path, *steps: int, keep: int = 3) -> StateStore[LearningState]:
    store = _store(folder, keep=keep)
    store.claim()
    for step in steps:
        store.save(_state(step))
    return store


def _same(one: LearningState | None, two: LearningState) -> bool:
    if one is None or one.step != two.step:
        return False
    first, second = one.tensors(), two.tensors()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype
        for name in first
    )


def test_a_state_comes_back_bit_for_bit(tmp_path):
    adam = AdamState(
        torch.tensor([[1e-310, -0.0, 0.1], [1 / 3, 1.0, 1e300]], dtype=torch.float64),
        torch.full((2, 3), 5e-324, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.float64),
        7,
    )
    state = LearningState(adam)
    store = _store(tmp_path)
    store.claim()
    store.save(state)
    found = _store(tmp_path).newest()
    assert _same(found, state)
    assert found.lambdas.view(torch.int64).tolist() == state.lambdas.view(torch.int64).tolist()


def test_the_memory_of_the_loop_comes_back_in_its_own_dtype(tmp_path):
    """Tensors that share their memory with another, or are part of a larger one, included."""
    shared = torch.arange(12, dtype=torch.float64).reshape(3, 4)
    column, flags = shared[:, 1], torch.tensor([False, True, False])
    monitor = MonitorState(shared, GuardState(column, column, column, column), flags, ~flags)
    plain = _state(7)
    state = replace(plain, start=plain.lambdas, monitor=monitor, skipped_in_a_row=2)
    store = _store(tmp_path)
    store.claim()
    store.save(state)
    assert _same(_store(tmp_path).newest(), state)


def test_coefficients_of_any_stride_are_saved(tmp_path):
    state = _state(7)
    lambdas = state.lambdas.t().contiguous().t()
    turned = replace(state, adam=replace(state.adam, lambdas=lambdas))
    assert not turned.lambdas.is_contiguous()
    store = _store(tmp_path)
    store.claim()
    store.save(turned)
    assert _same(_store(tmp_path).newest(), state)


def test_newest_is_none_without_a_state(tmp_path):
    assert _store(tmp_path / "nowhere").newest() is None
    assert _saved(tmp_path).newest() is None


def test_the_newest_is_by_number_and_only_the_last_few_are_kept(tmp_path):
    store = _saved(tmp_path, 1, 2, 9, 10, 100, keep=3)
    assert store.steps() == [9, 10, 100]
    assert _same(store.newest(), _state(100))


def test_one_can_be_kept(tmp_path):
    assert _saved(tmp_path, 1, 2, 3, keep=1).steps() == [3]


def test_no_temporary_folder_is_left(tmp_path):
    _saved(tmp_path, 1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "attempt-0001",
        "step-00000001",
        "step-00000002",
    ]


# --- damage: the one before is used ------------------------------------------------------------


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def _damage(how: str, folder: Path) -> None:
    tensors, manifest = folder / "state.safetensors", folder / "manifest.json"
    if how == "flipped tensors":
        _flip(tensors, tensors.stat().st_size - 3)
    elif how == "flipped header":
        _flip(tensors, 12)
    elif how == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif how == "empty tensors":
        tensors.write_bytes(b"")
    elif how == "no tensors":
        tensors.unlink()
    elif how == "truncated manifest":
        manifest.write_bytes(manifest.read_bytes()[:-40])
    elif how == "empty manifest":
        manifest.write_bytes(b"")
    elif how == "binary manifest":
        manifest.write_bytes(b"\xff\xfe\x00")
    elif how == "another manifest":
        manifest.write_text("[1, 2]")
    elif how == "no manifest":
        manifest.unlink()
    elif how == "a file":
        shutil.rmtree(folder)
        folder.write_text("")
    elif how == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize(
    "how",
    ["flipped tensors", "flipped header", "truncated tensors", "empty tensors", "no tensors",
     "truncated manifest", "empty manifest", "binary manifest", "another manifest", "no manifest",
     "a file", "empty folder"],
)  # fmt: skip
def test_a_damaged_state_is_skipped_with_a_warning(tmp_path, caplog, how):
    store = _saved(tmp_path, 10, 20, 30)
    _damage(how, tmp_path / "step-00000030")
    assert _same(store.newest(), _state(20))
    assert "state of step 30 is damaged" in caplog.text
    _damage(how, tmp_path / "step-00000020")
    assert _same(store.newest(), _state(10))
    _damage(how, tmp_path / "step-00000010")
    assert store.newest() is None


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_no_flipped_bit_is_ever_taken_for_a_state(tmp_path, name):
    """A flip of any byte gives the saved state, the one before, or an error; never another λ."""
    store = _saved(tmp_path, 10, 20)
    path = tmp_path / "step-00000020" / name
    content = path.read_bytes()
    for position in range(len(content)):
        _flip(path, position)
        try:
            found = store.newest()
        except UserError:  # a flip in the run's identity
            found = None
        assert found is None or _same(found, _state(10)) or _same(found, _state(20)), position
        path.write_bytes(content)


def test_a_step_that_is_run_again_replaces_its_damaged_state(tmp_path):
    store = _saved(tmp_path, 10, 20)
    _damage("flipped tensors", tmp_path / "step-00000020")
    store.save(_state(20))
    assert _same(store.newest(), _state(20))


def test_a_damaged_newer_state_does_not_push_out_a_sound_one(tmp_path):
    _saved(tmp_path, 30, keep=1)
    _damage("flipped tensors", tmp_path / "step-00000030")
    store = _saved(tmp_path, 10, keep=1)  # the run starts anew, and saves step 10 first
    assert _same(store.newest(), _state(10))


# --- identity and fencing ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"config": "abd"}, "config"),
        ({"tasks": ("b", "a")}, "tasks"),
        ({"layers": ("x", "y", "w")}, "layers"),
    ],
)
def test_a_state_of_another_run_is_a_user_error(tmp_path, changes, key):
    _saved(tmp_path, 10)
    with pytest.raises(UserError, match=rf"another run \(its {key} differs\)") as raised:
        _store(tmp_path, **changes).newest()
    assert raised.value.exit_code == 2


def test_an_older_attempt_cannot_save(tmp_path):
    """Fencing: a driver that came back from a long pause must not overwrite its successor."""
    old = _saved(tmp_path, 10)
    new = _store(tmp_path)
    new.claim()
    with pytest.raises(RunError, match="attempt 2 has taken over this run from attempt 1"):
        old.save(_state(20))
    assert new.steps() == [10]
    new.save(_state(20))
    assert _same(new.newest(), _state(20))


def test_every_claim_is_a_new_attempt(tmp_path):
    for number in range(1, 4):
        store = _store(tmp_path)
        store.claim()
        store.claim()  # the same driver keeps its number
        assert len(list(tmp_path.glob("attempt-*"))) == number
    manifest = _saved(tmp_path, 5).folder / "step-00000005" / "manifest.json"
    assert json.loads(manifest.read_text())["attempt"] == 4


def test_saving_needs_a_claim(tmp_path):
    with pytest.raises(RuntimeError, match="before claim"):
        _store(tmp_path).save(_state(1))


def test_a_state_that_cannot_be_written_is_a_run_error(tmp_path, monkeypatch):
    store = _saved(tmp_path, 10)

    def full(path, payload):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("raymerge.runs.state._write_synced", full)
    with pytest.raises(RunError, match="state not saved: No space left on device"):
        store.save(_state(20))
    assert store.steps() == [10]
    assert not list(tmp_path.glob(".step-*"))


# --- a training target: any tensors, one of several folders of a run ------------------------------


def _target(root: Path, fingerprint: str = "f", name: str = "a") -> StateStore[SavedTensors]:
    def same(saved: SavedTensors) -> SavedTensors:
        return saved

    return StateStore(
        root / "experts" / name, {"fingerprint": fingerprint}, 2, same, same, attempts=root
    )


def _tensors(value: float) -> dict[str, torch.Tensor]:
    flat = torch.full((6,), value)
    return {"weights.a": flat[:4].view(2, 2), "weights.b": flat[4:], "step": torch.tensor(value)}


def _trained(root: Path, *steps: int) -> StateStore[SavedTensors]:
    target = _target(root)
    target.claim()
    for step in steps:
        target.save((step, _tensors(step / 7)))
    return target


def test_tensors_that_are_views_of_one_come_back_bit_for_bit(tmp_path):
    _trained(tmp_path, 2, 4, 6)
    store = _target(tmp_path)
    assert store.steps() == [4, 6]
    step, tensors = store.newest()
    assert step == 6
    assert tensors.keys() == _tensors(6 / 7).keys()
    assert all(torch.equal(tensors[name], value) for name, value in _tensors(6 / 7).items())
    assert [path.name for path in tmp_path.glob("**/attempt-*")] == ["attempt-0001"]
    store.clear()
    assert store.steps() == []


def test_all_targets_of_a_run_write_under_its_one_attempt(tmp_path):
    attempt = claim_attempt(tmp_path)
    old = [_target(tmp_path, name=name) for name in "ab"]
    for store in old:
        store.claim(attempt)
        store.save((2, _tensors(2)))
    claim_attempt(tmp_path)
    for store in old:
        with pytest.raises(RunError, match="attempt 2 has taken over this run from attempt 1"):
            store.save((4, _tensors(4)))
        assert store.steps() == [2]


def test_another_run_is_seen_in_the_manifests_alone(tmp_path):
    _trained(tmp_path, 2)
    (tmp_path / "experts" / "a" / "step-00000002" / "state.safetensors").unlink()
    _target(tmp_path).require_same_run()
    with pytest.raises(UserError, match=r"another run \(its fingerprint differs\)"):
        _target(tmp_path, "other").require_same_run()
    with pytest.raises(UserError, match=r"another run \(its fingerprint differs\)"):
        _target(tmp_path, "other").newest()


@pytest.mark.parametrize("content", ["[]", "3", "{}", "[" * 100_000, "null"])
def test_a_damaged_manifest_belongs_to_no_other_run(tmp_path, content):
    store = _trained(tmp_path, 2, 4)
    (store.folder / "step-00000004" / "manifest.json").write_text(content)
    store.require_same_run()
    assert store.newest()[0] == 2


# --- states that earlier versions wrote -----------------------------------------------------------


def _write_as_before(path: Path, payload: bytes, **manifest) -> None:
    digest = {"state.safetensors": hashlib.sha256(payload).hexdigest()}
    path.mkdir(parents=True)
    (path / "state.safetensors").write_bytes(payload)
    (path / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))


def test_a_state_of_an_earlier_merge_is_resumed(tmp_path):
    """No versions in its manifest, and memory by its prefix."""
    state = _state(5)
    tensors = {"lambdas": state.lambdas, "mean": state.adam.mean, "square": state.adam.square}
    payload = save({**tensors, "memory.skipped": torch.tensor(2)})
    identity = {"config": "abc", "tasks": list(TASKS), "layers": list(LAYERS)}
    _write_as_before(tmp_path / "step-00000005", payload, step=5, attempt=1, **identity)
    newest = _store(tmp_path).newest()
    assert _same(newest, replace(state, adam=replace(state.adam, skipped=2)))
    assert newest.adam.updates == 3


def test_a_state_of_an_earlier_training_is_resumed(tmp_path):
    folder = tmp_path / "experts" / "a"
    payload = save(_tensors(0.5))
    _write_as_before(folder / "step-00000005", payload, step=5, attempt=1, fingerprint="f")
    step, tensors = _target(tmp_path).newest()
    assert step == 5
    assert torch.equal(tensors["weights.a"], torch.full((2, 2), 0.5))


# --- what makes it the same run ----------------------------------------------------------------


def _config(**changes) -> Config:
    task = {"name": "a", "checkpoint": "a.pt", "classnames": ["x", "y"], "adapt": "d", "test": "t"}
    data = {"model": "local-dir:m", "tasks": [task, {**task, "name": "b"}], **changes}
    return parse_config(data, root=Path("/r"))


TASK = {"name": "a", "checkpoint": "a.pt", "classnames": ["x", "y"], "adapt": "d", "test": "t"}


@pytest.mark.parametrize(
    "changes",
    [
        {"output": "elsewhere"},
        {"cluster": {"workers": 4, "shards": 2}},
        {"state": {"every_steps": 1}},
        {"optimizer": {"steps": 900}},
        {"vectors": {"folder": "scratch"}},
        {"tasks": [{**TASK, "test": None}, {**TASK, "name": "b", "test": "u"}]},
    ],
)
def test_settings_that_do_not_decide_lambda_may_change(changes):
    assert fingerprint(_config(**changes)) == fingerprint(_config())


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"model": "local-dir:other"},
        {"method": {"name": "adamerging", "clamp": "none"}},
        {"method": {"name": "adamerging", "objective": "kl"}},
        {"method": {"name": "adamerging", "collapse": "restore"}},
        {"optimizer": {"sharpness": 0.1}},
        {"optimizer": {"lr": 0.1}},
        {"optimizer": {"batch_size": 4}},
        {"precision": "bfloat16"},
        {"vectors": {"dtype": "bfloat16"}},
        {"vectors": {"location": "disk"}},  # whose precision is left open
        {"tasks": [TASK]},
        {"tasks": [{**TASK, "name": "b"}, TASK]},
        {"tasks": [{**TASK, "adapt": "e"}, {**TASK, "name": "b"}]},
        {"tasks": [{**TASK, "checkpoint": "c.pt"}, {**TASK, "name": "b"}]},
        {"tasks": [{**TASK, "classnames": ["y", "x"]}, {**TASK, "name": "b"}]},
        {"tasks": [{**TASK, "templates": ["{}"]}, {**TASK, "name": "b"}]},
    ],
)
def test_settings_that_decide_lambda_must_not_change(changes):
    assert fingerprint(_config(**changes)) != fingerprint(_config())


def test_with_a_given_precision_the_vectors_may_move():
    def of(**vectors):
        return fingerprint(_config(vectors={"dtype": "float32", **vectors}))

    assert of() == of(location="host") == of(location="disk", folder="scratch")


def test_more_steps_may_be_asked_for_only_at_a_constant_rate(world):
    def of(**optimizer):
        return fingerprint(world.parse(optimizer=optimizer))

    assert of(steps=10) == of(steps=20)
    assert of(steps=10, schedule="cosine") != of(steps=20, schedule="cosine")
    assert of(steps=10, schedule="cosine") != of(steps=10)


# --- killed while it writes -----------------------------------------------------------------------


def _killed(write: Callable[[], None], after_s: float) -> None:
    """Run ``write`` in a child process and kill that after ``after_s``."""
    child = os.fork()
    if child == 0:
        try:
            write()
        finally:
            os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _wide(step: int) -> LearningState:
    """Return a state that takes a while to write; every number of it is ``step``."""
    value = torch.full((2, 40_000), float(step), dtype=torch.float64)
    return LearningState(AdamState(value, value.clone(), value.clone(), step))


def _wide_store(folder: Path) -> StateStore[LearningState]:
    return _store(folder, layers=[f"l{n}" for n in range(40_000)])


def _whole(state: LearningState | None) -> bool:
    parts = () if state is None else (state.lambdas, state.adam.mean, state.adam.square)
    return state is not None and all((part == state.step).all() for part in parts)


def test_killed_a_hundred_times_while_it_writes_a_whole_state_is_there(tmp_path, caplog):
    """Each driver continues from the newest state and is killed at a random moment."""
    store = _wide_store(tmp_path)
    store.claim()
    store.save(_wide(1))
    moments, torn = random.Random(0), 0

    def save_on() -> None:
        mine = _wide_store(tmp_path)
        mine.claim()
        for step in range(mine.steps()[-1] + 1, 10**6):
            mine.save(_wide(step))

    for kill in range(400):
        if kill >= 100 and torn:
            break
        before = store.steps()[-1]
        # On a busy machine a save begins later: look for it longer.
        _killed(save_on, moments.uniform(0.0, 0.05 + kill / 1000))
        found = _wide_store(tmp_path).newest()
        assert _whole(found)
        assert found.step >= before
        torn += any(tmp_path.glob(".step-*"))
    assert torn > 0  # at least one was killed in the middle of a save
    assert not caplog.records  # and no damaged one had to be skipped
    _wide_store(tmp_path).claim()
    assert not any(tmp_path.glob(".step-*"))


def test_a_writer_in_place_would_be_caught(tmp_path):
    """The check above can fail: a file that is written in place is soon torn."""
    target = tmp_path / "state"
    torch.save(_wide(1).lambdas, target)
    moments = random.Random(0)

    def write_on() -> None:
        for step in range(1, 10**6):
            torch.save(_wide(step).lambdas, target)

    def sound() -> bool:
        try:
            return torch.load(target, weights_only=True).unique().numel() == 1
        except Exception:
            return False

    verdicts = []
    for _ in range(40):
        _killed(write_on, moments.uniform(0.0, 0.05))
        verdicts.append(sound())
    assert not all(verdicts)


def test_on_a_full_disk_the_state_before_stays(tmp_path):
    """A limit on the size of files makes a write fail in the middle, as on a full disk."""
    store = _wide_store(tmp_path)
    store.claim()
    store.save(_wide(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RunError, match=r"state not saved: .*File too large"):
            store.save(_wide(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir() if "step" in path.name] == ["step-00000001"]
    assert _whole(_wide_store(tmp_path).newest())


def test_the_manifest_says_which_versions_wrote_it(tmp_path):
    _saved(tmp_path, 4)
    manifest = json.loads((tmp_path / "step-00000004" / "manifest.json").read_text())
    assert manifest["versions"] == {"raymerge": __version__, "torch": torch.__version__}


@pytest.mark.parametrize("content", ["[]", "3", "{}", "[" * 100_000, "null"])
def test_an_invalid_manifest_is_a_damaged_state(tmp_path, content):
    store = _saved(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "manifest.json").write_text(content)
    assert _same(store.newest(), _state(1))

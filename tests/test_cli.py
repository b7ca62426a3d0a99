"""The commands as a user meets them: what they print and leave, signals, and being killed."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from commands import (
    Commands,
    cache_tokenizer,
    config_data,
    environment,
    process,
    python,
    read_json,
    read_steps,
    refused,
    script,
    tree,
    write_config,
)
from safetensors.torch import save_file
from world import CLASSES, World

import raymerge as package
from raymerge.cli import main
from raymerge.errors import RunError

CONTRACT = {
    "open_clip_config.json",
    "open_clip_model.safetensors",
    "lambdas.json",
    "results.json",
    "metrics.jsonl",
    "config.yaml",
    "README.md",
    "report.html",
}


@pytest.fixture
def raymerge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    cache_tokenizer(monkeypatch)
    return Commands(capsys)


@pytest.fixture
def config(world: World, tmp_path: Path) -> Path:
    return write_config(tmp_path / "config.yaml", config_data(world, output="out"))


@pytest.fixture(scope="module")
def merged(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of ``raymerge merge``, run once through the console script, and its config."""
    folder = tmp_path_factory.mktemp("merged")
    config = write_config(folder / "config.yaml", config_data(world, output="out"))
    ran = process([script(), "merge", config])
    assert ran.returncode == 0, ran.stderr
    (folder / "stdout").write_text(ran.stdout)
    (folder / "stderr").write_text(ran.stderr)
    return folder


# --- merge -------------------------------------------------------------------------------------


def test_the_output_folder_holds_what_the_contract_says(merged: Path) -> None:
    out = merged / "out"
    assert {path.name for path in out.iterdir() if path.is_file()} >= CONTRACT
    assert (out / "state").is_dir()
    assert all((out / name).stat().st_size for name in CONTRACT)
    assert not [path for path in tree(out) if path.endswith(".tmp")]


def test_lambdas_json(merged: Path, world: World) -> None:
    lambdas = read_json(merged / "out" / "lambdas.json")
    assert set(lambdas) == {"tasks", "layers", "values"}
    assert lambdas["tasks"] == list(CLASSES)
    model = open_clip.create_model(f"local-dir:{merged / 'out'}")
    assert lambdas["layers"] == list(model.visual.state_dict())  # no `visual.` prefix
    assert [len(row) for row in lambdas["values"]] == [len(lambdas["layers"])] * 4
    assert all(0 <= value <= 1 for row in lambdas["values"] for value in row)


def test_results_json(merged: Path) -> None:
    results = read_json(merged / "out" / "results.json")
    assert results["method"] == "adamerging"
    assert list(results["tasks"]) == list(CLASSES)
    for name, row in results["tasks"].items():
        assert set(row) >= {"top1", "loss", "entropy", "examples"}
        assert 0 <= row["top1"] <= 1
        assert row["loss"] > 0
        assert row["entropy"] > 0
        assert row["examples"] == 6 * len(CLASSES[name])
    mean = sum(row["top1"] for row in results["tasks"].values()) / 4
    assert results["average"]["top1"] == pytest.approx(mean)


def test_metrics_jsonl_has_a_line_a_step(merged: Path) -> None:
    lines = [json.loads(line) for line in (merged / "out" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert set(line) >= {"step", "loss", "entropy", "seconds"}
        assert list(line["entropy"]) == list(CLASSES)
        assert line["loss"] == pytest.approx(sum(line["entropy"].values()), rel=1e-5)
        assert line["seconds"] > 0


def test_the_resolved_config_runs_again_from_anywhere(
    merged: Path, raymerge: Commands, tmp_path: Path
) -> None:
    recorded = merged / "out" / "config.yaml"
    data = yaml.safe_load(recorded.read_text())
    assert data["output"] == str(merged / "out")
    assert data["method"]["clamp"] == "projected"  # defaults are spelled out
    moved = tmp_path / "elsewhere.yaml"
    moved.write_text(recorded.read_text())
    raymerge.ok("merge", moved, "--output", tmp_path / "again")
    for name in ("lambdas.json", "open_clip_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (merged / "out" / name).read_bytes()


def test_the_model_card(merged: Path) -> None:
    card = (merged / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "open_clip"
    for word in ("AdaMerging", *CLASSES, "colour.safetensors", "5 steps"):
        assert word in card
    results = read_json(merged / "out" / "results.json")
    assert f"{results['average']['top1']:.1%}" in card


def test_the_report_is_one_page_that_requests_nothing(merged: Path) -> None:
    page = (merged / "out" / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)
    assert all(name in page for name in CLASSES)


def test_scores_go_to_stdout_and_nothing_else_to_stderr(merged: Path) -> None:
    out, err = ((merged / name).read_text() for name in ("stdout", "stderr"))
    results = read_json(merged / "out" / "results.json")
    for name, row in results["tasks"].items():
        assert re.search(rf"^  {name} +{row['top1']:.2%}  of {row['examples']}$", out, re.M), out
    assert re.search(rf"^  mean +{results['average']['top1']:.2%}$", out, re.M), out
    assert out.endswith(f"written to {merged / 'out'}\n")
    assert err == ""  # progress bars are off in tests


def test_output_is_relative_to_where_one_is(
    config: Path, raymerge: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ran = raymerge.ok("merge", config, "--output", "mine", "-o", "method=average")
    assert f"written to {tmp_path / 'here' / 'mine'}" in ran.out
    assert not (tmp_path / "out").exists()  # not the config's


def test_merge_without_test_images_prints_where(
    world: World, raymerge: Commands, tmp_path: Path
) -> None:
    data = config_data(world, method="average", output="out")
    for task in data["tasks"]:
        del task["test"], task["adapt"]
    ran = raymerge.ok("merge", write_config(tmp_path / "config.yaml", data))
    assert ran.out == f"written to {tmp_path / 'out'}\n"


def test_overwrite_and_resume_and_neither(config: Path, raymerge: Commands, tmp_path: Path) -> None:
    one = ("-o", "optimizer.steps=1", "-o", "method.granularity=task")
    raymerge.ok("merge", config, *one)
    before = tree(tmp_path)
    refused(raymerge("merge", config, *one), "in use", "--resume", "--overwrite")
    refused(raymerge("merge", config, *one, "--resume", "-o", "seed=5"), "config differs")
    assert tree(tmp_path) == before
    two = (*one, "-o", "optimizer.steps=2")
    raymerge.ok("merge", config, *two, "--resume")
    assert read_steps(tmp_path / "out" / "metrics.jsonl") == [1, 2]
    raymerge.ok("merge", config, *one, "--overwrite")
    assert read_steps(tmp_path / "out" / "metrics.jsonl") == [1]


def test_a_failed_run_is_one_line_and_exit_code_one(
    config: Path, raymerge: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RunError("worker 3 died; run again with --resume")

    monkeypatch.setattr("raymerge.runs.merge.learn_lambdas", fail)
    ran = raymerge("merge", config)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "raymerge: error: worker 3 died; run again with --resume\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ZeroDivisionError("a\nb"), "ZeroDivisionError: a b; run again with --verbose"),
        (KeyError(), "KeyError: no message; run again with --verbose"),
        (MemoryError(), "out of memory; use fewer workers"),
    ],
)
def test_a_bug_is_one_line_unless_asked(
    config: Path,
    raymerge: Commands,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    line: str,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("raymerge.runs.merge.learn_lambdas", fail)
    ran = raymerge("merge", config)
    assert ran.code == 1
    assert ran.err.startswith(f"raymerge: error: {line}")
    assert ran.err.count("\n") == 1
    if not isinstance(error, MemoryError):
        with pytest.raises(type(error)):
            raymerge("merge", config, "--verbose", "--overwrite")


# --- eval --------------------------------------------------------------------------------------


def test_eval_of_the_output_prints_its_results(merged: Path, raymerge: Commands) -> None:
    before = tree(merged)
    ran = raymerge.ok("eval", merged / "config.yaml", "--model", merged / "out", "--json")
    scored, recorded = json.loads(ran.out), read_json(merged / "out" / "results.json")
    assert (scored["tasks"], scored["average"]) == (recorded["tasks"], recorded["average"])
    text = raymerge.ok("eval", merged / "config.yaml", "--model", merged / "out").out
    for name, row in recorded["tasks"].items():
        assert re.search(rf"{name} +{row['top1']:.2%}", text)
    assert tree(merged) == before


def test_eval_individual_is_the_individual_method(
    config: Path, raymerge: Commands, tmp_path: Path
) -> None:
    ran = raymerge.ok("eval", config, "--model", "individual", "--json")
    raymerge.ok("merge", config, "-o", "method=individual")
    results = read_json(tmp_path / "out" / "results.json")
    assert json.loads(ran.out)["tasks"] == results["tasks"]


def test_eval_by_default_is_of_the_pretrained_model(
    config: Path, raymerge: Commands, tmp_path: Path
) -> None:
    ran = raymerge.ok("eval", config)
    assert ran.out.startswith("pretrained\n")
    raymerge.ok("merge", config, "-o", "method=zero_shot")
    results = read_json(tmp_path / "out" / "results.json")
    assert f"{results['average']['top1']:.2%}" in ran.out


# --- inspect -----------------------------------------------------------------------------------


def test_inspect_text_and_json(world: World, raymerge: Commands) -> None:
    whole = world.root / "pretrained" / "open_clip_model.safetensors"
    data = json.loads(raymerge.ok("inspect", whole, "--json").out)
    assert data["format"] == "safetensors"
    assert data["bytes"] == whole.stat().st_size
    assert data["tensors"] == len(data["keys"])
    assert data["visual"]["tensors"] == 32
    assert data["visual"]["parameters"] == 115_200
    assert [data["visual"][k] for k in ("width", "layers", "patch", "image_size")] == [64, 2, 8, 32]
    assert data["keys"]["visual.proj"] == {"shape": [64, 24], "dtype": "float32"}
    text = raymerge.ok("inspect", whole).out
    for word in (str(whole), "safetensors", "32 tensors", "115,200", "32 px", "activation  GELU"):
        assert word in text
    assert "more (--json lists all)" in text


def test_inspect_takes_folders_and_torch_files(
    world: World, raymerge: Commands, tmp_path: Path
) -> None:
    assert "safetensors" in raymerge.ok("inspect", world.root / "pretrained").out
    torch.save({"state_dict": {"a": torch.zeros(2, 3).half()}}, tmp_path / "x.pt")
    data = json.loads(raymerge.ok("inspect", tmp_path / "x.pt", "--json").out)
    assert (data["format"], data["visual"]) == ("torch", None)
    assert data["keys"] == {"a": {"shape": [2, 3], "dtype": "float16"}}


def test_inspect_of_what_is_nearly_nothing(raymerge: Commands, tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors")
    assert "tensors     0" in raymerge.ok("inspect", tmp_path / "none.safetensors").out
    odd = {"class_embedding": torch.zeros(3), "conv1.weight": torch.zeros(3)}
    save_file(odd, tmp_path / "odd.safetensors")
    assert "tensors     2" in raymerge.ok("inspect", tmp_path / "odd.safetensors").out


@pytest.mark.parametrize("content", [None, b"", b"words", bytes(100)])
def test_inspect_of_what_is_no_checkpoint(
    raymerge: Commands, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "x.pt"
    if content is not None:
        path.write_bytes(content)
    refused(raymerge("inspect", path), str(path))


# --- help, version, streams --------------------------------------------------------------------


def test_version_and_help(raymerge: Commands) -> None:
    assert raymerge.ok("--version").out == f"raymerge {package.__version__}\n"
    text = raymerge.ok("--help").out
    assert raymerge.ok().out == text
    for command in ("demo", "plan", "merge", "eval", "inspect", "report"):
        assert re.search(rf"^ +{command} ", text, re.M)
        assert f"usage: raymerge {command}" in raymerge.ok(command, "--help").out
    assert "130" in text


def test_python_dash_m_is_the_same() -> None:
    ran = process([sys.executable, "-m", "raymerge", "--version"])
    assert (ran.returncode, ran.stdout) == (0, f"raymerge {package.__version__}\n")
    ran = process([sys.executable, "-m", "raymerge", "mrege"])
    assert ran.returncode == 2
    assert re.fullmatch(r"raymerge: error: .*'mrege'.*\n", ran.stderr)


def test_exit_codes_leave_the_process(tmp_path: Path) -> None:
    for argv, code in ((["--version"], 0), (["plan", tmp_path / "none.yaml"], 2), (["x"], 2)):
        assert process([script(), *argv]).returncode == code


def test_a_closed_pipe_is_no_error(world: World) -> None:
    """``raymerge inspect … --json | head -1``, with more to say than a pipe holds."""
    whole = world.root / "pretrained"
    code = (
        "import raymerge.models.checkpoints.inspect as i\n"
        "show = i.inspect_checkpoint\n"
        "i.inspect_checkpoint = lambda p: {**show(p), 'padding': ['x' * 100] * 10000}\n"
        "import sys; from raymerge.cli import main; sys.exit(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "inspect", str(whole), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "{\n"
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait(60) == 0


def test_a_terminal_without_greek_letters_is_no_error(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "config.yaml", config_data(world, method="ties"))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["plan", str(config)]) == 0
    assert b"TIES-Merging (20%, sum, \\u03bb=0.3)" in written.getvalue()


# --- signals -----------------------------------------------------------------------------------


def _start(argv: Sequence[object]) -> subprocess.Popen[str]:
    def default_signals() -> None:  # a shell's background job would ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [str(arg) for arg in argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
        preexec_fn=default_signals,
    )


def _wait_for_steps(metrics: Path, child: subprocess.Popen[str], steps: int) -> None:
    deadline = time.monotonic() + 90
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline, "no step in 90 s"
        time.sleep(0.02)


def test_interrupt_and_terminate_keep_the_state_and_resume(
    world: World, tmp_path: Path, raymerge: Commands
) -> None:
    """Both at once, to pay for starting a process once only."""
    data = config_data(world)
    for task in data["tasks"]:
        del task["test"]
    config = write_config(tmp_path / "config.yaml", data)
    many = ("-o", "optimizer.steps=3000")
    signals = (signal.SIGINT, signal.SIGTERM)
    outs = [tmp_path / number.name for number in signals]
    children = [_start([script(), "merge", config, *many, "--output", out]) for out in outs]
    for number, out, child in zip(signals, outs, children, strict=True):
        _wait_for_steps(out / "metrics.jsonl", child, 2)
        sent = time.monotonic()
        child.send_signal(number)
        stdout, stderr = child.communicate(timeout=60)
        assert time.monotonic() - sent < 30, "soon, also on a busy machine"
        assert child.returncode == 130
        assert (stdout, stderr) == ("", "raymerge: interrupted; --resume continues it\n")
        assert not (out / "results.json").exists()
    done = [max(int(state.name[5:]) for state in (out / "state").glob("step-*")) for out in outs]
    for out, step in zip(outs, done, strict=True):
        written = read_steps(out / "metrics.jsonl")[-1]
        assert written - step in (0, 1), "one more where the interrupt fell behind the line"
        further = ("-o", f"optimizer.steps={step + 1}")
        raymerge.ok("merge", config, *further, "--output", out, "--resume")
        assert read_steps(out / "metrics.jsonl") == list(range(1, step + 2))
    reference = tmp_path / "undisturbed"
    raymerge.ok("merge", config, "-o", f"optimizer.steps={done[0] + 1}", "--output", reference)
    for name in ("lambdas.json", "open_clip_model.safetensors"):
        assert (outs[0] / name).read_bytes() == (reference / name).read_bytes()


# One process imports everything once, then forks a child per accident; each child kills itself
# where the accident says, as the kernel would, with nothing run after.
_ACCIDENTS = """
import json, os, signal, sys
import raymerge.cli, raymerge.engine.driver.loop
import raymerge.runs.folder as rundir, raymerge.runs.inputs as inputs
import raymerge.runs.merge, raymerge.runs.state as state

def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def after_step(step, torn=False):
    observe = rundir.Recorder.observe
    def wrapped(self, record, new):
        observe(self, record, new)
        if record.step == step:
            if torn:
                self._metrics.write('{"step": %d, "lo' % (step + 1))
                self._metrics.flush()
            kill()
    rundir.Recorder.observe = wrapped

def in_save(step):
    write = state._write_synced
    def wrapped(path, payload):
        if path.name == "manifest.json" and json.loads(payload)["step"] == step:
            kill()
        write(path, payload)
    state._write_synced = wrapped

def in_export():
    inputs.write_merged = kill

def in_weights():
    import raymerge.models.write_merged as export
    export.SafetensorsWriter.write = kill

def in_commit():
    import raymerge.files.atomic as files
    files._commit = kill

def in_results():
    rundir.RunFolder.write_results = kill

def in_prepare():
    rundir.write_text = kill

accidents = json.loads(sys.argv[1])
for name, call, argv in accidents:
    child = os.fork()
    if child == 0:
        exec(call)
        raymerge.cli.main(argv)
        os._exit(99)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)
"""

ACCIDENTS = {
    "before-the-config": "in_prepare()",
    "step-1": "after_step(1)",
    "step-2-saved": "after_step(2)",
    "step-3": "after_step(3)",
    "step-3-torn": "after_step(3, torn=True)",
    "in-save-4": "in_save(4)",
    "step-6-the-last": "after_step(6)",
    "in-export": "in_export()",
    "in-weights": "in_weights()",
    "in-commit": "in_commit()",
    "in-results": "in_results()",
}
SIX = ("-o", "optimizer.steps=6", "-o", "state.every_steps=2")


@pytest.fixture(scope="module")
def killed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, each killed by its accident, and one that was not."""
    folder = tmp_path_factory.mktemp("killed")
    data = config_data(world)
    for task in data["tasks"]:
        del task["test"]
    config = str(write_config(folder / "config.yaml", data))
    runs: list[Any] = [
        (name, call, ["merge", config, *SIX, "--output", str(folder / name)])
        for name, call in ACCIDENTS.items()
    ]
    again = ["merge", config, *SIX, "-o", "seed=9", "--output"]
    runs.append(("overwrite", "after_step(3)", [*again, str(folder / "overwrite")]))
    runs.append(
        ("overwrite", "in_prepare()", ["merge", config, *SIX, "--output",
                                       str(folder / "overwrite"), "--overwrite"])
    )  # fmt: skip
    ran = python(_ACCIDENTS, json.dumps(runs))
    assert ran.returncode == 0, ran.stderr
    return folder


@pytest.fixture(scope="module")
def undisturbed(killed: Path) -> Path:
    assert main(["merge", f"{killed}/config.yaml", *SIX, "--output", f"{killed}/undisturbed"]) == 0
    return killed / "undisturbed"


def _same_run(output: Path, reference: Path) -> None:
    assert read_steps(output / "metrics.jsonl") == [1, 2, 3, 4, 5, 6]
    for name in ("lambdas.json", "open_clip_model.safetensors"):
        assert (output / name).read_bytes() == (reference / name).read_bytes(), name


@pytest.mark.parametrize("name", ACCIDENTS)
def test_a_killed_run_resumes_as_if_nothing_had_happened(
    killed: Path, undisturbed: Path, raymerge: Commands, name: str
) -> None:
    out = killed / name
    assert not (out / "results.json").exists()
    raymerge.ok("merge", killed / "config.yaml", *SIX, "--output", out, "--resume")
    _same_run(out, undisturbed)
    assert {path.name for path in out.iterdir()} >= CONTRACT


def test_a_kill_loses_at_most_the_steps_since_the_last_state(killed: Path) -> None:
    """Looked at in runs that the test above may have finished: states of even steps alone."""
    kept = sorted(path.name for path in (killed / "step-3" / "state").glob("step-*"))
    assert kept[0] == "step-00000002"


def test_a_kill_while_a_run_is_replaced_leaves_a_folder_that_can_be_replaced(
    killed: Path, undisturbed: Path, raymerge: Commands
) -> None:
    out = killed / "overwrite"
    config = killed / "config.yaml"
    refused(raymerge("merge", config, *SIX, "--output", out, "--resume"), "config differs")
    raymerge.ok("merge", config, *SIX, "--output", out, "--overwrite")
    _same_run(out, undisturbed)

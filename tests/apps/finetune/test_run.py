"""`raymerge finetune`: its files, resuming bit for bit, and refused input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from commands import Commands, cache_tokenizer, environment, refused, tree
from finetune_world import CLASSES, TrainingWorld, make_training_world
from safetensors.torch import load_file

from raymerge.apps.finetune.run import finetune
from raymerge.apps.finetune.targets import Target, make_targets, training_images
from raymerge.apps.finetune.trainer import Trainer, TrainingJob, _spec
from raymerge.config import FinetuneConfig, load_config

EVERYTHING = [*(f"experts/{name}" for name in CLASSES), "joint"]


@pytest.fixture
def raymerge(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    cache_tokenizer(monkeypatch)
    return Commands(capsys)


@pytest.fixture(autouse=True)
def _cached(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_tokenizer(monkeypatch)


@pytest.fixture(scope="module")
def both(training_world: TrainingWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts and joint reference, trained for six steps in this process."""
    output = tmp_path_factory.mktemp("both") / "out"
    finetune(training_world.parse(output, finetune={"targets": "both"}))
    return output


def _config(world: TrainingWorld, path: Path, **changes: Any) -> Path:
    """The config as a file beside the world's files."""
    data = {**world.data(**changes), "output": str(path / "out")}
    data["model"] = f"local-dir:{world.root / 'pretrained'}"
    for task in data["tasks"]:
        for key in ("train", "test"):
            if key in task:
                task[key] = str(world.root / task[key])
    (path / "config.yaml").write_text(yaml.safe_dump(data))
    return path / "config.yaml"


def _lines(output: Path, place: str) -> list[dict[str, Any]]:
    text = (output / f"{place}.metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def _same(a: Path, b: Path) -> None:
    for place in EVERYTHING:
        name = f"{place}.safetensors"
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def _trainer(world: TrainingWorld, output: Path, place: str, **changes: Any) -> Trainer:
    config = world.parse(output, **changes)
    (target,) = (each for each in _targets(world, output, **changes) if each.place == place)
    return Trainer(config, target, _spec(TrainingJob(config, target, 1, threads=1)))


def _targets(world: TrainingWorld, output: Path, **changes: Any) -> list[Target]:
    config = world.parse(output, **changes)
    return make_targets(config, training_images(config), output)


# --- training ------------------------------------------------------------------------------------


def test_training_learns_the_colours(training_world: TrainingWorld, tmp_path: Path) -> None:
    result = finetune(
        training_world.parse(tmp_path / "out", finetune={"targets": "both", "steps": 30})
    )
    for place in EVERYTHING:
        lines = _lines(tmp_path / "out", place)
        assert [line["step"] for line in lines] == list(range(1, 31))
        assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
        assert lines[-1]["top1"] == 1.0
    assert {name: score.top1 for name, score in result.experts.items()} == dict.fromkeys(CLASSES, 1)
    assert {name: score.top1 for name, score in result.joint.items()} == dict.fromkeys(CLASSES, 1)


def test_the_files_of_a_training_run(both: Path, training_world: TrainingWorld) -> None:
    files = {path for path in tree(both) if Path(path).is_file()}
    expected = ["finetune.yaml", "results.json", "state/attempt-0001"]
    expected += [
        f"{place}{kind}" for place in EVERYTHING for kind in (".safetensors", ".metrics.jsonl")
    ]
    assert files == {str(both / name) for name in expected}
    results = json.loads((both / "results.json").read_text())
    assert list(results["targets"]) == EVERYTHING
    assert results["targets"]["joint"]["images"] == {"colour": 15, "shade": 10, "tone": 10}
    for part in ("experts", "joint"):
        assert set(results[part]["tasks"]) == set(CLASSES)
        assert results[part]["tasks"]["colour"]["examples"] == 9
    line = _lines(both, "experts/shade")[2]
    assert set(line) == {"step", "loss", "top1", "lr", "seconds"}
    rates = [each["lr"] for each in _lines(both, "experts/shade")]
    assert rates[0] == rates[1] == 1e-3
    assert rates == sorted(rates, reverse=True)


def test_only_the_visual_tower_is_written_and_it_moved(
    both: Path, training_world: TrainingWorld
) -> None:
    folder = training_world.root / "pretrained"
    pretrained = load_file(folder / "open_clip_model.safetensors")
    for place in EVERYTHING:
        state = load_file(both / f"{place}.safetensors")
        assert set(state) == {key for key in pretrained if key.startswith("visual.")}
        assert all(tensor.dtype == torch.float32 for tensor in state.values())
        assert all(not torch.equal(state[key], pretrained[key]) for key in state)


def test_the_head_is_the_pretrained_text_towers_and_frozen(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    trainer = _trainer(training_world, tmp_path, "experts/colour")
    head = trainer._model.head(0)
    before = head.clone()
    assert not head.requires_grad
    trainer.backward(trainer._batch(0))
    trainer.optimizer.step()
    assert torch.equal(head, before)
    trained = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert trained == len(list(trainer._encoder.visual.parameters()))


def test_an_experts_first_gradient_is_autograds_through_open_clip(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    """Passes of two images give what one batch through open_clip's own model gives."""
    cluster = {"workers": 0, "cpus_per_worker": 1, "micro_batch": 2}
    trainer = _trainer(training_world, tmp_path, "experts/colour", cluster=cluster)
    ((pixels, labels),) = trainer._batch(0)
    score = trainer.backward([(pixels, labels)])
    model = open_clip.create_model(f"local-dir:{training_world.root / 'pretrained'}").eval()
    images = trainer._encoder.preprocess.normalise(pixels)
    logits = model.encode_image(images, normalize=True) @ trainer._model.head(0)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    assert score.loss[0] == pytest.approx(loss.item(), rel=1e-5)
    assert score.top1[0] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    for mine, theirs in zip(trainer.parameters, model.visual.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_step_of_the_joint_reference_sees_every_task(
    both: Path, training_world: TrainingWorld, tmp_path: Path
) -> None:
    for line in _lines(both, "joint"):
        assert list(line["tasks"]) == list(CLASSES)
        losses = [row["loss"] for row in line["tasks"].values()]
        assert line["loss"] == pytest.approx(sum(losses) / 3)
    changes = {"finetune": {"targets": "both"}}
    joint = _trainer(training_world, tmp_path, "joint", **changes)
    score = joint.backward(joint._batch(0))
    total = [torch.zeros_like(each) for each in joint.parameters]
    for k, name in enumerate(CLASSES):  # its gradient is the mean of the experts' own
        expert = _trainer(training_world, tmp_path, f"experts/{name}", **changes)
        assert expert.backward(expert._batch(0)).loss[0] == pytest.approx(score.loss[k], rel=1e-5)
        total = [t + p.grad / 3 for t, p in zip(total, expert.parameters, strict=True)]
    for mine, mean in zip(joint.parameters, total, strict=True):
        torch.testing.assert_close(mine.grad, mean, rtol=1e-4, atol=1e-6)


def test_bfloat16_trains_float32_weights(training_world: TrainingWorld, tmp_path: Path) -> None:
    finetune(training_world.parse(tmp_path / "out", precision="bfloat16"))
    state = load_file(tmp_path / "out" / "experts" / "colour.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in state.values())


def test_the_default_recipe_is_the_task_vectors_one() -> None:
    recipe = FinetuneConfig()
    assert (recipe.lr, recipe.weight_decay, recipe.batch_size) == (1e-5, 0.1, 128)
    assert (recipe.warmup_steps, recipe.clip_norm, recipe.augment) == (500, 1.0, "none")
    assert recipe.steps_for("cars", 64) == 640


def test_epochs_and_steps_of_each_task(training_world: TrainingWorld, tmp_path: Path) -> None:
    def steps(**recipe: Any) -> list[int]:
        recipe = {"targets": "both", "steps": None, **recipe}
        return [each.steps for each in _targets(training_world, tmp_path, finetune=recipe)]

    # 15, 10 and 10 images in batches of 4: 4, 3 and 3 steps an epoch
    assert steps(epochs=2) == [8, 6, 6, 8]
    assert steps(epochs={"default": 2, "shade": 5}) == [8, 15, 6, 15]
    assert steps(epochs={"shade": 5}) == [40, 15, 30, 40]
    assert steps(steps={"default": 7, "tone": 9}) == [7, 7, 9, 9]
    assert steps(steps=7, joint_steps=3) == [7, 7, 7, 3]


# --- resume, and where it runs -------------------------------------------------------------------


@pytest.mark.usefixtures("local_ray")
def test_ray_tasks_write_the_same_bytes(
    both: Path, training_world: TrainingWorld, tmp_path: Path
) -> None:
    cluster = {"workers": 2, "cpus_per_worker": 1}
    finetune(training_world.parse(tmp_path / "out", cluster=cluster, finetune={"targets": "both"}))
    _same(both, tmp_path / "out")


@pytest.mark.usefixtures("local_ray")
def test_an_error_in_a_ray_task_is_its_own_line(
    training_world: TrainingWorld, tmp_path: Path, raymerge: Commands
) -> None:
    config = _config(training_world, tmp_path, finetune={"lr": 1e20})
    ran = raymerge("finetune", config, "-o", "cluster.workers=1")
    assert ran.code == 1
    assert "the gradient is NaN or infinite; lower the learning rate" in ran.err
    assert "Traceback" not in ran.err


def test_an_interrupted_run_resumes_to_the_bit(
    both: Path,
    training_world: TrainingWorld,
    tmp_path: Path,
    raymerge: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted in the second expert and in the joint reference, each time after a saved step."""
    config = _config(training_world, tmp_path, finetune={"targets": "both"})
    backward, calls = Trainer.backward, 0

    def interrupted(self: Trainer, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (6 + 4, 6 + 4 + 4 + 6 + 6):  # steps are 1 to 6; state at 2 and 4
            raise KeyboardInterrupt
        return backward(self, batch)

    monkeypatch.setattr(Trainer, "backward", interrupted)
    assert raymerge("finetune", config).code == 130
    assert [p.name for p in (tmp_path / "out/state/experts/shade").iterdir()] == ["step-00000002"]
    assert raymerge("finetune", config, "--resume").code == 130
    ran = raymerge.ok("finetune", config, "--resume")
    assert "raymerge: experts/shade: finished, skipped" in ran.err
    _same(both, tmp_path / "out")
    for place in EVERYTHING:
        assert [line["step"] for line in _lines(tmp_path / "out", place)] == [1, 2, 3, 4, 5, 6]
    assert not list((tmp_path / "out" / "state").rglob("step-*"))


def test_a_killed_run_resumes_to_the_bit(training_world: TrainingWorld, tmp_path: Path) -> None:
    recipe = {"steps": 60, "targets": "joint", "augment": "open_clip"}
    config = _config(training_world, tmp_path, finetune=recipe)
    argv = [sys.executable, "-m", "raymerge", "finetune", str(config)]
    run = subprocess.Popen(argv, env=environment(), stderr=subprocess.DEVNULL)
    states = tmp_path / "out" / "state" / "joint"
    deadline = time.monotonic() + 120
    while not list(states.glob("step-*")) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "out" / "joint.safetensors").exists()
    finetune(load_config(config), resume=True)
    finetune(load_config(config, [f"output={tmp_path / 'again'}"]))
    mine, whole = (tmp_path / name / "joint.safetensors" for name in ("out", "again"))
    assert mine.read_bytes() == whole.read_bytes()


def test_resume_trains_what_was_added_and_skips_what_is_there(
    training_world: TrainingWorld, tmp_path: Path, raymerge: Commands
) -> None:
    config = _config(training_world, tmp_path)
    raymerge.ok("finetune", config)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/experts").glob("*.safetensors")}
    ran = raymerge.ok("finetune", config, "--resume", "-o", "finetune.targets=both")
    assert ran.err.count("finished, skipped") == 3
    assert (tmp_path / "out" / "joint.safetensors").exists()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_trained_models_merge(
    both: Path, training_world: TrainingWorld, tmp_path: Path, raymerge: Commands
) -> None:
    config = _config(training_world, tmp_path)
    experts = [
        f"tasks.{k}.checkpoint={both}/experts/{name}.safetensors" for k, name in enumerate(CLASSES)
    ]
    options = [part for each in experts for part in ("-o", each)]
    raymerge.ok("merge", config, *options, "-o", "method=task_arithmetic")
    joint = ("-o", f"method={{name: joint, checkpoint: {both}/joint.safetensors}}")
    raymerge.ok("merge", config, *options, *joint, "--output", tmp_path / "joint")
    merged = json.loads((tmp_path / "joint" / "results.json").read_text())
    trained = json.loads((both / "results.json").read_text())
    for name, row in trained["joint"]["tasks"].items():
        assert merged["tasks"][name] == pytest.approx(row, rel=1e-5)


# --- refusals: one line, exit code 2, nothing written --------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["finetune.stepz=2"], ["finetune.stepz: unknown key", "did you mean steps?"]),
        (["finetune.targets=all"], ["finetune.targets: "]),
        (["finetune.augment=flip"], ["finetune.augment: "]),
        (["finetune.lr=0"], ["finetune.lr: "]),
        (["finetune.batch_size=0"], ["finetune.batch_size: "]),
        (["finetune.steps=0"], ["finetune.steps.default: "]),
        (["finetune.epochs=2"], ["finetune: epochs and steps say the same thing twice"]),
        (["finetune.steps={colur: 3}"], ["finetune.steps.colur: no task has this name"]),
        (["finetune.steps={colour: 3}"], ["finetune.steps: neither shade nor default is given"]),
        (["finetune.warmup_steps=500"], ["finetune.warmup_steps: 500", "takes 6 steps"]),
        (["tasks.1.train=nowhere"], ["tasks[1].train", "no such folder"]),
        (["tasks.1.train=null", "tasks.1.test=null"], ["tasks[1]"]),
        (["tasks.1.train=null", "tasks.0.train=null", "tasks.2.train=null"], ["checkpoint"]),
        (["tasks.0.classnames=[red, green]"], ["tasks[0].train", "no class for folder 'blue'"]),
        (["tasks.0.classnames=[red, green, blue, pink]"], ["no image of 'pink'"]),
        (["model=local-dir:nowhere"], ["model", "nowhere"]),
        (["cluster.workers=2", "cluster.cpus_per_worker=100000"], ["cluster.cpus_per_worker"]),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_before_anything_is_written(
    training_world: TrainingWorld,
    tmp_path: Path,
    raymerge: Commands,
    overrides: list[str],
    says: list[str],
) -> None:
    config = _config(training_world, tmp_path)
    before = tree(tmp_path)
    options = [part for each in overrides for part in ("-o", each)]
    refused(raymerge("finetune", config, *options), *says)
    assert tree(tmp_path) == before


def test_an_output_in_use_or_of_another_kind_is_refused(
    training_world: TrainingWorld, tmp_path: Path, raymerge: Commands
) -> None:
    config = _config(training_world, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for flags in ((), ("--resume",)):
        ran = raymerge("finetune", config, *flags)
        refused(ran, "is in use and was not written by `raymerge finetune`", "no finetune.yaml")
    refused(raymerge("finetune", config, "--output", tmp_path / "config.yaml"), "is a file")
    refused(raymerge("finetune", config, "-o", "output=null"), "output: missing")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    (tmp_path / "out" / "finetune.yaml").write_text("")
    refused(raymerge("finetune", config), "is in use;", "--resume to continue that run")


def test_resume_refuses_a_changed_config_and_changed_images(
    both: Path, tmp_path: Path, raymerge: Commands
) -> None:
    world = make_training_world(tmp_path / "world")
    config = _config(world, tmp_path)
    raymerge.ok("finetune", config)
    before = tree(tmp_path / "out")
    for change in ("finetune.lr=2e-3", "seed=9", "finetune.steps=7", "precision=bfloat16"):
        ran = raymerge("finetune", config, "--resume", "-o", change)
        refused(ran, "was trained with another config or on other images")
    (world.root / "data/colour/train/red/000.png").rename(tmp_path / "gone.png")
    refused(raymerge("finetune", config, "--resume"), "was trained with another config")
    assert tree(tmp_path / "out") == before


def test_a_damaged_training_image_is_found_first(tmp_path: Path, raymerge: Commands) -> None:
    world = make_training_world(tmp_path / "world")
    bad = world.root / "data" / "shade" / "train" / "dark" / "001.png"
    bad.write_bytes(bad.read_bytes()[:60])
    refused(raymerge("finetune", _config(world, tmp_path)), "001.png", "replace or remove it")
    assert not (tmp_path / "out").exists()


def test_merging_needs_a_checkpoint(
    training_world: TrainingWorld, tmp_path: Path, raymerge: Commands
) -> None:
    config = _config(training_world, tmp_path)
    refused(raymerge("merge", config), "no task has a checkpoint")
    refused(raymerge("merge", config, "-o", "method=average"), "no task has a checkpoint")


def test_a_task_without_training_images_is_tested_only(
    training_world: TrainingWorld, tmp_path: Path
) -> None:
    data = training_world.data(finetune={"targets": "both"})
    del data["tasks"][1]["train"]
    result = finetune(
        training_world.parse(tmp_path / "out", tasks=data["tasks"], finetune={"targets": "both"})
    )
    assert set(result.experts) == {"colour", "tone"}
    assert set(result.joint) == set(CLASSES)
    assert not (tmp_path / "out" / "experts" / "shade.safetensors").exists()
    shutil.rmtree(tmp_path / "out")

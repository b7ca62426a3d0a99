"""A saved head replaces the zero-shot one everywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from releases import CONTAINERS, ClassificationHead, encoder_of, write_release
from safetensors.torch import load_file, save_file
from torch import Tensor
from world import CLASSES, World

from raymerge.apps.finetune.run import finetune
from raymerge.config import TaskConfig
from raymerge.engine.messages import WorkerSpec
from raymerge.engine.scores import TaskScore
from raymerge.engine.worker.clip_model import ClipModel
from raymerge.errors import CheckpointError, ConfigError, UserError
from raymerge.models.heads import saved_head, zero_shot_head
from raymerge.runs.merge import evaluate, merge
from raymerge.runs.plan.make import check
from raymerge.runs.state import fingerprint

WHERE = "tasks[0]"


def _task(head: Path, classes: int = 3) -> TaskConfig:
    names = tuple(f"class {c}" for c in range(classes))
    return TaskConfig(name="colour", checkpoint="x", classnames=names, head=str(head))


def _random(classes: int = 3, features: int = 24) -> Tensor:
    return torch.randn(classes, features, generator=torch.Generator().manual_seed(classes))


WRITERS: dict[str, Callable[[Tensor, Path], None]] = {
    **{
        f"released, {name}": lambda w, p, name=name: write_release(ClassificationHead(w), p, name)
        for name in CONTAINERS
    },
    "linear": lambda w, p: torch.save(ClassificationHead(w).state_dict(), p),
    "weight alone": lambda w, p: torch.save({"weight": w}, p),
    "safetensors": lambda w, p: save_file({"weight": w.clone()}, p),
    "with a zero bias": lambda w, p: save_file({"weight": w.clone(), "bias": w[:, 0] * 0}, p),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_gives_the_transposed_weight(tmp_path: Path, writer: str) -> None:
    weight_CD = _random()
    WRITERS[writer](weight_CD, tmp_path / "head.pt")
    head_DC = saved_head(_task(tmp_path / "head.pt"), WHERE, 24)
    assert torch.equal(head_DC, weight_CD.t())
    assert head_DC.is_contiguous()
    assert head_DC.dtype == torch.float32


def test_half_precision_is_widened(tmp_path: Path) -> None:
    save_file({"weight": _random().half()}, tmp_path / "head.safetensors")
    head_DC = saved_head(_task(tmp_path / "head.safetensors"), WHERE, 24)
    assert torch.equal(head_DC, _random().half().float().t())


NESTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "compiled": lambda weight: {"_orig_mod.weight": weight},
    "training code": lambda weight: {
        "model": {"fc.weight": weight, "fc.bias": torch.zeros(3)},
        "optimizer": {"state": {0: torch.ones(2)}},
    },
    "beside its tower": lambda weight: {"visual.proj": torch.ones(4, 24), "head.weight": weight},
}


@pytest.mark.parametrize("nest", NESTS)
def test_the_only_head_of_a_file_is_found(tmp_path: Path, nest: str) -> None:
    torch.save(NESTS[nest](_random()), tmp_path / "x.pt")
    assert torch.equal(saved_head(_task(tmp_path / "x.pt"), WHERE, 24), _random().t())


def test_of_several_heads_one_is_named(tmp_path: Path) -> None:
    heads = {"old": {"weight": _random() + 1}, "new": {"weight": _random()}}
    torch.save(heads, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"holds 2 heads of 3 classes .*name one: x\.pt#"):
        saved_head(_task(tmp_path / "x.pt"), WHERE, 24)
    head_DC = saved_head(_task(Path(f"{tmp_path}/x.pt#new")), WHERE, 24)
    assert torch.equal(head_DC, _random().t())


def test_the_logits_equal_those_of_the_released_class(tmp_path: Path) -> None:
    released = ClassificationHead(_random())
    write_release(released, tmp_path / "head.pt", "pickle 4")
    features_BD = torch.randn(5, 24)
    normalised_BD = torch.nn.functional.normalize(features_BD, dim=-1)
    logits_BC = normalised_BD @ saved_head(_task(tmp_path / "head.pt"), WHERE, 24)
    torch.testing.assert_close(logits_BC, released(features_BD).detach())


def _require_close(scores: Mapping[str, TaskScore], expected: Mapping[str, TaskScore]) -> None:
    """Assert near equality: on some processors, the last place of the text tower's products depends
    on the alignment of its weights."""
    assert scores.keys() == expected.keys()
    for task, score in scores.items():
        assert score.top1 == expected[task].top1
        assert asdict(score) == pytest.approx(asdict(expected[task]), rel=1e-5)


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "classes": (
        lambda p: save_file({"weight": _random(4)}, p),
        r"weight has shape \[4, 24\], but the task has 3 classnames and the model 24 features$",
    ),
    "features": (
        lambda p: save_file({"weight": _random(3, 5)}, p),
        r"weight has shape \[3, 5\], but the task has 3 classnames and the model 24 features$",
    ),
    "turned": (
        lambda p: save_file({"weight": _random().t().contiguous()}, p),
        r"weight has shape \[24, 3\], .*; save it transposed",
    ),
    "bias": (
        lambda p: write_release(ClassificationHead(_random(), bias=0.1), p),
        "has a bias that is not zero, .*save the head without it",
    ),
    "not normalised": (
        lambda p: write_release(ClassificationHead(_random(), normalize=False), p),
        r"is a head for features that are not normalised \(normalize=False\), .*; save a",
    ),
    "NaN": (
        lambda p: save_file({"weight": _random() * float("nan")}, p),
        "weight holds 72 NaN or Inf values",
    ),
    "integers": (
        lambda p: save_file({"weight": _random().long()}, p),
        r"weight is torch\.int64, not floating point",
    ),
    "another file": (
        lambda p: save_file({"visual.proj": _random()}, p),
        r"is no head: it holds visual\.proj; expected weight \(3 classes x 24 features\)",
    ),
    "more than a head": (
        lambda p: save_file({"weight": _random(), "scale": torch.ones(1)}, p),
        "is no head: it holds scale",
    ),
    "no file": (lambda p: None, "no such file"),
    "damaged": (lambda p: p.write_bytes(b"\x80damage") and None, "damaged"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_head_that_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    write, message = WRONG[case]
    path = tmp_path / "head.pt"
    write(path)
    with pytest.raises(
        CheckpointError, match=rf"^tasks\[0\]\.head \(colour\): checkpoint .*head\.pt: {message}"
    ) as raised:
        saved_head(_task(path), WHERE, 24)
    assert "\n" not in str(raised.value)


# --- in a config -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heads(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save the tasks' own zero-shot heads as the release does."""
    folder = tmp_path_factory.mktemp("heads")
    reference = f"local-dir:{world.root / 'pretrained'}"
    model = open_clip.create_model(reference).eval()
    tokenizer = open_clip.get_tokenizer(reference)
    paths = {}
    for k, task in enumerate(world.config["tasks"]):
        name = task["name"]
        head_DC = zero_shot_head(model, tokenizer, CLASSES[name], ["a photo of a {}."])
        paths[name] = folder / f"head_{name}.pt"
        write_release(ClassificationHead(head_DC.t()), paths[name], list(CONTAINERS)[k])
    return paths


def _tasks(world: World, heads: dict[str, Path], **changes: Any) -> list[dict[str, Any]]:
    return [{**t, "head": str(heads[t["name"]]), **changes} for t in world.config["tasks"]]


@pytest.mark.parametrize(
    "method",
    [
        {"name": "adamerging"},
        {"name": "adamerging", "objective": "kl"},
        {"name": "fisher", "images": 4},
        {"name": "fw_hard", "objective": "entropy", "iterations": 2, "images": 4},
    ],
    ids=lambda method: "-".join(str(value) for value in method.values()),
)
def test_a_merge_with_the_zero_shot_heads_saved_is_the_merge_without(
    world: World, heads: dict[str, Path], tmp_path: Path, method: dict[str, Any]
) -> None:
    templates = ["nothing like {}"]  # other words than those of the saved heads
    without = merge(world.parse(tmp_path / "a", method=method))
    tasks = _tasks(world, heads, templates=templates)
    with_heads = merge(world.parse(tmp_path / "b", method=method, tasks=tasks))
    _require_close(with_heads.scores, without.scores)
    if without.lambdas is not None:
        torch.testing.assert_close(with_heads.lambdas, without.lambdas, rtol=0, atol=1e-5)
    tasks = [{**task, "templates": templates} for task in world.config["tasks"]]
    other = merge(world.parse(tmp_path / "c", method=method, tasks=tasks))
    assert other.scores != without.scores


def test_eval_uses_saved_heads(world: World, heads: dict[str, Path]) -> None:
    tasks = _tasks(world, heads, templates=["nothing like {}"])
    _require_close(evaluate(world.parse(tasks=tasks)), evaluate(world.parse()))


def test_no_tokenizer_is_made_where_every_task_has_a_head(
    world: World, heads: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(resolved: Any) -> Any:
        raise AssertionError("a tokenizer")

    monkeypatch.setattr("raymerge.engine.worker.clip_model.make_tokenizer", fail)
    config = world.parse(tasks=_tasks(world, heads))
    model = ClipModel(config.model, config.tasks, WorkerSpec(), {})
    assert model.head(3).shape == (24, 4)
    assert model.classes == 4
    with pytest.raises(AssertionError, match="a tokenizer"):
        ClipModel(config.model, world.parse().tasks, WorkerSpec(), {})


def test_the_plan_checks_saved_heads(world: World, heads: dict[str, Path], tmp_path: Path) -> None:
    assert not check(world.parse(tasks=_tasks(world, heads)))[1]
    tasks = _tasks(world, heads)
    tasks[1]["head"] = str(heads["colour"])
    problems = check(world.parse(tasks=tasks))[1]
    assert [str(problem) for problem in problems] == [
        f"tasks[1].head (shade): checkpoint {heads['colour']}: weight has shape [3, 24], but the "
        "task has 2 classnames and the model 24 features"
    ]
    with pytest.raises(CheckpointError, match=r"tasks\[1\]\.head"):
        merge(world.parse(tmp_path / "out", tasks=tasks))
    assert not (tmp_path / "out").exists()


def test_a_relative_path_is_taken_from_the_config(world: World, heads: dict[str, Path]) -> None:
    task = {**world.config["tasks"][0], "head": "heads/head_colour.pt"}
    assert world.parse(tasks=[task]).tasks[0].head == str(world.root / "heads/head_colour.pt")


def test_a_head_needs_class_names(world: World) -> None:
    task = {"name": "a", "checkpoint": "a.pt", "head": "h.pt"}
    with pytest.raises(ConfigError, match=r"tasks\[0\].*'a' has a head but no classnames; list"):
        world.parse(tasks=[task])


@pytest.mark.parametrize("head", ["", 3, ["a"]])
def test_a_head_must_be_a_path(world: World, head: Any) -> None:
    task = {**world.config["tasks"][0], "head": head}
    with pytest.raises(ConfigError, match=r"tasks\[0\]\.head"):
        world.parse(tasks=[task])


def test_the_fingerprint_includes_saved_heads(world: World, heads: dict[str, Path]) -> None:
    plain, saved = world.parse(), world.parse(tasks=_tasks(world, heads))
    swapped = _tasks(world, heads)
    swapped[0]["head"] = "elsewhere.pt"
    fingerprints = {fingerprint(c) for c in (plain, saved, world.parse(tasks=swapped))}
    assert len(fingerprints) == 3


def test_resume_refuses_other_heads(world: World, heads: dict[str, Path], tmp_path: Path) -> None:
    tasks = [{**t, "test": None} for t in world.config["tasks"]]
    merge(world.parse(tmp_path / "out", tasks=tasks))
    changed = [{**t, "head": str(heads[t["name"]])} for t in tasks]
    with pytest.raises(UserError, match="this config differs from it"):
        merge(world.parse(tmp_path / "out", tasks=changed), resume=True)


def test_finetune_uses_saved_heads(world: World, heads: dict[str, Path], tmp_path: Path) -> None:
    recipe = {"targets": "experts", "steps": {"colour": 2}, "batch_size": 4, "warmup_steps": 0}
    base_task = {
        **world.config["tasks"][0],
        "train": world.config["tasks"][0]["test"],
        "adapt": None,
    }
    saved = {**base_task, "head": str(heads["colour"]), "templates": ["nothing like {}"]}
    plain = finetune(world.parse(tmp_path / "a", tasks=[base_task], finetune=recipe))
    with_head = finetune(world.parse(tmp_path / "b", tasks=[saved], finetune=recipe))
    _require_close(with_head.experts, plain.experts)
    assert with_head.targets[0].fingerprint != plain.targets[0].fingerprint
    wrong = {**saved, "head": str(heads["shade"]), "test": None}
    with pytest.raises(CheckpointError, match=r"tasks\[0\]\.head \(colour\)"):
        finetune(world.parse(tmp_path / "c", tasks=[wrong], finetune=recipe))
    assert not (tmp_path / "c").exists()


# --- a whole release ---------------------------------------------------------------------------


def test_a_whole_release_is_merged(world: World, heads: dict[str, Path], tmp_path: Path) -> None:
    """Pickled experts and heads give the same merge as state dicts."""
    folder = f"local-dir:{world.root / 'pretrained'}"
    tasks = _tasks(world, heads)
    for k, task in enumerate(tasks):
        clip = open_clip.create_model(folder, load_weights=True)
        clip.load_state_dict(load_file(task["checkpoint"]), strict=False)
        task["checkpoint"] = str(tmp_path / f"{task['name']}.pt")
        write_release(encoder_of(clip), Path(task["checkpoint"]), list(CONTAINERS)[k])
    plain = merge(world.parse(tmp_path / "a"))
    released = merge(world.parse(tmp_path / "b", tasks=tasks))
    torch.testing.assert_close(plain.lambdas, released.lambdas, rtol=0, atol=1e-5)
    weights = "open_clip_model.safetensors"
    merged, expected = (load_file(tmp_path / run / weights) for run in ("a", "b"))
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_the_released_zeroshot_file_is_refused_as_the_pretrained_model(
    world: World, tmp_path: Path
) -> None:
    clip = open_clip.create_model(f"local-dir:{world.root / 'pretrained'}")
    write_release(encoder_of(clip), tmp_path / "zeroshot.pt", "pickle 4")
    arch = world.root / "pretrained" / "open_clip_config.json"
    model = {"arch": str(arch), "pretrained": str(tmp_path / "zeroshot.pt")}
    with pytest.raises(
        CheckpointError,
        match=r"zeroshot\.pt: is an image encoder without its text tower .*pretrained: openai",
    ):
        merge(world.parse(tmp_path / "out", model=model))


def test_a_whole_pickled_clip_is_a_pretrained_model(world: World, tmp_path: Path) -> None:
    clip = open_clip.create_model(f"local-dir:{world.root / 'pretrained'}")
    torch.save(clip, tmp_path / "clip.pt")
    arch = world.root / "pretrained" / "open_clip_config.json"
    model = {"arch": str(arch), "pretrained": str(tmp_path / "clip.pt")}
    plain = merge(world.parse(tmp_path / "a"))
    pickled = merge(world.parse(tmp_path / "b", model=model))
    torch.testing.assert_close(plain.lambdas, pickled.lambdas, rtol=0, atol=1e-5)


def test_a_bias_of_another_size_is_not_read(tmp_path: Path) -> None:
    save_file({"weight": _random(), "bias": torch.zeros(9)}, tmp_path / "h.safetensors")
    with pytest.raises(CheckpointError, match=r"bias has shape \[9\], but the task has 3 classn"):
        saved_head(_task(tmp_path / "h.safetensors"), WHERE, 24)

"""The model card: what was merged, how, and how well it does, for whoever finds the folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from raymerge.config import AdaMerging, Config, FwHard, FwSoft, Joint, ZeroShot
from raymerge.evaluation import TaskScore
from raymerge.merging.registry import describe, images_per_step, method_of, needed_images
from raymerge.plan import Plan

_CARD = """---
{front}---

# {title}

{what}

```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
```

## Tasks

{table}

{note}

## Files

| file | SHA-256 |
|---|---|
{hashes}

The configuration is in `config.yaml`, {coefficients}versions and hashes are in `environment.json`.
"""


def model_card(
    config: Config, plan: Plan, scores: Mapping[str, TaskScore], hashes: Mapping[str, str]
) -> str:
    """Markdown with YAML front matter, as model hubs read it."""
    front = {
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["model-merging", "raymerge", config.method.name],
    }
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=_title(config),
        what=_what(config, plan),
        folder=Path(str(config.output)).name,
        table=_table(config, scores),
        note=_note(config, plan),
        hashes="\n".join(f"| `{Path(file).name}` | `{h}` |" for file, h in hashes.items()),
        coefficients="the coefficients are in `lambdas.json`, " if _has_lambdas(config) else "",
    )


def _has_lambdas(config: Config) -> bool:
    return method_of(config.method).rows


def _count(config: Config) -> str:
    models = len(config.models)
    return f"{models} model{'' if models == 1 else 's'}"


def _title(config: Config) -> str:
    if isinstance(config.method, ZeroShot | Joint):
        return describe(config.method)
    return f"{_count(config)} merged by {describe(config.method)}"


def _what(config: Config, plan: Plan) -> str:
    model, paper = f"`{Path(plan.model).name}`", method_of(config.method).paper
    if isinstance(config.method, ZeroShot):
        return f"The pretrained model, {model} ({paper}), as it is: a reference."
    text = f"the text tower is that of the pretrained model, {model}."
    if isinstance(config.method, Joint):
        return (
            f"One model that was trained on all tasks at once ({paper}): a reference.\n"
            f"Only its image encoder is used; {text}"
        )
    return (
        f"{_count(config).replace(' ', ' fine-tuned ')} merged into one by "
        f"**{describe(config.method)}** ({paper}) with raymerge.\n"
        f"Only the image encoder is merged; {text}"
    )


def _table(config: Config, scores: Mapping[str, TaskScore]) -> str:
    lines = ["| task | classes | test images | top-1 |", "|---|---:|---:|---:|"]
    for task in config.tasks:
        score = scores.get(task.name)
        shown = f"{score.examples} | {score.top1:.1%}" if score else "– | not tested"
        lines.append(f"| {task.name} | {len(task.classnames)} | {shown} |")
    if scores:
        mean = sum(score.top1 for score in scores.values()) / len(scores)
        lines.append(f"| **mean** | | | **{mean:.1%}** |")
    return "\n".join(lines)


def _note(config: Config, plan: Plan) -> str:
    """Where the numbers come from, and which images were used."""
    method = config.method
    if isinstance(method, ZeroShot | Joint):
        return "Nothing was merged, and no images were used."
    return {
        "constant": _constant,
        "statistics": _statistics,
        "learned": _learned,
        "frank_wolfe": _frank_wolfe,
    }[method_of(method).kind](config) + "".join(f" It {note}." for note in plan.notes)


def _constant(config: Config) -> str:
    if _has_lambdas(config):
        return "The coefficients are constants of the method; no images were used."
    return "The merged weights follow from the checkpoints alone; no images were used."


def _statistics(config: Config) -> str:
    return (
        "The merged weights follow from statistics of each model on up to "
        f"{images_per_step(config)} unlabeled images of its own task, seed {config.seed}."
    )


def _learned(config: Config) -> str:
    method, given = config.method, config.optimizer
    labelled = needed_images(config) == "labelled"
    teacher = isinstance(method, AdaMerging) and method.objective == "kl"
    return (
        f"The coefficients were learned {'from' if labelled else 'without'} labels"
        f"{', each task from its own model' if teacher else ''}: {given.steps} steps of "
        f"{_adam(config)} on {given.images_per_step} {needed_images(config)} images of each task "
        f"per step, seed {config.seed}."
    )


def _frank_wolfe(config: Config) -> str:
    method, given = config.method, config.optimizer
    assert isinstance(method, FwHard | FwSoft)
    most = "up to " if isinstance(method, FwHard) else ""
    text = (
        f"The coefficients are those of {most}{method.iterations} Frank-Wolfe iterations, with "
        f"gradients of {method.objective.replace('_', '-')} on up to {method.images} "
        f"{needed_images(config)} images of each task that has some, seed {config.seed}"
    )
    if method.start is not None:
        text += f", from those of `{Path(method.start).name}`"
    if isinstance(method, FwSoft):
        text += (
            f". Each iteration merged the models that the tasks chose by {given.steps} steps of "
            f"{_adam(config)}, without labels, on {given.images_per_step} images of each task"
        )
    return text + "."


def _adam(config: Config) -> str:
    given = config.optimizer
    sharpness = f", sharpness-aware {given.sharpness:g}" if given.sharpness else ""
    return f"Adam (lr {given.lr:g}, {given.schedule}{sharpness})"

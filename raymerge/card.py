"""The model card: what was merged, how, and how well it does, for whoever finds the folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from raymerge.config import Config
from raymerge.evaluation import TaskScore
from raymerge.merging.registry import describe, method_of
from raymerge.plan import Plan

_CARD = """---
{front}---

# {title}

{count} fine-tuned models merged into one by **{method}** ({paper}) with raymerge.
Only the image encoder is merged; the text tower is that of the pretrained model, {model}.

```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
```

## Tasks

{table}

{note}

## Files merged

| file | SHA-256 |
|---|---|
{hashes}

The configuration is in `config.yaml`, the coefficients are in `lambdas.json`, and versions and
hashes are in `environment.json`.
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
        title=f"{len(config.tasks)} models merged by {describe(config.method)}",
        count=len(config.tasks),
        method=describe(config.method),
        paper=method_of(config.method).paper,
        model=f"`{Path(plan.model).name}`",
        folder=Path(str(config.output)).name,
        table=_table(config, scores),
        note=_note(config, plan),
        hashes="\n".join(f"| `{Path(file).name}` | `{h}` |" for file, h in hashes.items()),
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
    if not method_of(config.method).learned:
        return "The coefficients are constants of the method; no images were used."
    given = config.optimizer
    text = (
        f"The coefficients were learned without labels: {given.steps} steps of Adam "
        f"(lr {given.lr:g}, {given.schedule}) on {given.images_per_step} unlabeled images of each "
        f"task per step, seed {config.seed}."
    )
    return text + "".join(f" It {note}." for note in plan.notes)

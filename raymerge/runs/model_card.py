"""The model card: what was merged, how, and how well it does, for whoever finds the folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raymerge.config import Config
from raymerge.engine.scores import TaskScore
from raymerge.merging.registry import describe, merged_checkpoints, method_of
from raymerge.runs.plan.plan import Plan

_HUB_MODEL = re.compile(r"(?:hf-hub:|hf://(?!datasets/|spaces/|buckets/))([^/@]+/[^/@]+)")

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
{authors}"""


def model_card(
    config: Config,
    plan: Plan,
    scores: Mapping[str, TaskScore],
    hashes: Mapping[str, str],
    lambdas: Mapping[str, Sequence[float]],
) -> str:
    """Markdown with YAML front matter, as model hubs read it. ``lambdas``: each model's, if any."""
    front = yaml.safe_dump(_front(config, scores), sort_keys=False, allow_unicode=True)
    return _CARD.format(
        front=front,
        title=_title(config),
        what=_what(config, plan),
        folder=Path(str(config.output)).name,
        table=_table(config, scores, lambdas),
        note=_note(config, plan),
        hashes="\n".join(f"| `{Path(file).name}` | `{h}` |" for file, h in hashes.items()),
        authors=_authors(config),
        coefficients="the coefficients are in `lambdas.json`, " if _has_lambdas(config) else "",
    )


def _has_lambdas(config: Config) -> bool:
    return method_of(config.method).rows


def _count(config: Config) -> str:
    models = len(config.models)
    return f"{models} model{'' if models == 1 else 's'}"


def _title(config: Config) -> str:
    if method_of(config.method).reference:
        return describe(config.method)
    return f"{_count(config)} merged by {describe(config.method)}"


def _what(config: Config, plan: Plan) -> str:
    method, model = method_of(config.method), f"`{Path(plan.model).name}`"
    text = f"the text tower is that of the pretrained model, {model}."
    if method.reference:
        return (
            f"{method.reference}: a reference ({method.paper}).\n"
            f"Only its image encoder is used; {text}"
        )
    return (
        f"{_count(config).replace(' ', ' fine-tuned ')} merged into one by "
        f"**{describe(config.method)}** ({method.paper}) with raymerge.\n"
        f"Only the image encoder is merged; {text}"
    )


def _front(config: Config, scores: Mapping[str, TaskScore]) -> dict[str, Any]:
    """What the hub reads: https://huggingface.co/docs/hub/model-cards#model-card-metadata."""
    front: dict[str, Any] = {}
    if config.card.license is not None:
        front["license"] = config.card.license
    bases = hub_models(config)
    if bases:
        front["base_model"] = bases
        front["base_model_relation"] = "merge"
    front["library_name"] = "open_clip"
    front["pipeline_tag"] = "zero-shot-image-classification"
    front["tags"] = ["model-merging", "raymerge", config.method.name]
    if scores:
        name = Path(str(config.output)).name
        front["model-index"] = [{"name": name, "results": [*map(_result, scores.items())]}]
    return front


def _result(scored: tuple[str, TaskScore]) -> dict[str, Any]:
    task, score = scored
    return {
        "task": {"type": "zero-shot-image-classification"},
        "dataset": {"name": task, "type": task},
        "metrics": [{"type": "accuracy", "name": "top-1", "value": round(score.top1, 6)}],
    }


def hub_models(config: Config) -> list[str]:
    """The pretrained model and the experts that come from the Hugging Face hub, as ORG/NAME."""
    given = [config.model.reference, *merged_checkpoints(config)]
    found = [_HUB_MODEL.match(str(reference)) for reference in given]
    names = [match.group(1) for match in found if match]
    tagged = _tagged(config)
    return list(dict.fromkeys([*([tagged] if tagged else []), *names]))


def _tagged(config: Config) -> str | None:
    """Where the hub keeps open_clip's pretrained tag."""
    if config.model.pretrained is None or re.search("[./]", config.model.pretrained):
        return None
    import open_clip

    arch = config.model.arch.replace("/", "-")
    where = open_clip.get_pretrained_cfg(arch, config.model.pretrained).get("hf_hub", "")
    return "/".join(str(where).split("/")[:2]).rstrip("/") or None


def _authors(config: Config) -> str:
    return f"\nMerged by {', '.join(config.card.authors)}.\n" if config.card.authors else ""


def _table(
    config: Config,
    scores: Mapping[str, TaskScore],
    lambdas: Mapping[str, Sequence[float]],
) -> str:
    shown = "mean λ (least to greatest)"
    head = ["task", "classes", "test images", "top-1", *([shown] if lambdas else [])]
    lines = [_row(head), "|---" + "|---:" * (len(head) - 1) + "|"]
    for task in config.tasks:
        score = scores.get(task.name)
        row = [task.name, str(len(task.classnames))]
        row += [str(score.examples), f"{score.top1:.1%}"] if score else ["–", "not tested"]
        lines.append(_row([*row, *([_spread(lambdas.get(task.name, ()))] if lambdas else [])]))
    if scores:
        mean = sum(score.top1 for score in scores.values()) / len(scores)
        lines.append(_row(["**mean**", "", "", f"**{mean:.1%}**", *([""] if lambdas else [])]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(lambdas_L: Sequence[float]) -> str:
    if not lambdas_L:
        return "–"
    mean, least, most = sum(lambdas_L) / len(lambdas_L), min(lambdas_L), max(lambdas_L)
    return f"{mean:.3f}" if least == most else f"{mean:.3f} ({least:.3f} to {most:.3f})"


def _note(config: Config, plan: Plan) -> str:
    """Where the numbers come from, and which images were used."""
    account = method_of(config.method).account(config.method, config)
    return account + "".join(f" It {note}." for note in plan.notes)

"""The model card: the README.md of an output folder, in the form that model hubs read.

It says which models were merged, by which method and from which images, and the scores. The account
of the images comes from the method's row; the files and hashes are given by ``runs.folder``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raymerge.config import Config
from raymerge.engine.scores import TaskScore
from raymerge.errors import escape_unprintable
from raymerge.files.urls import redact_url
from raymerge.merging.registry import describe, merged_checkpoints, method_of
from raymerge.runs.plan.plan import Plan

_HUB_MODEL = re.compile(r"(?:hf-hub:|hf://(?!datasets/|spaces/|buckets/))([^/@#]+/[^/@#]+)")

_CARD = """---
{front}---

# {title}

{summary}

```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
```

## Tasks

{table}

{note}

## Files

| model | file | SHA-256 |
|---|---|---|
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
    """Return Markdown with YAML front matter.

    ``hashes``: the SHA-256 of each file. ``lambdas``: each model's (L,), empty without any.
    """
    # The names of files and tasks come from anywhere, and are shown literally.
    front = yaml.safe_dump(_front(config, scores), sort_keys=False, allow_unicode=True)
    return _CARD.format(
        front=front,
        title=_title(config),
        summary=_summary(config, plan),
        folder=escape_unprintable(Path(str(config.output)).name).replace("`", "'"),
        table=_table(config, scores, lambdas),
        note=_note(config, plan),
        hashes="\n".join(
            _row([_owner(config, file), code(Path(file).name), f"`{digest}`"])
            for file, digest in hashes.items()
        ),
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


def _summary(config: Config, plan: Plan) -> str:
    """Return one or two sentences on the models, the method and its paper."""
    method, model = method_of(config.method), code(Path(plan.model).name)
    text_tower = f"the text tower is that of the pretrained model, {model}."
    if method.reference:
        reference = f"{method.reference}: a reference ({method.paper})."
        if method.checkpoint(config.method) is None:
            return reference
        return f"{reference}\nOnly its image encoder is used; {text_tower}"
    return (
        f"{_count(config).replace(' ', ' fine-tuned ')} merged into one by "
        f"**{describe(config.method)}** ({method.paper}) with raymerge.\n"
        f"Only the image encoder is merged; {text_tower}"
    )


def _front(config: Config, scores: Mapping[str, TaskScore]) -> dict[str, Any]:
    """Return the front matter, see https://huggingface.co/docs/hub/model-cards#model-card-metadata."""
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
        front["model-index"] = [
            {"name": name, "results": [_result(*item) for item in scores.items()]}
        ]
    return front


def _result(task: str, score: TaskScore) -> dict[str, Any]:
    return {
        "task": {"type": "zero-shot-image-classification"},
        "dataset": {"name": task, "type": task},
        "metrics": [{"type": "accuracy", "name": "top-1", "value": round(score.top1, 6)}],
    }


def hub_models(config: Config) -> list[str]:
    """Return the pretrained model and the experts that are on the Hugging Face hub, as ORG/NAME."""
    references = [config.model.reference, *merged_checkpoints(config)]
    matches = [_HUB_MODEL.match(str(reference)) for reference in references]
    names = [_hub_model_of_tag(config), *(match.group(1) for match in matches if match)]
    return list(dict.fromkeys(name for name in names if name))


def _hub_model_of_tag(config: Config) -> str | None:
    """Return the hub's ORG/NAME of open_clip's pretrained tag, if the config names one."""
    if config.model.pretrained is None or re.search("[./]", config.model.pretrained):
        return None
    import open_clip

    arch = config.model.arch.replace("/", "-")
    path = open_clip.get_pretrained_cfg(arch, config.model.pretrained).get("hf_hub", "")
    return "/".join(str(path).split("/")[:2]).rstrip("/") or None


def _authors(config: Config) -> str:
    return f"\nMerged by {', '.join(config.card.authors)}.\n" if config.card.authors else ""


def _table(
    config: Config,
    scores: Mapping[str, TaskScore],
    lambdas: Mapping[str, Sequence[float]],
) -> str:
    """Return a row for each task, and one for the mean; a column of λ if there is any."""
    title = "mean λ (least to greatest)"
    head = ["task", "classes", "test images", "top-1", *([title] if lambdas else [])]
    lines = [_row(head), "|---" + "|---:" * (len(head) - 1) + "|"]
    for task in config.tasks:
        score = scores.get(task.name)
        row = [plain(task.name), str(len(task.classnames))]
        row += [str(score.examples), f"{score.top1:.1%}"] if score else ["–", "not tested"]
        lines.append(_row([*row, *([_spread(lambdas.get(task.name, ()))] if lambdas else [])]))
    if scores:
        mean = sum(score.top1 for score in scores.values()) / len(scores)
        lines.append(_row(["**mean**", "", "", f"**{mean:.1%}**", *([""] if lambdas else [])]))
    return "\n".join(lines)


def plain(text: str) -> str:
    """Return a name from a config or a file as Markdown shows it literally, also in a table."""
    marks = str.maketrans({mark: f"&#{ord(mark)};" for mark in "<>&|`*_[]\\"})
    return escape_unprintable(text).translate(marks)


def code(name: str) -> str:
    """Return a name as Markdown shows it literally, as code."""
    return f"<code>{plain(name)}</code>"  # between backticks an escaped mark would show its code


def _owner(config: Config, file: str) -> str:
    """Return whose file it is: the pretrained model's, or the tasks' that name it."""
    tasks = {
        task.name: [str(each) for each in (task.checkpoint, task.head) if each is not None]
        for task in config.tasks
    }
    own = [
        name
        for name, references in tasks.items()
        if any(_is_within(file, reference) for reference in references)
    ]
    return plain(", ".join(own)) if own else "pretrained"


def _is_within(file: str, reference: str) -> bool:
    place = redact_url(reference.partition("#")[0].removeprefix("local-dir:")).rstrip("/")
    return file == place or file.startswith(f"{place}/")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(lambdas_L: Sequence[float]) -> str:
    if not lambdas_L:
        return "–"
    mean, least, most = sum(lambdas_L) / len(lambdas_L), min(lambdas_L), max(lambdas_L)
    return f"{mean:.3f}" if least == most else f"{mean:.3f} ({least:.3f} to {most:.3f})"


def _note(config: Config, plan: Plan) -> str:
    """Return how the coefficients were found, and from which images."""
    account = method_of(config.method).account(config.method, config)
    notes = account + "".join(f" It {note}." for note in plan.notes)
    return "\n".join([notes, *(["", *(f"- {plain(warning)}." for warning in plan.warnings)])])

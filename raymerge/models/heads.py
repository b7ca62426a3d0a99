"""Heads, one classifier per task: from class names and templates (CLIP, §3.1.4), or saved.

A head is a matrix with the logit scale in it: logits = normalised image features @ head.

Legend: C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from raymerge.config import TaskConfig
from raymerge.errors import CheckpointError
from raymerge.models.checkpoints.checkpoint import Checkpoint, read_tensor
from raymerge.models.checkpoints.opening import open_checkpoint
from raymerge.models.checkpoints.recognise import prefixes_of
from raymerge.models.checkpoints.visual_tower import require_finite

if TYPE_CHECKING:
    from raymerge.models.skeleton import OpenClipModel

_TEXTS_PER_PASS = 256


@torch.no_grad()
def zero_shot_head(
    model: OpenClipModel,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """Return the zero-shot head (D, C), float32, without bias.

    w_c = e^s · normalise(mean_t normalise(text(t(c)))), with templates t and the model's logit
    scale e^s.
    """
    texts = [template.format(name) for name in classnames for template in templates]
    device = next(model.parameters()).device
    features = [
        nn.functional.normalize(model.encode_text(tokenizer(batch).to(device)).float(), dim=-1)
        for batch in (texts[i : i + _TEXTS_PER_PASS] for i in range(0, len(texts), _TEXTS_PER_PASS))
    ]
    mean_CD = torch.cat(features).unflatten(0, (len(classnames), len(templates))).mean(1)
    scale: Tensor = model.logit_scale.exp()
    return (nn.functional.normalize(mean_CD, dim=-1).t() * scale).float().contiguous()


def saved_head(task: TaskConfig, where: str, features: int) -> Tensor:
    """Return a task's saved head (D, C), float32, from a ``weight`` (C, D) with the logit scale.

    The file holds a ``ClassificationHead`` as task_vectors and AdaMerging release it, or a state
    dict. ``where``: the task's place in the config, for errors. ``features``: D of the model.
    Raises :class:`CheckpointError` for a head that does not fit the task.
    """
    try:
        checkpoint = open_checkpoint(str(task.head))
        prefix = _require_fit(checkpoint, len(task.classnames), features)
        weight_CD = read_tensor(checkpoint, f"{prefix}weight", torch.float32)
        require_finite(weight_CD, checkpoint, f"{prefix}weight")
    except CheckpointError as error:
        raise CheckpointError(f"{where}.head ({task.name}): {error}") from error
    return weight_CD.t().contiguous()


def _prefix(checkpoint: Checkpoint, shape: tuple[int, int]) -> str:
    """Return the prefix of the only head of a shape in a file, else that of the most likely one.

    Raises :class:`CheckpointError` for several.
    """
    heads = [
        prefix
        for prefix in prefixes_of(checkpoint.specs, ("weight",))
        if checkpoint.specs[f"{prefix}weight"].shape == shape
    ]
    if len(heads) > 1:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: holds {len(heads)} heads of {shape[0]} classes x "
            f"{shape[1]} features ({', '.join(f'{head}*' for head in heads[:3])}); name one: "
            f"{checkpoint.path.name}#{heads[0].rstrip('.')}"
        )
    return heads[0] if heads else next(iter(prefixes_of(checkpoint.specs, ("weight", "bias"))), "")


def _require_fit(checkpoint: Checkpoint, classes: int, features: int) -> str:
    """Return the prefix of a head's keys. Raises :class:`CheckpointError` unless it is a head
    without bias over normalised features."""
    path, prefix = checkpoint.path, _prefix(checkpoint, (classes, features))
    specs = {k.removeprefix(prefix): s for k, s in checkpoint.specs.items() if k.startswith(prefix)}
    unexpected = sorted(specs.keys() - {"weight", "bias"})
    if "weight" not in specs or unexpected:
        names = ", ".join((unexpected or sorted(specs))[:3])
        raise CheckpointError(
            f"checkpoint {path}: is no head: it holds {names}; expected weight ({classes} classes "
            f"x {features} features)"
        )
    # The weight has a row per class.
    shape, dtype = specs["weight"].shape, specs["weight"].dtype
    if shape != (classes, features):
        hint = "; save it transposed" if shape == (features, classes) else ""
        raise CheckpointError(
            f"checkpoint {path}: weight has shape {list(shape)}, but the task has {classes} "
            f"classnames and the model {features} features{hint}"
        )
    if not dtype.is_floating_point:
        raise CheckpointError(
            f"checkpoint {path}: weight is {dtype}, not floating point; save it as float32"
        )
    # A bias is accepted only if it has no effect.
    if "bias" in specs and specs["bias"].shape != (classes,):
        raise CheckpointError(
            f"checkpoint {path}: bias has shape {list(specs['bias'].shape)}, but the task has "
            f"{classes} classnames; name the head of these classes"
        )
    if "bias" in specs and bool(read_tensor(checkpoint, f"{prefix}bias").any()):
        raise CheckpointError(
            f"checkpoint {path}: has a bias that is not zero, and heads here have none; save the "
            "head without it"
        )
    # A pickled head's own attributes state what it was trained on.
    attributes = getattr(checkpoint, "attributes", {})
    for key in ("normalize", "normalize_input"):
        if attributes.get(key) is False:
            raise CheckpointError(
                f"checkpoint {path}: is a head for features that are not normalised ({key}=False), "
                "and features are normalised here; save a head for normalised features"
            )
    return prefix

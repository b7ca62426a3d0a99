"""The loss that a request asks for, of some images' logits.

Legend: B images of one task, C classes.
"""

from __future__ import annotations

from torch import Tensor

from raymerge.engine.messages import Loss
from raymerge.merging.objectives import (
    cross_entropy,
    eata_weights,
    entropy,
    infomax,
    kl,
    task_scale,
)


def image_losses(
    loss: Loss, logits_BC: Tensor, target: Tensor | None = None, marginal_C: Tensor | None = None
) -> Tensor:
    """(B,): the objective, filtered and scaled as ``loss`` says.

    ``target``: the expert's logits (B, C) for kl, the labels (B,) for cross_entropy.
    ``marginal_C``: for infomax; without it, as before the first step, that is the entropy.
    """
    classes = logits_BC.shape[1]
    if loss.objective == "kl":
        assert target is not None
        loss_B = kl(logits_BC, target, loss.temperature)
    elif loss.objective == "cross_entropy":
        assert target is not None
        loss_B = cross_entropy(logits_BC, target.to(logits_BC.device))
    elif loss.objective == "infomax" and marginal_C is not None:
        loss_B = infomax(logits_BC, marginal_C)
    else:
        loss_B = entropy(logits_BC)
    if loss.filter is not None:
        loss_B = loss_B * eata_weights(entropy(logits_BC), classes, loss.filter)
    return loss_B * task_scale(classes, loss.normalise)

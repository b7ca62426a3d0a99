"""What learned merging minimises: per-image losses that need only logits.

Legend: B images of one task, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Objective = Callable[[Tensor], Tensor]


def entropy(logits_BC: Tensor) -> Tensor:
    """H(p) = −Σ_c p_c log p_c per image, (B,), in nats (AdaMerging §3.2.2).

    Finite, with a finite gradient, for saturated logits: log p comes from ``log_softmax``, and
    p log p → 0 there because p underflows to an exact zero before log p leaves the finite range.
    """
    log_p_BC = torch.log_softmax(logits_BC, dim=-1)
    return -(log_p_BC.exp() * log_p_BC).sum(-1)


OBJECTIVES: dict[str, Objective] = {"entropy": entropy}

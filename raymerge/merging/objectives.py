"""The objectives of learned merging: losses of single images that need only logits.

Everything is pure. A running average, such as infomax's marginal, is kept by the caller: functions
take it and return what updates it.

Legend: B images of one task, C classes.
"""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from raymerge.merging.method import Objective


def entropy(logits_BC: Tensor) -> Tensor:
    """Return H(p) = −Σ_c p_c log p_c per image, (B,), in nats (AdaMerging §3.2.2).

    Finite, with a finite gradient, for saturated logits: log p comes from ``log_softmax``, and
    p log p → 0 there because p underflows to an exact zero before log p leaves the finite range.
    """
    log_p_BC = torch.log_softmax(logits_BC, dim=-1)
    return -(log_p_BC.exp() * log_p_BC).sum(-1)


def kl(logits_BC: Tensor, expert_logits_BC: Tensor, temperature: float = 2.0) -> Tensor:
    """Return T²·KL(q ‖ p) per image, (B,), in nats: q is the expert's softmax at T, p the model's.

    The factor T² keeps the gradient, T(p − q), of one size for all T (Hinton et al., 2015, §2). As
    T → ∞ the loss tends to half the variance over classes of the difference of the logits.
    """
    log_p_BC = torch.log_softmax(logits_BC / temperature, dim=-1)
    log_q_BC = torch.log_softmax(expert_logits_BC.to(logits_BC) / temperature, dim=-1)
    return temperature**2 * (log_q_BC.exp() * (log_q_BC - log_p_BC)).sum(-1)


def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Return −log p of the label per image, (B,), in nats; the labels are int64 in 0..C−1."""
    return torch.nn.functional.cross_entropy(logits_BC, labels_B, reduction="none")


def infomax(logits_BC: Tensor, marginal_C: Tensor) -> Tensor:
    """Return −KL(p ‖ m) = H(p) + Σ_c p_c log m_c per image, (B,), as SHOT maximises information.

    SHOT (Liang et al., ICML 2020, §3.2) minimises E H(p) − H(E p): predictions become certain for
    each image and diverse over all. A batch has fewer images than classes, so E p is a running
    average m, constant here.
    As ∇H(E p) = −Σ_c (log E p_c + 1) ∇E p_c, the mean of this loss has SHOT's gradient wherever
    m = E p; the 1 drops out because Σ_c p_c is constant, and then the values agree too.

    Convention: the gradient is as if the batch were all of m. With m = (1−μ) m_old + μ mean p it is
    that of mean H(p) − H(m)/μ, so the push for diversity does not depend on the momentum μ.

    An m_c that underflowed counts as the dtype's smallest number: the loss stays finite.
    """
    marginal_C = marginal_C.detach().to(logits_BC)
    log_m_C = marginal_C.clamp_min(torch.finfo(logits_BC.dtype).tiny).log()
    log_p_BC = torch.log_softmax(logits_BC, dim=-1)
    return (log_p_BC.exp() * (log_m_C - log_p_BC)).sum(-1)


def probability_sum(logits_BC: Tensor) -> Tensor:
    """Return Σ_i p_i, (C,), float64, detached: a worker's result for its images of one task.

    The sums of parts of a batch add up. The driver divides by the images and calls
    :func:`mix_marginal`, so a repeated step uses the same marginal.
    """
    return torch.softmax(logits_BC.detach().double(), dim=-1).sum(0)


def mix_marginal(marginal_C: Tensor, mean_p_C: Tensor, momentum: float) -> Tensor:
    """Return (1−μ) m + μ mean p, (C,): the running average with one more batch or step."""
    return (1 - momentum) * marginal_C + momentum * mean_p_C.to(marginal_C)


def momentum_at(step: int, momentum: float) -> float:
    """Return the μ of step 1, 2, …: first that of a plain mean, which forgets the initial value."""
    return max(momentum, 1 / step)


def marginal_entropy(mean_p_C: Tensor) -> float:
    """Return H(E p) in nats, from a mean of probabilities (C,), which may hold zeros.

    For one batch of B images it is at most mean H(p) + ln B, which says little where B ≪ C: pass a
    running average.
    """
    return float(torch.special.entr(mean_p_C.double()).sum())


def eata_weights(entropy_B: Tensor, classes: int, fraction: float = 0.4) -> Tensor:
    """Return e^{E₀−H}·1[H < E₀] per image, (B,), detached, with E₀ = fraction·ln C.

    These are the weights of EATA (Niu et al., 2022).

    Images with uncertain predictions give unreliable gradients and get the weight 0; a certain one
    has the weight C^fraction at most. The filter against redundant images is not included.
    """
    limit = fraction * log(classes)
    entropy_B = entropy_B.detach()
    return (limit - entropy_B).exp() * (entropy_B < limit)


def task_scale(classes: int, normalise: bool) -> float:
    """Return the factor of a task's loss: 1, or 1/ln C, which brings its entropy to [0, 1].

    A task of one class has no entropy to scale: 1.
    """
    return 1 / log(classes) if normalise and classes > 1 else 1.0


def image_losses(
    objective: Objective,
    logits_BC: Tensor,
    target: Tensor | None = None,
    marginal_C: Tensor | None = None,
) -> Tensor:
    """Return the objective of each image, (B,), filtered and scaled as ``objective`` says.

    ``target``: the expert's logits (B, C) for kl, the labels (B,) for cross_entropy.
    ``marginal_C``: for infomax; without it, as before the first step, the loss is the entropy.
    """
    classes = logits_BC.shape[1]
    if objective.name == "kl":
        assert target is not None
        loss_B = kl(logits_BC, target, objective.temperature)
    elif objective.name == "cross_entropy":
        assert target is not None
        loss_B = cross_entropy(logits_BC, target.to(logits_BC.device))
    elif objective.name == "infomax" and marginal_C is not None:
        loss_B = infomax(logits_BC, marginal_C)
    else:
        loss_B = entropy(logits_BC)
    if objective.filter is not None:
        loss_B = loss_B * eata_weights(entropy(logits_BC), classes, objective.filter)
    return loss_B * task_scale(classes, objective.normalise)

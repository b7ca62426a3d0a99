"""Zero-shot heads: one classifier per task from class names and templates (CLIP, §3.1.4).

Legend: C classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from raymerge.models import OpenClipModel

_TEXTS_PER_PASS = 256


@torch.no_grad()
def zero_shot_head(
    model: OpenClipModel,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """(D, C) float32: w_c = e^s · normalise(mean_t normalise(text(t(c)))), zero bias.

    The logit scale e^s is baked in, so that logits = normalised image features @ head.
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

"""Zero-shot heads equal their formula."""

from __future__ import annotations

import math

import open_clip
import pytest
import torch
from torch import Tensor

from raymerge.models.heads import zero_shot_head


@pytest.fixture(scope="module")
def clip(world):
    reference = f"local-dir:{world.root / 'pretrained'}"
    return open_clip.create_model(reference).eval(), open_clip.get_tokenizer(reference)


def _literal(model, tokenizer, classnames: list[str], templates: list[str]) -> Tensor:
    """Return the head one class at a time: w_c = e^s · normalise(mean_t normalise(text(t(c))))."""
    columns = []
    for name in classnames:
        texts = [template.replace("{}", name) for template in templates]
        with torch.no_grad():
            features = model.encode_text(tokenizer(texts)).double().unbind()
        mean_D = sum(feature_D / feature_D.square().sum().sqrt() for feature_D in features) / len(
            templates
        )
        scale = math.exp(float(model.logit_scale.detach()))
        columns.append(scale * mean_D / mean_D.square().sum().sqrt())
    return torch.stack(columns, dim=1)


CASES = {
    "one template": (["red", "green", "blue"], ["a photo of a {}."]),
    "an ensemble": (["cat", "a long name"], ["{}", "a photo of a {}.", "art of the {}"]),
    "more texts than one pass": ([f"number {i}" for i in range(86)], ["{}", "a {}.", "the {}"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_head_is_the_formula(clip, case):
    classnames, templates = CASES[case]
    head_DC = zero_shot_head(*clip, classnames, templates)
    expected_DC = _literal(*clip, classnames, templates)
    assert head_DC.shape == expected_DC.shape == (24, len(classnames))
    assert head_DC.dtype == torch.float32
    assert head_DC.is_contiguous()
    torch.testing.assert_close(head_DC.double(), expected_DC, rtol=1e-4, atol=1e-4)


def test_the_logit_scale_is_baked_in(clip):
    """open_clip's own classifier builder omits it, and entropy depends on it."""
    model, tokenizer = clip
    classnames, templates = CASES["an ensemble"]
    head_DC = zero_shot_head(model, tokenizer, classnames, templates)
    bare_DC = open_clip.build_zero_shot_classifier(
        model, tokenizer, classnames, [lambda c, t=t: t.format(c) for t in templates]
    )
    scale = model.logit_scale.detach().exp()
    assert scale > 10
    torch.testing.assert_close(head_DC, bare_DC * scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head_DC.norm(dim=0), scale.expand(2), rtol=1e-5, atol=0)


def test_columns_follow_the_order_of_the_class_names(clip):
    forward = zero_shot_head(*clip, ["x", "y", "z"], ["a {}"])
    backward = zero_shot_head(*clip, ["z", "y", "x"], ["a {}"])
    torch.testing.assert_close(forward, backward.flip(1), rtol=1e-5, atol=1e-5)
    assert (forward[:, 0] - forward[:, 2]).abs().max() > 0.01


def test_the_order_of_the_templates_does_not_matter(clip):
    one = zero_shot_head(*clip, ["x", "y"], ["a {}", "the {} thing"])
    two = zero_shot_head(*clip, ["x", "y"], ["the {} thing", "a {}"])
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_head_needs_no_gradient(clip):
    assert not zero_shot_head(*clip, ["x", "y"], ["{}"]).requires_grad

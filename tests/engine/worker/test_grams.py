"""Gram matrices of the inputs of open_clip's linear weights, against hooks and the tower itself."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import CustomResidualAttentionBlock, QuickGELU, VisionTransformer
from torch import Tensor, nn
from torch.testing import assert_close
from world import MODEL_CFG, RESNET

from raymerge.engine.worker.grams import HiddenStates, grams, in_by_out, projection_input
from raymerge.errors import UserError

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quickgelu": {"act_layer": QuickGELU},
    "layer scale": {"ls_init_value": 0.3},
    "no ln_pre": {"no_ln_pre": True},
    "average pool": {"pool_type": "avg"},
    "ln after pool": {"pool_type": "avg", "final_ln_after_pool": True},
    "patch dropout": {"patch_dropout": 0.5},
    "attentional pool": {"attentional_pool": True, "attn_pooler_queries": 3},
    "custom block": {"qk_norm": True, "scale_attn_inner": True, "scale_fc": True},
}
WEIGHTS = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _tower(kind: str = "plain", layers: int = 3, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    tower = VisionTransformer(
        image_size=32,
        patch_size=16,
        width=32,
        layers=layers,
        heads=4,
        mlp_ratio=2.0,
        output_dim=24,
        attn_pooler_heads=4,
        **KINDS[kind],
    )
    with torch.no_grad():
        for parameter in tower.parameters():  # no bias is zero, no two norms are equal
            parameter.add_(0.1 * torch.randn_like(parameter))
    return tower.double().eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    torch.manual_seed(7)
    return torch.randn(10, 3, 32, 32, dtype=torch.float64)


def _gram(inputs: Tensor) -> Tensor:
    inputs_nI = inputs.flatten(0, -2)
    return inputs_nI.t() @ inputs_nI / len(inputs_nI)


def _hooked(tower: VisionTransformer, images: Tensor) -> dict[str, Tensor]:
    """Return the Grams that hooks see in one pass; the fused attention hides its projection's."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        seen[name] = _gram(value.detach())

    def before(name: str) -> Any:
        return lambda _, args: keep(name, args[0])

    def after(name: str) -> Any:
        return lambda _, __, output: keep(name, output)

    handles = []
    for i, block in enumerate(tower.transformer.resblocks):
        prefix = f"transformer.resblocks.{i}."
        handles += [
            block.ln_1.register_forward_hook(after(f"{prefix}attn.in_proj_weight")),
            block.mlp.c_fc.register_forward_pre_hook(before(f"{prefix}mlp.c_fc.weight")),
            block.mlp.c_proj.register_forward_pre_hook(before(f"{prefix}mlp.c_proj.weight")),
        ]
        if isinstance(block, CustomResidualAttentionBlock):
            out_proj = block.attn.out_proj
            name = f"{prefix}attn.out_proj.weight"
            handles.append(out_proj.register_forward_pre_hook(before(name)))
    tower(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_each_gram_is_that_of_the_inputs_which_hooks_see(kind, images):
    tower = _tower(kind)
    by_name, seen = grams(tower, images, chunk=4), _hooked(tower, images)
    assert len(seen) in (9, 12)
    assert_close({name: by_name[name] for name in seen}, seen)


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_weight_has_a_gram(kind, images):
    """Each has the shape of its weight's input, and no hook remains."""
    tower = _tower(kind)
    by_name = grams(tower, images)
    names = [f"transformer.resblocks.{i}.{weight}" for i in range(3) for weight in WEIGHTS]
    assert sorted(by_name) == sorted([*names, "proj"])
    for name, gram_II in by_name.items():
        inputs = in_by_out(name, tower.get_parameter(name)).shape[0]
        assert gram_II.shape == (inputs, inputs)
        assert_close(gram_II, gram_II.t())
        assert not gram_II.requires_grad
    assert torch.is_grad_enabled()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in tower.modules())


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_input_of_the_output_projection_rebuilds_the_attention(batch_first):
    torch.manual_seed(0)
    attn = nn.MultiheadAttention(32, 4, batch_first=batch_first).double().eval()
    nn.init.normal_(attn.in_proj_bias)
    x_BTW = torch.randn(3, 5, 32, dtype=torch.float64)
    x = x_BTW if batch_first else x_BTW.transpose(0, 1)
    expected = attn(x, x, x, need_weights=False)[0]
    rebuilt_BTW = attn.out_proj(projection_input(attn, x))
    assert_close(rebuilt_BTW if batch_first else rebuilt_BTW.transpose(0, 1), expected)


def test_the_output_projections_gram_predicts_the_energy_of_its_output(images):
    """tr(W G Wᵀ) is the mean squared norm of Wx, of which the attention's output shows Wx + b."""
    tower = _tower()
    outputs: list[Tensor] = []
    attn = tower.transformer.resblocks[1].attn
    attn.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
    gram_II = grams(tower, images)["transformer.resblocks.1.attn.out_proj.weight"]
    weight = attn.out_proj.weight.detach()
    without_bias = torch.cat(outputs) - attn.out_proj.bias.detach()
    assert_close((weight @ gram_II @ weight.t()), _gram(without_bias))


@pytest.mark.parametrize("kind", KINDS)
def test_after_the_last_block_come_the_towers_features(kind, images):
    tower = _tower(kind)
    states = HiddenStates(tower, images, chunk=3)
    for i in range(states.blocks):
        states.advance(i)
    with torch.no_grad():
        pooled = tower._pool(torch.cat(states.chunks_bTW))[0]
        assert_close(pooled @ tower.proj, tower(images))
    assert_close(states.head_grams(), {"proj": _gram(pooled)})


def test_blocks_that_run_tokens_first_are_the_same(images):
    """open_clip's ``batch_first=False``: another order of the axes, the same tokens."""
    tower, other = _tower(), _tower()
    other.transformer.batch_first = False
    for block in other.transformer.resblocks:
        block.attn.batch_first = False
    assert_close(other(images), tower(images))
    assert_close(grams(other, images), grams(tower, images))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_change_nothing(chunk, images):
    assert_close(grams(_tower(), images, chunk), grams(_tower(), images, 10))


def test_the_stored_weights_act_on_the_inputs_as_in_by_out():
    """y = xW: open_clip's linear layers are stored the other way round, ``proj`` is not."""
    tower = _tower()
    assert in_by_out("proj", tower.proj) is tower.proj
    fc, x_nI = tower.transformer.resblocks[0].mlp.c_fc, torch.randn(2, 32, dtype=torch.float64)
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    assert_close(x_nI @ in_by_out(name, fc.weight) + fc.bias, fc(x_nI))
    assert torch.equal(in_by_out(name, in_by_out(name, fc.weight)), fc.weight)


# --- block by block ----------------------------------------------------------------------------


def _block_by_block(expert: VisionTransformer, prefix: VisionTransformer, images: Tensor) -> Any:
    """RegMean++ for one task: the expert's Grams behind the prefix's blocks."""
    tower = _tower()
    tower.load_state_dict(prefix.state_dict())
    states, by_name = HiddenStates(tower, images), {}
    for i, block in enumerate(tower.transformer.resblocks):
        block.load_state_dict(expert.transformer.resblocks[i].state_dict())
        by_name |= states.block_grams(i)
        block.load_state_dict(prefix.transformer.resblocks[i].state_dict())
        states.advance(i)
    return by_name | states.head_grams()


def test_block_by_block_on_unmerged_weights_is_one_pass(images):
    expert = _tower(seed=1)
    assert_close(_block_by_block(expert, expert, images), grams(expert, images))


def test_each_block_sees_the_prefixs_output_through_its_own_weights(images):
    """The prefix decides what enters a block, the expert what happens inside."""
    expert, prefix = _tower(seed=1), _tower(seed=2)
    by_name = _block_by_block(expert, prefix, images)
    for i in range(3):
        mixed = _tower()
        mixed.load_state_dict(prefix.state_dict())
        block = mixed.transformer.resblocks[i]
        block.load_state_dict(expert.transformer.resblocks[i].state_dict())
        here = {name: g for name, g in grams(mixed, images).items() if f"blocks.{i}." in name}
        assert len(here) == 4
        assert_close({name: by_name[name] for name in here}, here)
    assert_close(by_name["proj"], grams(prefix, images)["proj"])


def test_another_block_than_the_next_is_refused(images):
    states = HiddenStates(_tower(), images)
    for wrong in (1, 99):
        with pytest.raises(ValueError, match=f"input of block 0, not of block {wrong}"):
            states.block_grams(wrong)
    with pytest.raises(ValueError, match="input of block 0, not of block 3"):
        states.head_grams()
    states.advance(0)
    with pytest.raises(ValueError, match="input of block 1, not of block 0"):
        states.advance(0)


# --- precision, and other towers ---------------------------------------------------------------


def test_bfloat16_inputs_are_summed_in_float32(images):
    tower = _tower().bfloat16()
    by_name = grams(tower, images.bfloat16())
    assert {gram_II.dtype for gram_II in by_name.values()} == {torch.float32}


def test_a_tower_built_by_open_clip_is_accepted(tmp_path, images):
    visual = open_clip.model._build_vision_tower(24, MODEL_CFG["vision_cfg"]).eval()
    assert len(grams(visual, images.float())) == 4 * 2 + 1


@pytest.mark.parametrize("entry", [grams, HiddenStates])
def test_another_kind_of_tower_is_refused_by_name(entry, images):
    visual = open_clip.model._build_vision_tower(24, RESNET["vision_cfg"])
    with pytest.raises(UserError, match=r"RegMean.*vision transformers.*ModifiedResNet") as raised:
        entry(visual, images)
    assert "\n" not in str(raised.value)

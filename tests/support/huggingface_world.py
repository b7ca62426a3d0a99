"""Tiny CLIPs, made and written by Hugging Face's library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    logging,
)

logging.set_verbosity_error()
logging.disable_progress_bar()

VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 24,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 16,
    "projection_dim": 24,
}
PREPROCESSOR = {
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.25],
    "resample": 2,
    "size": {"shortest_edge": 32},
}


def clip_config(
    vision: Mapping[str, Any] | None = None, text: Mapping[str, Any] | None = None
) -> CLIPConfig:
    return CLIPConfig(
        vision_config={**VISION, **(vision or {})},
        text_config={**TEXT, **(text or {})},
        projection_dim=24,
    )


def shaken(model: torch.nn.Module, seed: int) -> Any:
    """Return the model with noise in every tensor, so that none is constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def clip_model(seed: int = 0, **changes: Any) -> CLIPModel:
    torch.manual_seed(seed)
    return shaken(CLIPModel(clip_config(**changes)), seed)


def vision_model(seed: int = 0, *, projection: bool = False) -> Any:
    torch.manual_seed(seed)
    kind = CLIPVisionModelWithProjection if projection else CLIPVisionModel
    return shaken(kind(clip_config().vision_config), seed)


def save(model: Any, folder: Path, **kwargs: Any) -> Path:
    model.save_pretrained(folder, **kwargs)
    return folder


def save_state(state: Mapping[str, torch.Tensor], config: Path, folder: Path) -> Path:
    """Write a folder with a state dict and another folder's config."""
    folder.mkdir(parents=True)
    save_file({k: t.contiguous() for k, t in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text((config / "config.json").read_text())
    return folder


def edit(path: Path, change: Mapping[str, Any]) -> None:
    """Set values, by dotted keys, in a JSON file."""
    content = json.loads(path.read_text())
    for dotted, value in change.items():
        *sections, key = dotted.split(".")
        at = content
        for section in sections:
            at = at[section]
        at[key] = value
    path.write_text(json.dumps(content))


def as_version_4(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a vision model's keys with the prefix, and the buffer that older versions save."""
    named = {
        key if key.startswith(("vision_model.", "visual_projection.")) else f"vision_model.{key}": t
        for key, t in state.items()
    }
    return {**named, "vision_model.embeddings.position_ids": torch.arange(17)[None]}


def as_version_5(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a vision model's keys without the prefix."""
    return {key.removeprefix("vision_model."): t for key, t in state.items()}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def open_clip_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a ``CLIPModel`` or a vision model under open_clip's names."""
    state = {key.removeprefix("vision_model."): t for key, t in model.state_dict().items()}
    whole = any(key.startswith("text_model.") for key in state)
    out = {
        "visual.class_embedding": state["embeddings.class_embedding"],
        "visual.positional_embedding": state["embeddings.position_embedding.weight"],
        "visual.conv1.weight": state["embeddings.patch_embedding.weight"],
        **_norm(state, "visual.ln_pre", "pre_layrnorm"),
        **_norm(state, "visual.ln_post", "post_layernorm"),
        **_blocks(state, "visual.", "", 2),
    }
    if "visual_projection.weight" in state:
        out["visual.proj"] = state["visual_projection.weight"].t()
    if whole:
        out |= {
            "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
            "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
            "text_projection": state["text_projection.weight"].t(),
            "logit_scale": state["logit_scale"],
            **_norm(state, "ln_final", "text_model.final_layer_norm"),
            **_blocks(state, "", "text_model.", 1),
        }
    return {key: t.detach().clone().contiguous() for key, t in out.items()}


def _norm(state: Mapping[str, torch.Tensor], to: str, name: str) -> dict[str, torch.Tensor]:
    return {f"{to}.{leaf}": state[f"{name}.{leaf}"] for leaf in ("weight", "bias")}


def _blocks(
    state: Mapping[str, torch.Tensor], to: str, prefix: str, layers: int
) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        a, b = f"{to}transformer.resblocks.{layer}", f"{prefix}encoder.layers.{layer}"
        for leaf in ("weight", "bias"):
            qkv = [state[f"{b}.self_attn.{p}_proj.{leaf}"] for p in "qkv"]
            out[f"{a}.attn.in_proj_{leaf}"] = torch.cat(qkv)
        for own, other in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("mlp.c_fc", "mlp.fc1"),
            ("mlp.c_proj", "mlp.fc2"),
        ):
            out |= _norm(state, f"{a}.{own}", f"{b}.{other}")
    return out

"""The configurations of one CLIP in both libraries: Hugging Face's ``config.json`` and
``preprocessor_config.json``, open_clip's ``model_cfg`` and ``preprocess_cfg``.

What the other cannot say is refused, by its name and value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raymerge.errors import CheckpointError, excerpt
from raymerge.models.checkpoints.locate import read_json

CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
_PROCESSOR_FILE = "processor_config.json"  # transformers 5 may write this one instead

_OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
_OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_VOCABULARY = 49408
_END_OF_TEXT = 49407
_OLD_END_OF_TEXT = 2  # with it, and only with it, transformers pools at the highest id
_EPS = 1e-5
_RESAMPLE = {2: "bilinear", 3: "bicubic"}

_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": _EPS,
}
_TEXT_DEFAULTS = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": _EPS,
    "eos_token_id": _END_OF_TEXT,
}

_MODEL_KEYS = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "init_logit_scale"}
_TOWER_KEYS = {"layers", "width", "mlp_ratio", "norm_kwargs"}
_VISION_KEYS = {*_TOWER_KEYS, "head_width", "image_size", "patch_size"}
_TEXT_KEYS = {*_TOWER_KEYS, "heads", "context_length", "vocab_size", "pool_type", "eos_id"}
# What open_clip's configurations may say and still be plain: these are its defaults.
_PLAIN = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "pad_id": (0,),
    "multimodal_cfg": (None,),
}


class _Reader:
    """Values of one section, refused where they are not what they must be."""

    def __init__(self, where: str, section: str, values: Mapping[str, Any]) -> None:
        self._where, self._section, self._values = where, section, values

    def refused(self, key: str, why: str) -> CheckpointError:
        name = f"{self._section}.{key}" if self._section else key
        return CheckpointError(f"{self._where}: {name} is {excerpt(self._values.get(key))}: {why}")

    def count(self, key: str) -> int:
        value = self._values.get(key)
        if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.refused(key, "not a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            raise self.refused(key, "not a number")
        return value

    def channels(self, key: str, default: Sequence[float]) -> list[float]:
        value = self._values.get(key, default)
        if not isinstance(value, list | tuple) or len(value) != 3:
            raise self.refused(key, "not 3 numbers")
        each = _Reader(self._where, f"{self._section}{key}", dict(zip("012", value, strict=True)))
        return [each.number(channel, 0.0) for channel in "012"]


def read_huggingface(folder: Path) -> dict[str, Any]:
    """``model_cfg`` and ``preprocess_cfg`` for a folder of Hugging Face's. Raises
    :class:`CheckpointError` for what open_clip cannot express."""
    config = _mapping(folder / CONFIG_FILE)
    model_cfg = open_clip_config(config, f"model: {folder / CONFIG_FILE}")
    image_size = model_cfg["vision_cfg"]["image_size"]
    for name in (PREPROCESSOR_FILE, _PROCESSOR_FILE):
        if (folder / name).is_file():
            given = _mapping(folder / name)
            given = given.get("image_processor", given)
            if not isinstance(given, dict):
                raise CheckpointError(f"model: {folder / name}: image_processor is no mapping")
            where = f"model: {folder / name}"
            return {
                "model_cfg": model_cfg,
                "preprocess_cfg": _preprocess_cfg(given, image_size, where),
            }
    return {"model_cfg": model_cfg, "preprocess_cfg": {}}


def _mapping(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}, not a mapping")
    return found


def open_clip_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """open_clip's ``model_cfg`` for Hugging Face's ``config.json``."""
    top = _Reader(where, "", {"projection_dim": 512, **config})
    if config.get("model_type") != "clip":
        raise top.refused("model_type", "only a whole CLIPModel (clip) can be the pretrained model")
    vision = _section(config, "vision_config", _VISION_DEFAULTS, where)
    text = _section(config, "text_config", _TEXT_DEFAULTS, where)
    of_vision = _Reader(where, "vision_config", vision)
    of_text = _Reader(where, "text_config", text)
    if vision["hidden_act"] != text["hidden_act"]:
        raise of_text.refused("hidden_act", f"the image tower has {vision['hidden_act']!r}")
    if vision["hidden_act"] not in ("quick_gelu", "gelu"):
        raise of_vision.refused("hidden_act", "open_clip has quick_gelu and gelu")
    if vision["num_channels"] != 3:
        raise of_vision.refused("num_channels", "open_clip's images have 3 channels")
    heads, width = of_vision.count("num_attention_heads"), of_vision.count("hidden_size")
    if width % heads:
        raise of_vision.refused("num_attention_heads", f"does not divide the width {width}")
    if text["vocab_size"] != _VOCABULARY:
        raise of_text.refused("vocab_size", f"CLIP's own tokenizer has {_VOCABULARY} tokens")
    model_cfg = {
        "embed_dim": top.count("projection_dim"),
        "vision_cfg": {
            "image_size": of_vision.count("image_size"),
            "layers": of_vision.count("num_hidden_layers"),
            "width": width,
            "head_width": width // heads,
            "patch_size": of_vision.count("patch_size"),
            **_tower(of_vision, vision),
        },
        "text_cfg": {
            "context_length": of_text.count("max_position_embeddings"),
            "vocab_size": of_text.count("vocab_size"),
            "width": of_text.count("hidden_size"),
            "heads": of_text.count("num_attention_heads"),
            "layers": of_text.count("num_hidden_layers"),
            **_tower(of_text, text),
            **_pooling(of_text, text["eos_token_id"]),
        },
    }
    if vision["hidden_act"] == "quick_gelu":
        model_cfg["quick_gelu"] = True
    return model_cfg


def _section(
    config: Mapping[str, Any], name: str, defaults: Mapping[str, Any], where: str
) -> Mapping[str, Any]:
    """One tower's values; those of the old ``*_config_dict`` come first, as in transformers."""
    given = config.get(f"{name}_dict") or config.get(name) or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where}: {name} is {excerpt(given)}, not a mapping")
    return {**defaults, **given}


def _tower(reader: _Reader, values: Mapping[str, Any]) -> dict[str, Any]:
    """What is said only where it is not open_clip's default."""
    found: dict[str, Any] = {}
    width, hidden = reader.count("hidden_size"), reader.count("intermediate_size")
    if hidden != 4 * width:
        ratio = hidden / width
        if int(width * ratio) != hidden:
            ratio = (hidden + 0.5) / width
        found["mlp_ratio"] = ratio
    if values["layer_norm_eps"] != _EPS:
        found["norm_kwargs"] = {"eps": reader.number("layer_norm_eps", _EPS)}
    return found


def _pooling(reader: _Reader, end: Any) -> dict[str, Any]:
    """Both pool at the first ``end`` token, which is the highest id of CLIP's vocabulary."""
    if end in (_OLD_END_OF_TEXT, _END_OF_TEXT):
        return {}
    if isinstance(end, bool) or not isinstance(end, int):
        raise reader.refused("eos_token_id", "open_clip pools at one token")
    return {"pool_type": "eos", "eos_id": end}


def _preprocess_cfg(given: Mapping[str, Any], image_size: int, where: str) -> dict[str, Any]:
    reader = _Reader(where, "", given)
    if (
        given.get("do_rescale", True)
        and abs(reader.number("rescale_factor", 1 / 255) - 1 / 255) > 1e-9
    ):
        raise reader.refused("rescale_factor", "open_clip divides by 255")
    for key in ("do_rescale", "do_resize"):
        if not given.get(key, True):
            raise reader.refused(key, "open_clip always does")
    resample = given.get("resample", 3)
    if resample not in tuple(_RESAMPLE):
        raise reader.refused("resample", "open_clip has 2 (bilinear) and 3 (bicubic)")
    found: dict[str, Any] = {"size": image_size, "mode": "RGB"}
    normalise = given.get("do_normalize", True)
    found["mean"] = reader.channels("image_mean", _OPENAI_MEAN) if normalise else [0.0] * 3
    found["std"] = reader.channels("image_std", _OPENAI_STD) if normalise else [1.0] * 3
    found["interpolation"] = _RESAMPLE[resample]
    found["resize_mode"] = _resize_mode(given, image_size, reader)
    return found


def _resize_mode(given: Mapping[str, Any], image_size: int, reader: _Reader) -> str:
    """The shortest side and a crop from the middle, or both sides at once."""
    square = {"height": image_size, "width": image_size}
    size = given.get("size", image_size)
    crop = given.get("crop_size", image_size)
    if size == square and (not given.get("do_center_crop", True) or crop in (square, image_size)):
        return "squash"
    if size not in (image_size, {"shortest_edge": image_size}):
        raise reader.refused("size", f"the model's images have {image_size} pixels a side")
    if not given.get("do_center_crop", True) or crop not in (square, image_size):
        raise reader.refused("crop_size", f"the model's images have {image_size} pixels a side")
    return "shortest"


# --- from open_clip ------------------------------------------------------------------------------


def huggingface_config(model_cfg: Mapping[str, Any], where: str, dtype: str) -> dict[str, Any]:
    """Hugging Face's ``config.json`` for open_clip's ``model_cfg``."""
    vision, text = model_cfg.get("vision_cfg"), model_cfg.get("text_cfg")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise CheckpointError(f"{where}: has no vision_cfg or no text_cfg; it cannot be written")
    _require_plain(model_cfg, _MODEL_KEYS, f"{where}: ")
    _require_plain(vision, _VISION_KEYS, f"{where}: vision_cfg.")
    _require_plain(text, _TEXT_KEYS, f"{where}: text_cfg.")
    if isinstance(vision.get("layers"), list | tuple):
        raise CheckpointError(
            f"{where}: vision_cfg.layers is a ResNet's, and Hugging Face has none"
        )
    vision = {"layers": 12, "width": 768, "head_width": 64, **vision}
    text = {"layers": 12, "width": 512, "heads": 8, "context_length": 77, **text}
    act, dimension = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu", model_cfg["embed_dim"]
    of_vision = _Reader(where, "vision_cfg", vision)
    end = text.get("eos_id", 2) if text.get("pool_type") == "eos" else _OLD_END_OF_TEXT
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": dimension,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": dtype,
        "vision_config": {
            "model_type": "clip_vision_model",
            **_hidden(vision),
            "num_attention_heads": vision["width"] // vision["head_width"],
            "num_channels": 3,
            "image_size": of_vision.count("image_size"),
            "patch_size": of_vision.count("patch_size"),
            "projection_dim": dimension,
            "hidden_act": act,
        },
        "text_config": {
            "model_type": "clip_text_model",
            **_hidden(text),
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text.get("vocab_size", _VOCABULARY),
            "projection_dim": dimension,
            "hidden_act": act,
            "bos_token_id": 49406,
            "eos_token_id": end,
            "pad_token_id": 1,
        },
    }


def _hidden(cfg: Mapping[str, Any]) -> dict[str, Any]:
    width = cfg["width"]
    return {
        "hidden_size": width,
        "intermediate_size": int(width * cfg.get("mlp_ratio", 4)),
        "num_hidden_layers": cfg["layers"],
        "layer_norm_eps": (cfg.get("norm_kwargs") or {}).get("eps", _EPS),
    }


def _require_plain(cfg: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise for a setting that Hugging Face's CLIP does not have."""
    for key, value in cfg.items():
        eos = key == "pool_type" and value == "eos" and "eos_id" in known
        norm = key == "norm_kwargs" and set(value or {}) - {"eps"}
        if eos or (key in known and key != "pool_type" and not norm):
            continue
        if value in _PLAIN.get(key, (None, False, 0)):
            continue
        raise CheckpointError(f"{where}{key} is {value!r}, which Hugging Face's CLIP has not")


def preprocessor_config(preprocess_cfg: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Hugging Face's ``preprocessor_config.json`` for open_clip's ``preprocess_cfg``."""
    mode = preprocess_cfg.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise CheckpointError(
            f"preprocess_cfg: resize_mode is {mode!r}, which Hugging Face's CLIP has not"
        )
    square = {"height": image_size, "width": image_size}
    interpolation = preprocess_cfg.get("interpolation", "bicubic")
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size} if mode == "shortest" else square,
        "resample": 2 if interpolation == "bilinear" else 3,
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess_cfg.get("mean") or _OPENAI_MEAN),
        "image_std": list(preprocess_cfg.get("std") or _OPENAI_STD),
    }

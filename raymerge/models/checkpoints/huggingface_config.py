"""The configurations of one CLIP in both libraries: Hugging Face's ``config.json`` and
``preprocessor_config.json``, open_clip's ``model_cfg`` and ``preprocess_cfg``.

Each direction refuses what the other library cannot express, by its key and value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError

from raymerge.config.wording import explain
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

_SchemaT = TypeVar("_SchemaT", bound=BaseModel)


def validated(schema: type[_SchemaT], values: object, where: str, section: str = "") -> _SchemaT:
    """Return a section of a config file, typed. Raises :class:`CheckpointError` naming the file
    (``where``) and the key."""
    if not isinstance(values, Mapping):
        name = f"{where}: {section}" if section else where
        raise CheckpointError(f"{name} is {excerpt(values)}, not a mapping; correct it")
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        prefix = f"{section}." if section else ""
        raise CheckpointError(f"{where}: {prefix}{explain(error, schema)}") from None


def _number(value: Any) -> float:
    """Return a number as it is: an integer stays one where it is written again."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        raise ValueError(f"{excerpt(value)} is not a number")
    return value


def _channels(value: Any) -> Sequence[float]:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise ValueError(f"{excerpt(value)} is not 3 numbers")
    return [_number(each) for each in value]


def _one_side(value: Any) -> Any:
    """Return the side of a square that is written as height and width."""
    is_square = isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]
    return value[0] if is_square else value


_Count = Annotated[int, Field(gt=0, le=1 << 24)]
_Side = Annotated[_Count, BeforeValidator(_one_side)]
Number = Annotated[float, PlainValidator(_number)]
Channels = Annotated[Sequence[float], PlainValidator(_channels)]


class _Section(BaseModel):
    """A section of Hugging Face's files, with the defaults of its library."""

    model_config = ConfigDict(strict=True, frozen=True)


class _VisionConfig(_Section):
    hidden_size: _Count = 768
    intermediate_size: _Count = 3072
    num_hidden_layers: _Count = 12
    num_attention_heads: _Count = 12
    num_channels: Literal[3] = 3
    image_size: _Side = 224
    patch_size: _Side = 32
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Number = _EPS


class _TextConfig(_Section):
    vocab_size: Literal[49408] = 49408  # open_clip's tokenizer has no other vocabulary
    hidden_size: _Count = 512
    intermediate_size: _Count = 2048
    num_hidden_layers: _Count = 12
    num_attention_heads: _Count = 8
    max_position_embeddings: _Count = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Number = _EPS
    eos_token_id: int = _END_OF_TEXT


class _ClipConfig(_Section):
    projection_dim: _Count = 512


class _Preprocessor(_Section):
    do_resize: Literal[True] = True
    do_center_crop: bool = True
    do_rescale: Literal[True] = True
    do_normalize: bool = True
    size: Any = None
    crop_size: Any = None
    resample: Literal[2, 3] = 3
    rescale_factor: Number = 1 / 255
    image_mean: Channels = _OPENAI_MEAN
    image_std: Channels = _OPENAI_STD


# --- to open_clip --------------------------------------------------------------------------------


def read_huggingface(folder: Path) -> dict[str, Any]:
    """Return ``model_cfg`` and ``preprocess_cfg`` of a folder that Hugging Face's library wrote.

    Raises :class:`CheckpointError` for what open_clip cannot express.
    """
    path = folder / CONFIG_FILE
    model_cfg = _open_clip_config(read_json(path), f"model: {path}")
    image_size = model_cfg["vision_cfg"]["image_size"]
    for path in (folder / PREPROCESSOR_FILE, folder / _PROCESSOR_FILE):
        if path.is_file():
            values = read_json(path)
            if isinstance(values, dict):
                values = values.get("image_processor", values)
            preprocess_cfg = _preprocess_cfg(values, image_size, f"model: {path}")
            return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    return {"model_cfg": model_cfg, "preprocess_cfg": {}}


def _open_clip_config(content: Any, where: str) -> dict[str, Any]:
    """Return open_clip's ``model_cfg`` for Hugging Face's ``config.json``."""
    config = validated(_ClipConfig, content, where)
    if content.get("model_type") != "clip":
        raise CheckpointError(
            f"{where}: model_type is {excerpt(content.get('model_type'))}: only a whole CLIPModel "
            "(clip) can be the pretrained model"
        )
    # The sections of the old ``*_config_dict`` come first, as in transformers.
    towers = [
        content.get(f"{name}_dict") or content.get(name) or {}
        for name in ("vision_config", "text_config")
    ]
    vision = validated(_VisionConfig, towers[0], where, "vision_config")
    text = validated(_TextConfig, towers[1], where, "text_config")
    # open_clip has one activation for both towers, and the width of a head instead of their number.
    if vision.hidden_act != text.hidden_act:
        raise CheckpointError(
            f"{where}: text_config.hidden_act is {text.hidden_act!r}, that of the image tower "
            f"{vision.hidden_act!r}; open_clip has one for both; use a model with one"
        )
    heads, width = vision.num_attention_heads, vision.hidden_size
    if width % heads:
        raise CheckpointError(
            f"{where}: vision_config.num_attention_heads is {heads}, which does not divide the "
            f"width {width}; correct it"
        )
    model_cfg: dict[str, Any] = {
        "embed_dim": config.projection_dim,
        "vision_cfg": {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": width,
            "head_width": width // heads,
            "patch_size": vision.patch_size,
            **_uncommon(vision),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "layers": text.num_hidden_layers,
            **_uncommon(text),
        },
    }
    # Both pool at the first end token, which is the highest id of CLIP's vocabulary.
    if text.eos_token_id not in (_OLD_END_OF_TEXT, _END_OF_TEXT):
        model_cfg["text_cfg"] |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    if vision.hidden_act == "quick_gelu":
        model_cfg["quick_gelu"] = True
    return model_cfg


def _uncommon(tower: _VisionConfig | _TextConfig) -> dict[str, Any]:
    """Return the settings of a tower that are not open_clip's defaults."""
    settings: dict[str, Any] = {}
    width, hidden = tower.hidden_size, tower.intermediate_size
    if hidden != 4 * width:
        ratio = hidden / width
        # open_clip rounds width · ratio down.
        settings["mlp_ratio"] = ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
    if tower.layer_norm_eps != _EPS:
        settings["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    return settings


def _preprocess_cfg(values: object, image_size: int, where: str) -> dict[str, Any]:
    """Return open_clip's ``preprocess_cfg`` for Hugging Face's ``preprocessor_config.json``."""
    preprocessor = validated(_Preprocessor, values, where)
    if abs(preprocessor.rescale_factor - 1 / 255) > 1e-9:
        raise CheckpointError(
            f"{where}: rescale_factor is {preprocessor.rescale_factor}: open_clip divides by 255; "
            "write 1/255"
        )
    is_normalised = preprocessor.do_normalize
    return {
        "size": image_size,
        "mode": "RGB",
        "mean": list(preprocessor.image_mean) if is_normalised else [0.0] * 3,
        "std": list(preprocessor.image_std) if is_normalised else [1.0] * 3,
        "interpolation": _RESAMPLE[preprocessor.resample],
        "resize_mode": _resize_mode(preprocessor, image_size, where),
    }


def _resize_mode(preprocessor: _Preprocessor, image_size: int, where: str) -> str:
    """Return open_clip's way to the model's square: the shortest side and a crop from the middle,
    or both sides at once."""
    square = {"height": image_size, "width": image_size}
    size = image_size if preprocessor.size is None else preprocessor.size
    crop_size = image_size if preprocessor.crop_size is None else preprocessor.crop_size
    is_whole_crop = crop_size in (square, image_size)
    if size == square and (is_whole_crop or not preprocessor.do_center_crop):
        return "squash"
    is_shortest = size in (image_size, {"shortest_edge": image_size})
    if not (is_shortest and is_whole_crop and preprocessor.do_center_crop):
        raise CheckpointError(
            f"{where}: size is {excerpt(size)} and crop_size {excerpt(crop_size)} (do_center_crop: "
            f"{preprocessor.do_center_crop}): the model's images have {image_size} pixels a side; "
            "correct preprocessor_config.json"
        )
    return "shortest"


# --- to Hugging Face -----------------------------------------------------------------------------

_MODEL_KEYS = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "init_logit_scale"}
_TOWER_KEYS = {"layers", "width", "mlp_ratio", "norm_kwargs"}
_VISION_KEYS = {*_TOWER_KEYS, "head_width", "image_size", "patch_size"}
_TEXT_KEYS = {*_TOWER_KEYS, "heads", "context_length", "vocab_size", "pool_type", "eos_id"}
# Values of open_clip's other settings with which they change nothing.
_NEUTRAL = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "pad_id": (0,),
    "multimodal_cfg": (None,),
}


def huggingface_config(model_cfg: Mapping[str, Any], where: str, dtype: str) -> dict[str, Any]:
    """Return Hugging Face's ``config.json`` for open_clip's ``model_cfg``."""
    vision, text = model_cfg.get("vision_cfg"), model_cfg.get("text_cfg")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise CheckpointError(
            f"{where}: has no vision_cfg or no text_cfg; it cannot be converted; name a whole CLIP"
        )
    # What Hugging Face's CLIP does not have.
    _require_plain(model_cfg, _MODEL_KEYS, f"{where}: ")
    _require_plain(vision, _VISION_KEYS, f"{where}: vision_cfg.")
    _require_plain(text, _TEXT_KEYS, f"{where}: text_cfg.")
    if isinstance(vision.get("layers"), list | tuple):
        raise CheckpointError(
            f"{where}: vision_cfg.layers is a ResNet's, and Hugging Face has none; convert a ViT"
        )
    # open_clip's defaults.
    vision = {"layers": 12, "width": 768, "head_width": 64, **vision}
    text = {"layers": 12, "width": 512, "heads": 8, "context_length": 77, **text}
    act, dimension = "quick_gelu" if model_cfg.get("quick_gelu") else "gelu", model_cfg["embed_dim"]
    sizes = validated(_Sizes, vision, f"{where}: vision_cfg")
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
            "image_size": sizes.image_size,
            "patch_size": sizes.patch_size,
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


class _Sizes(_Section):
    image_size: _Side
    patch_size: _Side


def _hidden(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that both towers have."""
    width = cfg["width"]
    return {
        "hidden_size": width,
        "intermediate_size": int(width * cfg.get("mlp_ratio", 4)),
        "num_hidden_layers": cfg["layers"],
        "layer_norm_eps": (cfg.get("norm_kwargs") or {}).get("eps", _EPS),
    }


def _require_plain(cfg: Mapping[str, Any], keys: set[str], where: str) -> None:
    """Raise :class:`CheckpointError` for a setting that Hugging Face's CLIP does not have."""
    for key, value in cfg.items():
        is_eos = key == "pool_type" and value == "eos" and "eos_id" in keys
        is_other_norm = key == "norm_kwargs" and set(value or {}) - {"eps"}
        if is_eos or (key in keys and key != "pool_type" and not is_other_norm):
            continue
        if value not in _NEUTRAL.get(key, (None, False, 0)):
            raise CheckpointError(
                f"{where}{key} is {value!r}, which Hugging Face's CLIP does not have; only models "
                "without it can be converted"
            )


def preprocessor_config(preprocess_cfg: Mapping[str, Any], image_size: int) -> dict[str, Any]:
    """Return Hugging Face's ``preprocessor_config.json`` for open_clip's ``preprocess_cfg``."""
    mode = preprocess_cfg.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise CheckpointError(
            f"preprocess_cfg: resize_mode is {mode!r}, which Hugging Face's CLIP does not have; "
            "use shortest or squash"
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

"""Files as task_vectors and AdaMerging released them, of classes that are not installed.

The classes are in ``sys.modules`` only while a file is written.
"""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn


class ImageEncoder(nn.Module):
    """``src.modeling``: a CLIP without its text transformer, and its transforms."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.model = clip
        self.train_preprocess = image_transform_v2(PreprocessCfg(size=32), is_train=True)
        self.val_preprocess = image_transform_v2(PreprocessCfg(size=32), is_train=False)
        self.cache_dir = None
        del clip.transformer

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model.encode_image(images)
        return features


class ClassificationHead(nn.Linear):
    """``src.modeling``: the head of one task, with the logit scale in its weight."""

    def __init__(self, weight_CD: Tensor, normalize: bool = True, bias: float = 0.0) -> None:
        super().__init__(weight_CD.shape[1], weight_CD.shape[0])
        self.normalize = normalize
        self.weight = nn.Parameter(weight_CD.clone())
        self.bias = nn.Parameter(torch.full_like(self.bias, bias))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.normalize:
            inputs = inputs / inputs.norm(dim=-1, keepdim=True)
        return super().forward(inputs)


OLD = {"clip": ("open_clip.model", "CLIP"), "visual": ("open_clip.model", "VisualTransformer")}
SRC = {
    "clip": ("src.open_clip.model", "CLIP"),
    "visual": ("src.open_clip.model", "VisualTransformer"),
}
NEW = {"clip": ("open_clip.model", "CLIP"), "visual": ("open_clip.transformer", "Transformer_")}


def encoder_of(clip: Any) -> ImageEncoder:
    """Return a copy of an open_clip model, wrapped as in the release."""
    return ImageEncoder(copy.deepcopy(clip))


def _zip(value: Any, path: Path) -> None:
    torch.save(value, path)


def _stream(value: Any, path: Path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


def _plain(protocol: int) -> Callable[[Any, Path], None]:
    return lambda value, path: path.write_bytes(pickle.dumps(value, protocol=protocol))


CONTAINERS: dict[str, Callable[[Any, Path], None]] = {
    "zip": _zip,
    "stream": _stream,
    **{f"pickle {protocol}": _plain(protocol) for protocol in (2, 3, 4, 5)},
}


def write_release(module: nn.Module, path: Path, container: str = "zip", names: Any = OLD) -> None:
    """Write a pickled encoder or head under the classes' old names."""
    renamed: list[tuple[Any, str, str]] = []
    if isinstance(module, ImageEncoder):
        renamed = [(module.model, *names["clip"]), (module.model.visual, *names["visual"])]
    renamed.append((module, "src.modeling", type(module).__name__))
    with _fakes(renamed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no source code of the classes
        CONTAINERS[container](module, path)


@contextmanager
def _fakes(renamed: list[tuple[Any, str, str]]) -> Iterator[None]:
    before, modules, kinds = dict(sys.modules), {}, []
    for owner, module, name in renamed:
        fake = modules.setdefault(module, ModuleType(module))
        kind = type(name, (type(owner),), {"__module__": module, "__qualname__": name})
        setattr(fake, name, kind)
        kinds.append((owner, type(owner)))
        owner.__class__ = kind
        for parent in ("src", "src.open_clip"):
            modules.setdefault(parent, ModuleType(parent))
    real = {name: before[name] for name in modules if name in before}
    for name, fake in modules.items():
        if name in real:
            vars(fake).update({k: v for k, v in vars(real[name]).items() if k not in vars(fake)})
        sys.modules[name] = fake
    try:
        yield
    finally:
        for owner, kind in kinds:
            owner.__class__ = kind
        for name in modules:
            sys.modules.pop(name)
        sys.modules.update(real)

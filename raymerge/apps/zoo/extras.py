"""More models for the demo world, as candidates of a merge that chooses among them.

``relevant`` ones are fine-tuned on the world's own tasks, with other images and fewer steps than
the experts; ``irrelevant`` ones on tasks that no test covers: how far an image is turned, or in
which colour it is tinted. All start from the world's pretrained model.

Legend: N images.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from open_clip.model import CLIP

from raymerge.apps.zoo.build import RunTasks, in_processes
from raymerge.apps.zoo.experts import fit
from raymerge.apps.zoo.images import FAMILIES, draw_images
from raymerge.apps.zoo.pretrain import build_tokenizer, open_for_training, save_tower, to_tensor
from raymerge.apps.zoo.recipe import TEMPLATE, ExpertRecipe, ZooRecipe
from raymerge.files.threads import torch_threads
from raymerge.models.heads import zero_shot_head

Kind = Literal["relevant", "turned", "tinted"]
Relevance = Literal["relevant", "irrelevant"]
FORMAT = 1
"""Raised when the models change in a way that the numbers below do not show."""
TURNS = ("upright view", "view turned left", "inverted view", "view turned right")
TINTS = {
    "red glass": (1.0, 0.5, 0.5),
    "green glass": (0.5, 1.0, 0.5),
    "blue glass": (0.5, 0.5, 1.0),
    "yellow glass": (1.0, 1.0, 0.4),
    "violet glass": (1.0, 0.4, 1.0),
    "grey glass": (0.6, 0.6, 0.6),
}


@dataclass(frozen=True, kw_only=True)
class ExtraRecipe:
    """Training of one extra model: as an expert, with fewer steps and images."""

    expert: ExpertRecipe = field(
        default_factory=lambda: ExpertRecipe(
            steps=60, images=600, lr=8e-4, batch=32, rehearsal_batch=12, rehearsal_images=24
        )
    )

    def fingerprint(self, zoo: ZooRecipe, seed: int) -> str:
        """Return the hexadecimal digest of the world's numbers and these."""
        own = {"format": FORMAT, "zoo": zoo.fingerprint(seed), **asdict(self)}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Extra:
    """One model: its kind, the task of its images, and ``copy``, which counts repetitions."""

    kind: Kind
    task: str
    copy: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.task}-{self.copy}"


def extras(relevance: Relevance, count: int) -> tuple[Extra, ...]:
    """Return the first ``count`` models of an endless list that cycles through the tasks."""
    kinds: tuple[Kind, ...] = ("relevant",) if relevance == "relevant" else ("turned", "tinted")
    tasks = tuple(FAMILIES)
    rounds = ((i // len(tasks), tasks[i % len(tasks)]) for i in range(count))
    return tuple(Extra(kinds[r % len(kinds)], task, r // len(kinds)) for r, task in rounds)


def build_extras(
    zoo_root: Path,
    models: Sequence[Extra],
    *,
    seed: int = 0,
    workers: int | None = None,
    zoo: ZooRecipe | None = None,
    recipe: ExtraRecipe | None = None,
    run_tasks: RunTasks | None = None,
) -> dict[str, Path]:
    """Return the checkpoint of every model by name; those that are missing are trained.

    They lie in a folder beside the world's. ``run_tasks`` as for ``build_zoo``.
    """
    zoo, recipe = zoo or ZooRecipe(), recipe or ExtraRecipe()
    folder = zoo_root.with_name(f"{zoo_root.name}-extras-{recipe.fingerprint(zoo, seed)}")
    folder.mkdir(parents=True, exist_ok=True)
    run = run_tasks or in_processes(workers)
    paths = {extra.name: folder / f"{extra.name}.safetensors" for extra in models}
    missing = [extra for extra in models if not paths[extra.name].exists()]
    if missing:
        arguments = [(zoo_root, folder, extra, seed, zoo, recipe) for extra in missing]
        for _ in run(train_extra, arguments):
            pass
    return paths


def train_extra(
    zoo_root: Path, folder: Path, extra: Extra, seed: int, zoo: ZooRecipe, recipe: ExtraRecipe
) -> Path:
    """Fine-tune one model and return ``folder/<name>.safetensors``; one thread, picklable."""
    path = folder / f"{extra.name}.safetensors"
    with torch_threads(1):
        model = open_for_training(zoo_root)
        _finetune(model, extra, seed, zoo, recipe.expert)
    save_tower(path, model, {"format": "pt"})
    return path


def _finetune(model: CLIP, extra: Extra, seed: int, zoo: ZooRecipe, recipe: ExpertRecipe) -> None:
    images, labels, names = draw_extra(extra, seed, zoo, recipe.images)
    head_DC = zero_shot_head(model, build_tokenizer(zoo.model), names, (TEMPLATE,))
    fit(model, recipe, head_DC, to_tensor(images), torch.from_numpy(labels), seed, extra.name)


def draw_extra(
    extra: Extra, seed: int, zoo: ZooRecipe, count: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], tuple[str, ...]]:
    """Return images (N, H, W, 3), labels (N,) and class names; the expert sees none of them.

    They have the same seed: another seed's handwritten digits are test images of this one.
    """
    used = zoo.expert_for(extra.task).images
    start = used + count * (3 * extra.copy + ("relevant", "turned", "tinted").index(extra.kind))
    images, labels = draw_images(seed, extra.task, "train", count, start)
    if extra.kind == "relevant":
        return images, labels, FAMILIES[extra.task].classnames
    change, names = _CHANGES[extra.kind]
    rng = np.random.default_rng((seed, zlib.crc32(extra.name.encode())))
    labels = rng.integers(len(names), size=count)
    changed = [change(image, int(label)) for image, label in zip(images, labels, strict=True)]
    return np.stack(changed), labels, names


def _turn(image: npt.NDArray[np.uint8], label: int) -> npt.NDArray[np.uint8]:
    return np.rot90(image, label)


def _tint(image: npt.NDArray[np.uint8], label: int) -> npt.NDArray[np.uint8]:
    glass: npt.NDArray[np.float64] = np.asarray(list(TINTS.values())[label])
    return np.asarray(image * glass, dtype=np.uint8)


_CHANGES: dict[str, tuple[Callable[[Any, int], Any], tuple[str, ...]]] = {
    "turned": (_turn, TURNS),
    "tinted": (_tint, tuple(TINTS)),
}

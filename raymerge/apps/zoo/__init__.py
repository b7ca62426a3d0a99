"""A demo world trained from scratch on a CPU: a small CLIP model and eight interfering experts."""

from raymerge.apps.zoo.build import RunTasks, ZooPaths, build_zoo, write_images
from raymerge.apps.zoo.experts import train_expert
from raymerge.apps.zoo.recipe import (
    WORLDS,
    ExpertRecipe,
    JointRecipe,
    ModelRecipe,
    PretrainRecipe,
    ZooRecipe,
)

__all__ = [
    "WORLDS",
    "ExpertRecipe",
    "JointRecipe",
    "ModelRecipe",
    "PretrainRecipe",
    "RunTasks",
    "ZooPaths",
    "ZooRecipe",
    "build_zoo",
    "train_expert",
    "write_images",
]

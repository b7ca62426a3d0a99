"""Texts for readers: the options behind a method's title, and the model card's account of a merge.

Each account is a full sentence on how the coefficients or the merged weights were found, and from
which images. The registry assigns the texts to the methods.
"""

from __future__ import annotations

from pathlib import Path

from raymerge.config import Config, OptimizerConfig
from raymerge.config.methods import (
    AdaMerging,
    Dare,
    Fisher,
    FwHard,
    FwSoft,
    RegMean,
    RegMeanPP,
    TaskArithmetic,
    Ties,
)


def task_arithmetic(options: TaskArithmetic) -> str:
    return f" (λ={options.scaling:g})"


def ties(options: Ties) -> str:
    return f" ({options.density:.0%}, {options.merge}, λ={options.effective_scaling:g})"


def dare(options: Dare) -> str:
    elect = ", elected signs" if options.elect_sign else ""
    return f" ({options.density:.0%}{elect}, λ={options.scaling:g})"


def adamerging(options: AdaMerging) -> str:
    bases = {"raw": "", "ties": "++", "iso": " on Iso-CTS"}
    wise = {"task": "task-wise", "block": "block-wise", "tensor": "layer-wise"}
    names = {"entropy": "", "kl": ", KL", "infomax": ", infomax", "cross_entropy": ", labels"}
    objective = names[options.objective]
    basis = bases.get(options.task_vectors, f" on {options.task_vectors.upper()}")
    return f"{basis} ({wise[options.granularity]}{objective})"


def frank_wolfe(options: FwHard | FwSoft) -> str:
    wise = {"task": "task-wise", "tensor": "layer-wise"}[options.granularity]
    return f" ({wise}, {options.iterations} iterations)"


def reference_account(options: object, config: Config) -> str:
    return "Nothing was merged, and no images were used."


def constant_account(options: object, config: Config) -> str:
    return "The coefficients are constants of the method; no images were used."


def checkpoints_account(options: object, config: Config) -> str:
    return "The merged weights follow from the checkpoints alone; no images were used."


def statistics_account(options: Fisher | RegMean | RegMeanPP, config: Config) -> str:
    return (
        f"The merged weights follow from statistics of each model on up to {options.images} "
        f"unlabeled images of its own task, seed {config.seed}."
    )


def adamerging_account(options: AdaMerging, config: Config) -> str:
    labels = options.objective == "cross_entropy"
    teachers = ", each task from its own model" if options.objective == "kl" else ""
    return (
        f"The coefficients were learned {'from' if labels else 'without'} labels{teachers}: "
        f"{config.optimizer.steps} steps of {_adam(config.optimizer)} on "
        f"{config.optimizer.images_per_step} {'labelled' if labels else 'unlabeled'} images of "
        f"each task per step, seed {config.seed}."
    )


def frank_wolfe_hard_account(options: FwHard, config: Config) -> str:
    return f"The coefficients are those of up to {_iterations(options, config)}."


def frank_wolfe_soft_account(options: FwSoft, config: Config) -> str:
    return (
        f"The coefficients are those of {_iterations(options, config)}. Each iteration merged the "
        f"models that the tasks chose by {config.optimizer.steps} steps of "
        f"{_adam(config.optimizer)}, without labels, on {config.optimizer.images_per_step} images "
        "of each task."
    )


def _iterations(options: FwHard | FwSoft, config: Config) -> str:
    labels = options.objective == "cross_entropy"
    start = f", from those of `{Path(options.start).name}`" if options.start is not None else ""
    return (
        f"{options.iterations} Frank-Wolfe iterations, with gradients of "
        f"{options.objective.replace('_', '-')} on up to {options.images} "
        f"{'labelled' if labels else 'unlabeled'} images of each task that has some, seed "
        f"{config.seed}{start}"
    )


def _adam(optimizer: OptimizerConfig) -> str:
    sharpness = f", sharpness-aware {optimizer.sharpness:g}" if optimizer.sharpness else ""
    return f"Adam (lr {optimizer.lr:g}, {optimizer.schedule}{sharpness})"

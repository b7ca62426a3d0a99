"""The table of merging methods: one complete row each.

    METHODS["tsv"] = Method("TSV-Merge", "Gargiulo et al., CVPR 2025", Tsv, basis=_tsv)

A row says how the merge is computed and what it needs; every other room asks the row, and no other
code tests the class of a method's options. Importing the table does not import torch: a row imports
its maths when its basis is made.

Legend: K models.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from raymerge.config import Config, MethodConfig, OptimizerConfig
from raymerge.config.methods import (
    AdaMerging,
    Aswudi,
    Average,
    Dare,
    Fisher,
    FwHard,
    FwSoft,
    Individual,
    IsoC,
    IsoCts,
    Joint,
    RegMean,
    RegMeanPP,
    Swudi,
    TaskArithmetic,
    Ties,
    Tsv,
    Wudi,
    ZeroShot,
)
from raymerge.merging import describe as words
from raymerge.merging.method import Images, Method, Monitoring, Objective, Schedule

if TYPE_CHECKING:
    from raymerge.merging.basis import Basis, BasisInputs


# --- the rows that λ multiplies ------------------------------------------------------------------


def _ties(options: Ties, inputs: BasisInputs) -> Basis:
    mean = options.merge == "mean"
    return inputs.ties(density=options.density, scope=options.trim_scope, mean=mean)


def _dare(options: Dare, inputs: BasisInputs) -> Basis:
    from raymerge.merging.dare import Dare as DareBasis

    return DareBasis(inputs.names, inputs.seed, options.density, options.elect_sign)


def _tsv(options: Any, inputs: BasisInputs) -> Basis:
    from raymerge.merging.basis import MatrixBasis
    from raymerge.merging.spectral import tsv

    return MatrixBasis(tsv)


def _iso_c(options: IsoC, inputs: BasisInputs) -> Basis:
    from raymerge.merging.basis import MatrixBasis
    from raymerge.merging.spectral import iso_c

    return MatrixBasis(iso_c, separate=False)


def _iso_cts(options: IsoCts | AdaMerging, inputs: BasisInputs) -> Basis:
    from raymerge.merging.basis import MatrixBasis
    from raymerge.merging.spectral import iso_cts

    return MatrixBasis(partial(iso_cts, common_fraction=options.common_fraction))


def _wudi(options: Wudi, inputs: BasisInputs) -> Basis:
    from raymerge.merging.basis import MatrixBasis
    from raymerge.merging.wudi import wudi

    solve = partial(wudi, iterations=options.iterations, lr=options.lr)
    return MatrixBasis(solve, separate=False)


def _swudi(options: Swudi, inputs: BasisInputs) -> Basis:
    from raymerge.merging.basis import MatrixBasis
    from raymerge.merging.wudi import swudi

    return MatrixBasis(partial(swudi, time=options.time, fraction=options.fraction))


def _aswudi(options: Any, inputs: BasisInputs) -> Basis:
    from raymerge.merging.basis import MatrixBasis
    from raymerge.merging.wudi import aswudi

    return MatrixBasis(aswudi)


def _adamerging(options: AdaMerging, inputs: BasisInputs) -> Basis | None:
    """Return the basis that ``task_vectors`` names; Φ of TIES keeps a row for each model."""
    match options.task_vectors:
        case "ties":
            scope = options.trim_scope
            return inputs.ties(density=options.density, scope=scope, count_signs=True)
        case "dare":
            return _dare(Dare(name="dare", density=options.density), inputs)
        case "tsv":
            return _tsv(options, inputs)
        case "iso":
            return _iso_cts(options, inputs)
        case "swudi":
            return _swudi(Swudi(name="swudi"), inputs)
        case "aswudi":
            return _aswudi(options, inputs)
        case "raw":
            return None


# --- what a method needs, and how it learns ----------------------------------------------------


def _unlabeled(options: Any) -> Images:
    return "unlabeled"


def _by_objective(options: AdaMerging | FwHard | FwSoft) -> Images:
    return "labelled" if options.objective == "cross_entropy" else "unlabeled"


def _zero(options: Any, models: int) -> float:
    return 0.0


def _one(options: Any, models: int) -> float:
    return 1.0


def _once(options: Fisher | RegMean | RegMeanPP, optimizer: OptimizerConfig) -> Schedule:
    return Schedule(steps=0, images=options.images)


def _iterations(options: FwHard | FwSoft, optimizer: OptimizerConfig) -> Schedule:
    return Schedule(options.iterations, options.images)


def _monitored(options: AdaMerging, optimizer: OptimizerConfig) -> Monitoring:
    return Monitoring(options.collapse, optimizer.nonfinite)


def _adamerging_objective(options: AdaMerging) -> Objective:
    return Objective(options.objective, options.temperature, options.normalise, options.filter)


_STATISTICS: dict[str, Any] = {
    "scaling": _one,
    "rows": False,
    "images": _unlabeled,
    "schedule": _once,
    "account": words.statistics_account,
}
_FRANK_WOLFE: dict[str, Any] = {
    "scaling": _zero,
    "images": _by_objective,
    "every_model_needs_images": False,
    "whole_gradient": lambda options: options.oracle == "cosine",
    # One coefficient for each tensor even where models are chosen whole: the start may need it.
    "granularity": lambda options: "tensor",
    "schedule": _iterations,
    "objective": lambda options: Objective(options.objective),
    "start": lambda options: options.start,
    "steps_key": "method.iterations",
}

METHODS: dict[str, Method] = {
    "zero_shot": Method(
        "Zero-shot (pretrained)",
        "Radford et al., ICML 2021",
        ZeroShot,
        scaling=_zero,
        reference="The pretrained model as it is",
        account=words.reference_account,
    ),
    "individual": Method(
        "Individual experts",
        "Ilharco et al., ICLR 2023",
        Individual,
        scaling=_zero,
        merges=False,
    ),
    "joint": Method(
        "Traditional MTL",
        "Caruana, Machine Learning 1997",
        Joint,
        scaling=_one,
        rows=False,
        reference="One model that was trained on all tasks at once",
        checkpoint=lambda options: str(options.checkpoint),
        account=words.reference_account,
    ),
    "average": Method(
        "Weight averaging",
        "Wortsman et al., ICML 2022",
        Average,
        scaling=lambda options, models: 1.0 / models,
    ),
    "task_arithmetic": Method(
        "Task arithmetic",
        "Ilharco et al., ICLR 2023",
        TaskArithmetic,
        describe=words.task_arithmetic,
    ),
    "ties": Method(
        "TIES-Merging",
        "Yadav et al., NeurIPS 2023",
        Ties,
        describe=words.ties,
        scaling=lambda options, models: float(options.effective_scaling),
        basis=_ties,
    ),
    "dare": Method("DARE", "Yu et al., ICML 2024", Dare, describe=words.dare, basis=_dare),
    "fisher": Method(
        "Fisher merging",
        "Matena and Raffel, NeurIPS 2022",
        Fisher,
        statistics="fisher",
        **_STATISTICS,
    ),
    "regmean": Method(
        "RegMean",
        "Jin et al., ICLR 2023",
        RegMean,
        statistics="regmean",
        open_clip_linears=True,
        **_STATISTICS,
    ),
    "regmean_pp": Method(
        "RegMean++",
        "Nguyen et al., arXiv 2508.03121",
        RegMeanPP,
        statistics="regmean_pp",
        open_clip_linears=True,
        **_STATISTICS,
    ),
    "tsv": Method("TSV-Merge", "Gargiulo et al., CVPR 2025", Tsv, basis=_tsv),
    "iso_c": Method(
        "Iso-C",
        "Marczak et al., ICML 2025",
        IsoC,
        basis=_iso_c,
        rows=False,
        account=words.checkpoints_account,
    ),
    "iso_cts": Method("Iso-CTS", "Marczak et al., ICML 2025", IsoCts, basis=_iso_cts),
    "wudi": Method(
        "WUDI-Merging",
        "Cheng et al., ICML 2025",
        Wudi,
        basis=_wudi,
        rows=False,
        account=words.checkpoints_account,
    ),
    "swudi": Method("SWUDI", "arXiv 2606.07289", Swudi, basis=_swudi),
    "aswudi": Method("ASWUDI", "arXiv 2606.07289", Aswudi, basis=_aswudi),
    "adamerging": Method(
        "AdaMerging",
        "Yang et al., ICLR 2024",
        AdaMerging,
        describe=words.adamerging,
        scaling=lambda options, models: float(options.effective_init),
        basis=_adamerging,
        loop="adam",
        images=_by_objective,
        granularity=lambda options: options.granularity,
        objective=_adamerging_objective,
        clamp=lambda options: options.clamp,
        monitoring=_monitored,
        account=words.adamerging_account,
    ),
    "fw_hard": Method(
        "FW-Merging, hard",
        "Chen et al., ICCV 2025",
        FwHard,
        describe=words.frank_wolfe,
        loop="frank_wolfe_hard",
        account=words.frank_wolfe_hard_account,
        **_FRANK_WOLFE,
    ),
    "fw_soft": Method(
        "FW-Merging, soft",
        "Chen et al., ICCV 2025",
        FwSoft,
        describe=words.frank_wolfe,
        loop="frank_wolfe_soft",
        inner_steps=True,
        account=words.frank_wolfe_soft_account,
        **_FRANK_WOLFE,
    ),
}


def method_of(options: MethodConfig) -> Method:
    return METHODS[options.name]


def describe(options: MethodConfig) -> str:
    """Return the title with its options, such as ``TIES-Merging (20%, sum, λ=0.3)``."""
    method = method_of(options)
    return method.title + method.describe(options)


def needed_images(config: Config) -> Images:
    """Return the kind of images that this config's method needs of every merged task."""
    return method_of(config.method).images(config.method)


def schedule_of(config: Config) -> Schedule:
    return method_of(config.method).schedule(config.method, config.optimizer)


def merged_checkpoints(config: Config) -> tuple[str, ...]:
    """Return the checkpoints that are merged, in the order of the rows of λ."""
    own = method_of(config.method).checkpoint(config.method)
    if own is not None:
        return (own,)
    return tuple(str(task.checkpoint) for task in config.models)

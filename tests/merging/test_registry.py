"""The rows of the registry: coefficients, images, granularity and titles."""

from __future__ import annotations

import pytest

from raymerge.config import METHOD_NAMES
from raymerge.config.methods import (
    AdaMerging,
    Average,
    Dare,
    Fisher,
    FwHard,
    FwSoft,
    Individual,
    IsoC,
    RegMeanPP,
    TaskArithmetic,
    Ties,
    Tsv,
    Wudi,
    ZeroShot,
)
from raymerge.merging.registry import METHODS, describe, method_of


def test_the_table_and_the_config_name_the_same_methods():
    assert set(METHODS) == set(METHOD_NAMES)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        (ZeroShot(name="zero_shot"), 0.0),
        (Average(name="average"), 1 / 8),
        (TaskArithmetic(name="task_arithmetic"), 0.3),
        (TaskArithmetic(name="task_arithmetic", scaling=0.7), 0.7),
        (Ties(name="ties"), 0.3),
        (Ties(name="ties", merge="mean"), 1.0),
        (Ties(name="ties", merge="mean", scaling=0.4), 0.4),
        (AdaMerging(name="adamerging"), 0.3),
        (AdaMerging(name="adamerging", init=0.1), 0.1),
        (AdaMerging(name="adamerging", task_vectors="dare"), 0.3),
        (AdaMerging(name="adamerging", task_vectors="tsv"), 1.0),
        (AdaMerging(name="adamerging", task_vectors="iso", init=0.1), 0.1),
        (AdaMerging(name="adamerging", task_vectors="aswudi"), 1.0),
        (Dare(name="dare"), 0.3),
        (Tsv(name="tsv"), 1.0),
        (IsoC(name="iso_c"), 1.3),
        (Fisher(name="fisher"), 1.0),  # of the one merged vector
        (FwHard(name="fw_hard"), 0.0),
    ],
)
def test_the_constant_coefficient_of_eight_tasks(config, scaling):
    assert method_of(config).scaling(config, 8) == scaling


@pytest.mark.parametrize(
    ("config", "images"),
    [
        (TaskArithmetic(name="task_arithmetic"), "none"),
        (Wudi(name="wudi"), "none"),
        (Fisher(name="fisher"), "unlabeled"),
        (RegMeanPP(name="regmean_pp"), "unlabeled"),
        (AdaMerging(name="adamerging"), "unlabeled"),
        (AdaMerging(name="adamerging", objective="kl"), "unlabeled"),
        (AdaMerging(name="adamerging", objective="cross_entropy"), "labelled"),
        (FwHard(name="fw_hard"), "labelled"),
        (FwSoft(name="fw_soft", objective="entropy"), "unlabeled"),
    ],
)
def test_the_images_that_a_method_needs(config, images):
    assert method_of(config).images(config) == images


@pytest.mark.parametrize(
    ("config", "granularity"),
    [
        (Average(name="average"), "task"),
        (Wudi(name="wudi"), "task"),
        (AdaMerging(name="adamerging"), "tensor"),
        (AdaMerging(name="adamerging", granularity="block"), "block"),
        (FwHard(name="fw_hard", granularity="task"), "tensor"),  # its start may be of a finer run
    ],
)
def test_the_granularity_of_a_methods_coefficients(config, granularity):
    assert method_of(config).granularity(config) == granularity


def test_only_adamerging_learns_and_only_individual_does_not_merge():
    assert [name for name, method in METHODS.items() if method.loop == "adam"] == ["adamerging"]
    assert [name for name, method in METHODS.items() if not method.merges] == ["individual"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (AdaMerging(name="adamerging"), "AdaMerging (layer-wise)"),
        (
            AdaMerging(name="adamerging", granularity="task", task_vectors="ties"),
            "AdaMerging++ (task-wise)",
        ),
        (Ties(name="ties"), "TIES-Merging (20%, sum, λ=0.3)"),
        (Ties(name="ties", merge="mean", density=0.5), "TIES-Merging (50%, mean, λ=1)"),
        (TaskArithmetic(name="task_arithmetic", scaling=0.4), "Task arithmetic (λ=0.4)"),
        (Individual(name="individual"), "Individual experts"),
        (Dare(name="dare", elect_sign=True), "DARE (20%, elected signs, λ=0.3)"),
        (
            AdaMerging(name="adamerging", task_vectors="tsv", objective="kl"),
            "AdaMerging on TSV (layer-wise, KL)",
        ),
        (FwHard(name="fw_hard", iterations=3), "FW-Merging, hard (layer-wise, 3 iterations)"),
        (FwSoft(name="fw_soft"), "FW-Merging, soft (task-wise, 15 iterations)"),
    ],
)
def test_the_title_shows_the_options(config, words):
    assert describe(config) == words

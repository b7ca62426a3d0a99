"""Every method by name, and what it is as constant coefficients over a basis."""

from __future__ import annotations

import pytest

from raymerge.config import (
    METHOD_NAMES,
    AdaMerging,
    Average,
    Individual,
    TaskArithmetic,
    Ties,
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
    ],
)
def test_the_constant_coefficient_of_eight_tasks(config, scaling):
    assert method_of(config).scaling(config, 8) == scaling


@pytest.mark.parametrize(
    ("config", "basis"),
    [
        (TaskArithmetic(name="task_arithmetic"), "raw"),
        (Ties(name="ties"), "ties"),
        (AdaMerging(name="adamerging"), "raw"),
        (AdaMerging(name="adamerging", task_vectors="ties"), "ties"),
    ],
)
def test_the_basis(config, basis):
    assert method_of(config).basis(config) == basis


def test_only_adamerging_learns_and_only_individual_does_not_merge():
    assert [name for name, method in METHODS.items() if method.learned] == ["adamerging"]
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
    ],
)
def test_a_method_in_words(config, words):
    assert describe(config) == words

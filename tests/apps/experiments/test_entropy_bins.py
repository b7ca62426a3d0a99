"""Entropy against loss: bins by hand, Spearman against SciPy's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats

from raymerge.apps.experiments.entropy_bins import (
    ENTROPY_EDGES,
    EntropyLoss,
    entropy_against_loss,
    spearman,
)


def test_bins_and_means_by_hand():
    entropy_N = np.array([0.0, 0.05, 0.1, 0.11, 0.2, 0.95, 1.0, 1.5, 5.9])
    loss_N = np.array([1.0, 2.0, 6.0, 0.5, 1.5, 2.0, 4.0, 7.0, 9.0])
    result = entropy_against_loss(entropy_N, loss_N)
    assert result.counts == (3, 2, 0, 0, 0, 0, 0, 0, 0, 2, 2)
    assert result.mean_loss == (3.0, 1.0, *[None] * 7, 3.0, 8.0)


def test_every_edge_belongs_to_the_bin_below_it():
    edges_N = np.array(ENTROPY_EDGES)
    assert edges_N.tolist() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert entropy_against_loss(edges_N, edges_N).counts == (*[1] * 10, 0)
    above_N = np.nextafter(edges_N, np.inf)
    assert entropy_against_loss(above_N, edges_N).counts == (0, *[1] * 10)


def test_an_entropy_that_rounding_took_below_zero_is_in_the_first_bin():
    assert entropy_against_loss(np.array([-1e-17]), np.array([0.0])).counts[0] == 1


def test_the_bins_hold_every_sample_and_all_of_the_loss():
    generator = np.random.default_rng(0)
    entropy_N, loss_N = generator.exponential(0.5, 1000), generator.exponential(1.0, 1000)
    result = entropy_against_loss(entropy_N, loss_N)
    total = sum(n * (mean or 0.0) for n, mean in zip(result.counts, result.mean_loss, strict=True))
    assert sum(result.counts) == 1000
    assert total == pytest.approx(loss_N.sum(), rel=1e-12)


@pytest.mark.parametrize("levels", [2, 5, 1000, None])
@pytest.mark.parametrize("samples", [2, 3, 50, 2000])
def test_spearman_is_scipys_with_and_without_ties(levels, samples):
    generator = np.random.default_rng(samples)
    x_N = generator.normal(size=samples)
    y_N = 0.5 * x_N + generator.normal(size=samples)
    if levels is not None:
        x_N, y_N = (np.floor(levels * scipy.stats.norm.cdf(v)) for v in (x_N, y_N))
    x_N[0], y_N[-1] = -9.0, 9.0  # never constant
    expected = scipy.stats.spearmanr(x_N, y_N).statistic
    assert spearman(x_N, y_N) == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_spearman_by_hand():
    """Without ties 1 − 6Σd²/(n(n²−1)); with one, ranks (1.5, 1.5, 3) and (1, 2, 3)."""
    x_N, y_N = np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 30.0, 20.0, 40.0])
    assert spearman(x_N, y_N) == pytest.approx(1 - 6 * 2 / (4 * 15))
    tied = spearman(np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0]))
    assert tied == pytest.approx(1.5 / np.sqrt(1.5 * 2))


def test_spearman_of_any_increasing_function_is_one():
    x_N = np.random.default_rng(0).normal(size=500)
    assert spearman(x_N, np.exp(3 * x_N)) == 1.0
    assert spearman(x_N, -np.exp(3 * x_N)) == -1.0


@pytest.mark.parametrize("samples", [0, 1, 5])
def test_constant_input_has_no_correlation(samples):
    constant_N, ramp_N = np.full(samples, 0.3), np.arange(float(samples))
    assert spearman(constant_N, ramp_N) is None
    assert spearman(ramp_N, constant_N) is None
    assert entropy_against_loss(constant_N, ramp_N).spearman is None


def test_no_samples_fill_no_bin():
    empty_N = np.array([])
    assert entropy_against_loss(empty_N, empty_N) == EntropyLoss((0,) * 11, (None,) * 11, None)


def test_json_round_trip_has_the_edges_and_no_nan():
    result = entropy_against_loss(np.array([0.05, 0.3, 2.0]), np.array([0.1, 0.2, 3.0]))
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["edges"] == list(ENTROPY_EDGES)
    assert data["counts"] == [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert data["mean_loss"] == [0.1, None, 0.2, *[None] * 7, 3.0]
    assert data["spearman"] == 1.0


def test_arrays_of_different_lengths_are_an_error():
    with pytest.raises(ValueError, match=r"entropies \(2,\) and losses \(3,\)"):
        entropy_against_loss(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="2 of 3 samples"):
        entropy_against_loss(np.array([0.0, np.nan, 1.0]), np.array([0.0, 1.0, np.inf]))

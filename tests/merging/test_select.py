"""The k-th smallest magnitude over parts equals that of the whole vector exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from raymerge.merging.select import kth_smallest_magnitude


def _kth(parts: Sequence[Tensor], k: int) -> float:
    return kth_smallest_magnitude(lambda: iter(parts), k, sum(part.numel() for part in parts))


def _normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


VECTORS = {
    "normal": _normal(41),
    "duplicates": torch.tensor([1.0, -1.0, 2.0, 1.0, -2.0, 2.0, 2.0, -1.0] * 3),
    "half zeros": torch.cat([torch.zeros(9), -torch.zeros(9), _normal(13)]),
    "all zeros": torch.zeros(4),
    "one value": torch.full((5,), -0.3),
    "denormals": torch.tensor([1.4e-45, -2.8e-45, 1e-40, -1e-39, 0.0, 1.17549435e-38, 4.2e-45]),
    "extremes": torch.tensor([3.4028235e38, -3.4028235e38, 1e-38, 0.0, -1.0, 1e20, 1e-20]),
    "neighbours": (1 + torch.arange(24) * 2**-23) * torch.tensor([1, -1]).repeat(12),
    "one number": torch.tensor([-7.5]),
}


@pytest.mark.parametrize("name", VECTORS)
def test_every_order_statistic_equals_sorting(name):
    vector = VECTORS[name]
    ordered = vector.abs().sort().values.tolist()
    assert [_kth([vector], k) for k in range(1, len(vector) + 1)] == ordered


@pytest.mark.parametrize("k", [1, 2, 12_345, 80_000, 99_999, 100_000])
def test_a_long_vector_equals_torch_kthvalue(k):
    vector = _normal(100_000) * 0.001
    assert _kth([vector], k) == float(vector.abs().kthvalue(k).values)


@pytest.mark.parametrize("parts", [2, 3, 40])
def test_the_cut_into_parts_does_not_matter(parts):
    vector = torch.cat([_normal(4000), torch.zeros(1000)])
    for k in (1000, 1001, 2500):
        assert _kth(vector.tensor_split(parts), k) == float(vector.abs().kthvalue(k).values)


def test_empty_parts_shapes_and_strides_do_not_matter():
    vector = _normal(60)
    parts = [
        torch.empty(0),
        vector[:24].view(4, 6).t(),
        torch.empty(0, 3),
        vector[24:25].reshape(()),
        vector.flip(0)[:35],
    ]
    ordered = vector.abs().sort().values.tolist()
    assert [_kth(parts, k) for k in (1, 30, 60)] == [ordered[0], ordered[29], ordered[59]]


def test_parts_may_be_a_new_generator_each_time():
    vector = _normal(100)
    calls = []

    def parts():
        calls.append(1)
        yield from vector.split(9)

    value = kth_smallest_magnitude(parts, 50, 100, vector)
    assert value == float(vector.abs().kthvalue(50).values)
    assert len(calls) == 1  # a fair sample: one pass over the files, no more


def test_half_precision_parts_are_ordered_by_value():
    vector = _normal(300).half()
    assert _kth([vector], 200) == float(vector.float().abs().kthvalue(200).values)


def test_the_input_is_not_changed():
    vector = -_normal(50).abs()
    before = vector.clone()
    _kth([vector], 7)
    assert torch.equal(vector, before)


# --- the sample decides how much is read and kept, never the result ---------------------------

SAMPLES = {
    "far too high": torch.full((500,), 1e9),
    "far too low": torch.full((500,), 1e-9),
    "zeros": torch.zeros(500),
    "both ends": torch.tensor([1e-30, 1e30] * 250),
    "a single number": torch.tensor([0.4]),
    "a number of the vector": torch.tensor([3.0]),
    "the top alone": _normal(50_000).abs().sort().values[-400:],
    "an infinity": torch.tensor([1.0, torch.inf]),
    "none": torch.empty(0),
}
LONG = {
    "distinct": _normal(50_000),
    "many duplicates": (4 * _normal(50_000, 1)).round(),
    "half zeros": torch.cat([torch.zeros(25_000), _normal(25_000, 2)]),
    "nearly all zeros": torch.cat([torch.zeros(49_990), _normal(10, 3)]),
}


@pytest.mark.parametrize("vector", LONG)
@pytest.mark.parametrize("sample", SAMPLES)
def test_any_sample_gives_the_same_result(sample, vector):
    values = LONG[vector]
    ordered = values.abs().sort().values
    for k in (1, 2, 24_999, 25_000, 25_001, 40_000, 49_999, 50_000):
        value = kth_smallest_magnitude(lambda: values.split(7001), k, len(values), SAMPLES[sample])
        assert value == float(ordered[k - 1]), k


@pytest.mark.parametrize("k", [50, 400_000, 800_000, 999_999])
@pytest.mark.parametrize("vector", ["distinct", "half zeros"])
def test_little_of_the_vector_is_kept(monkeypatch, k, vector):
    """About 3 % lie inside the bracket of a fair sample; equal numbers at its ends only count."""
    values = _normal(1_000_000)
    if vector == "half zeros":
        values[::2] = 0
    kept: list[int] = []
    concatenate = np.concatenate

    def counted(parts):
        kept.append(sum(len(part) for part in parts))
        return concatenate(parts)

    monkeypatch.setattr(np, "concatenate", counted)
    sample = values[
        torch.randperm(len(values), generator=torch.Generator().manual_seed(1))[:100_000]
    ]
    value = kth_smallest_magnitude(lambda: values.split(99_999), k, len(values), sample)
    assert value == float(values.abs().kthvalue(k).values)
    assert len(kept) == 1
    assert kept[0] < 0.035 * len(values)


@pytest.mark.parametrize("k", [0, -1, 11])
def test_a_rank_outside_the_vector_is_an_error_with_the_numbers(k):
    with pytest.raises(ValueError, match=rf"k={k} is outside 1\.\.10"):
        _kth([_normal(10)], k)

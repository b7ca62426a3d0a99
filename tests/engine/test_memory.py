"""The choice of storage and the size of passes: pure decisions over bytes."""

from __future__ import annotations

from itertools import product

import psutil
import pytest

from raymerge.config import VectorsConfig
from raymerge.engine import memory
from raymerge.engine.memory import (
    WorkerNeeds,
    choose_storage,
    machine_bytes,
    micro_batch,
    pass_images,
    storage_for,
    worker_bytes,
)
from raymerge.engine.messages import VectorStorage

GB = 10**9


@pytest.mark.parametrize(
    ("setting", "bytes_per_image", "gpu", "expected"),
    [
        ("all", 10**6, False, None),
        ("all", 10**6, True, None),
        ("auto", 10**6, True, None),
        ("auto", 1 << 20, False, 512),
        ("auto", 1 << 40, False, 1),  # a pass has at least one image
        ("auto", 0, False, 1 << 29),
        (7, 1 << 40, False, 7),
        (7, 1, True, 7),
    ],
)
def test_images_of_one_pass(setting, bytes_per_image, gpu, expected):
    assert micro_batch(setting, bytes_per_image, gpu) == expected


@pytest.mark.parametrize("most", [1, 3, 7, 64, None])
@pytest.mark.parametrize("images", [1, 2, 7, 63, 64, 65, 128, 130])
def test_passes_are_as_few_as_can_be_and_then_even(images, most):
    each = pass_images(images, most)
    fewest = 1 if most is None else -(-images // most)
    assert -(-images // each) == fewest
    assert each <= (most or images)
    assert each - images / fewest < 1  # 65 with room for 64: 33 and 32, not 64 and 1


def test_no_slots_need_no_images():
    assert pass_images(0, 5) == pass_images(0, None) == 0


@pytest.mark.parametrize(
    ("device", "host", "dtype", "location"),
    [
        (None, None, "float32", "device"),
        (8, 8, "float32", "device"),
        (7, 8, "bfloat16", "device"),
        (4, 0, "bfloat16", "device"),
        (3, 8, "float32", "host"),
        (3, 4, "bfloat16", "host"),
        (3, 3, "float32", "disk"),
        (-5, -5, "float32", "disk"),
    ],
)
def test_the_first_location_with_room_is_chosen(device, host, dtype, location):
    """The vectors take 8 bytes in float32."""
    chosen = choose_storage(VectorsConfig(folder="/f"), 8, device, host)
    assert chosen == VectorStorage(dtype, location, "/f")


@pytest.mark.parametrize(
    ("dtype", "location"),
    [
        *product(("float32", "bfloat16"), ("device", "host", "disk")),
        ("float32", "files"),
    ],
)
def test_a_configured_storage_is_chosen_even_without_room(dtype, location):
    config = VectorsConfig(dtype=dtype, location=location)
    assert choose_storage(config, 8, 0, 0) == VectorStorage(dtype, location)


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({"dtype": "float32"}, ("float32", "disk")),
        ({"dtype": "bfloat16"}, ("bfloat16", "disk")),
        ({"location": "host"}, ("bfloat16", "host")),
    ],
)
def test_without_room_only_unset_options_change(settings, chosen):
    storage = choose_storage(VectorsConfig(**settings), 8, 0, 0)
    assert (storage.dtype, storage.location) == chosen


NEEDS = WorkerNeeds(
    process=GB, weights=2 * GB, pretrained=GB, images=GB, coefficients=0, activations=GB
)


def test_workers_of_one_machine_share_its_memory():
    """Each has 92 % of 40 GB, divided, less 6 GB: 30.8 GB for one, 12.4 for two, 6.26 for three."""
    for workers, dtype, location in ((1, "float32", "device"), (2, "bfloat16", "device")):
        storage = storage_for(VectorsConfig(), NEEDS, 20 * GB, workers, 40 * GB, None)
        assert (storage.dtype, storage.location) == (dtype, location)
    assert storage_for(VectorsConfig(), NEEDS, 20 * GB, 3, 40 * GB, None).location == "disk"


def test_with_a_gpu_only_the_process_and_the_images_use_host_memory():
    """Of 24 GB, 22.08 less θ, its gradient, θ₀ and activations leave 18.08 on the device."""
    on_device = storage_for(VectorsConfig(), NEEDS, 18 * GB, 1, 64 * GB, 24 * GB)
    on_host = storage_for(VectorsConfig(), NEEDS, 40 * GB, 1, 64 * GB, 24 * GB)
    assert (on_device.dtype, on_device.location) == ("float32", "device")
    assert (on_host.dtype, on_host.location) == ("float32", "host")


def test_a_machine_of_unknown_memory_has_room():
    assert storage_for(VectorsConfig(), NEEDS, 10**15, 8, None, None) == VectorStorage()


@pytest.mark.parametrize(
    ("storage", "vectors"),
    [
        (VectorStorage(), 8),
        (VectorStorage("bfloat16"), 4),
        (VectorStorage("float32", "host"), 8),
        (VectorStorage("float32", "disk"), 0),
        (VectorStorage("float32", "files"), 0),
    ],
)
def test_a_worker_holds_the_sum_of_its_parts(storage, vectors):
    parts = worker_bytes(NEEDS, storage, 8)
    assert parts["task vectors"] == vectors
    assert sum(parts.values()) == 6 * GB + vectors
    assert list(parts) == [
        *("process", "weights and gradient", "pretrained", "task vectors", "images"),
        *("coefficients", "activations"),
    ]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("5000\n", 5000), ("max\n", 10_000), ("9223372036854771712", 10_000), ("", 10_000)],
)
def test_a_containers_limit_counts_where_it_is_less(tmp_path, monkeypatch, limit, expected):
    class Memory:
        total = 10_000

    (tmp_path / "max").write_text(limit)
    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (str(tmp_path / "no"), str(tmp_path / "max")))
    assert machine_bytes() == expected

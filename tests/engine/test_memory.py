"""What fits where: pure decisions."""

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
    ("wanted", "bytes_per_image", "gpu", "expected"),
    [
        ("all", 10**6, False, None),
        ("all", 10**6, True, None),
        ("auto", 10**6, True, None),
        ("auto", 1 << 20, False, 512),
        ("auto", 1 << 40, False, 1),  # one image is always taken
        ("auto", 0, False, 1 << 29),
        (7, 1 << 40, False, 7),
        (7, 1, True, 7),
    ],
)
def test_images_of_one_pass(wanted, bytes_per_image, gpu, expected):
    assert micro_batch(wanted, bytes_per_image, gpu) == expected


@pytest.mark.parametrize("most", [1, 3, 7, 64, None])
@pytest.mark.parametrize("images", [1, 2, 7, 63, 64, 65, 128, 130])
def test_passes_are_as_few_as_can_be_and_then_even(images, most):
    each = pass_images(images, most)
    fewest = 1 if most is None else -(-images // most)
    assert -(-images // each) == fewest
    assert each <= (most or images)
    assert each - images / fewest < 1  # 65 with room for 64: 33 and 32, not 64 and 1


def test_nothing_to_show_takes_no_images():
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
def test_the_first_place_with_room_is_taken(device, host, dtype, location):
    """For 8 bytes in float32."""
    chosen = choose_storage(VectorsConfig(folder="/f"), 8, device, host)
    assert chosen == VectorStorage(dtype, location, "/f")


@pytest.mark.parametrize(
    ("dtype", "location"),
    [
        *product(("float32", "bfloat16"), ("device", "host", "disk")),
        ("float32", "files"),
    ],
)
def test_what_was_asked_for_is_taken_even_without_room(dtype, location):
    wanted = VectorsConfig(dtype=dtype, location=location)
    assert choose_storage(wanted, 8, 0, 0) == VectorStorage(dtype, location)


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        ({"dtype": "float32"}, ("float32", "disk")),
        ({"dtype": "bfloat16"}, ("bfloat16", "disk")),
        ({"location": "host"}, ("bfloat16", "host")),
    ],
)
def test_what_was_left_open_gives_way(wanted, chosen):
    storage = choose_storage(VectorsConfig(**wanted), 8, 0, 0)
    assert (storage.dtype, storage.location) == chosen


NEEDS = WorkerNeeds(
    process=GB, weights=2 * GB, pretrained=GB, images=GB, coefficients=0, activations=GB
)


def test_workers_of_one_machine_share_its_memory():
    """92 % of 40 GB less 6 GB a worker: 30.8 GB for one, 12.4 for two, 6.26 for three."""
    for workers, dtype, location in ((1, "float32", "device"), (2, "bfloat16", "device")):
        storage = storage_for(VectorsConfig(), NEEDS, 20 * GB, workers, 40 * GB, None)
        assert (storage.dtype, storage.location) == (dtype, location)
    assert storage_for(VectorsConfig(), NEEDS, 20 * GB, 3, 40 * GB, None).location == "disk"


def test_with_a_gpu_only_the_process_and_the_images_weigh_on_the_host():
    """24 GB: 22.08 less θ, its gradient, θ₀ and activations is 18.08 on the device."""
    on_device = storage_for(VectorsConfig(), NEEDS, 18 * GB, 1, 64 * GB, 24 * GB)
    on_host = storage_for(VectorsConfig(), NEEDS, 40 * GB, 1, 64 * GB, 24 * GB)
    assert (on_device.dtype, on_device.location) == ("float32", "device")
    assert (on_host.dtype, on_host.location) == ("float32", "host")


def test_an_unknown_machine_has_room():
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
    held = worker_bytes(NEEDS, storage, 8)
    assert held["task vectors"] == vectors
    assert sum(held.values()) == 6 * GB + vectors
    assert list(held) == [
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

"""The number of workers and their resources, decided without a cluster."""

from __future__ import annotations

import pytest

from raymerge.config import ClusterConfig
from raymerge.distributed.placement import Placement, Resources, choose_placement, regroup
from raymerge.errors import UserError

LAPTOP = Resources(cpus=8)
CLUSTER = Resources(cpus=96, nodes=3, is_elastic=False)
GPUS = Resources(cpus=64, gpus=8, nodes=2, is_elastic=False)


def _place(resources: Resources, slots: int | None = 128, **config) -> Placement:
    return choose_placement(ClusterConfig(**config), resources, slots)


def test_one_machine_without_gpus_needs_no_ray():
    placement = _place(LAPTOP)
    assert placement == Placement(0, 1, 8, 0.0)
    assert placement.processes == 1  # workers: 0 still computes, in this process


def test_auto_is_one_worker_per_node_without_gpus():
    assert _place(CLUSTER) == Placement(3, 1, 32, 0.0)


def test_auto_is_one_worker_per_gpu():
    assert _place(GPUS) == Placement(8, 1, 8, 1.0)


def test_one_local_gpu_needs_no_ray_either():
    assert _place(Resources(cpus=8, gpus=1)).workers == 0


def test_a_single_worker_on_a_cluster_is_an_actor():
    """The work should not run on the driver's machine."""
    assert _place(Resources(cpus=16, is_elastic=False)).workers == 1


@pytest.mark.parametrize(
    ("nodes", "shards", "workers"), [(3, 2, 2), (4, 2, 4), (7, 3, 6), (1, 2, 2), (2, 5, 5)]
)
def test_auto_rounds_to_whole_groups_and_at_least_one(nodes, shards, workers):
    placement = _place(Resources(cpus=100, nodes=nodes, is_elastic=False), shards=shards)
    assert placement.workers == workers
    assert placement.groups * shards == workers


def test_configured_numbers_are_used():
    placement = _place(CLUSTER, workers=6, shards=3, cpus_per_worker=5)
    assert placement == Placement(6, 3, 5, 0.0)
    assert placement.groups == 2


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_auto_cpus_share_the_cluster_evenly(workers):
    assert _place(CLUSTER, workers=workers).cpus_per_worker == 96 // workers


def test_a_local_cluster_may_declare_more_cpus_than_there_are():
    placement = _place(LAPTOP, workers=20)
    assert (placement.workers, placement.cpus_per_worker) == (20, 1)
    assert _place(LAPTOP, workers=4, cpus_per_worker=8).cpus_per_worker == 8


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (
            {"workers": 4, "cpus_per_worker": 25},
            "4 workers x 25 CPUs = 100, but the cluster has 96",
        ),
        ({"workers": 97}, "97 workers x 1 CPUs = 97, but the cluster has 96"),
        ({"workers": 4, "gpus_per_worker": 0.5}, "4 workers x 0.5 GPUs = 2, but the cluster has 0"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused_with_the_numbers(config, numbers):
    with pytest.raises(UserError, match=numbers) as raised:
        _place(CLUSTER, slots=None, **config)
    assert "lower cluster.workers or cluster." in str(raised.value)


def test_a_local_cluster_may_not_declare_more_gpus_than_there_are():
    with pytest.raises(UserError, match="3 workers x 1 GPUs = 3, but the cluster has 2"):
        _place(Resources(cpus=8, gpus=2), workers=3)


def test_fractional_gpus_fit_when_their_sum_does():
    assert _place(GPUS, workers=16, gpus_per_worker=0.5).gpus_per_worker == 0.5


def test_a_cluster_may_be_used_completely():
    assert _place(CLUSTER, workers=4, cpus_per_worker=24).workers == 4


def test_more_workers_than_images_per_step_are_refused_with_the_numbers():
    with pytest.raises(UserError) as raised:
        _place(CLUSTER, slots=8, workers=11)
    message = str(raised.value)
    assert "11 workers for 8 images per step would leave 3 idle; use at most 8" in message
    assert _place(CLUSTER, slots=8, workers=8).workers == 8


def test_without_steps_any_number_of_workers_may_evaluate():
    assert _place(CLUSTER, slots=None, workers=11).workers == 11


@pytest.mark.parametrize(
    ("alive", "workers", "shards"), [(4, 4, 2), (3, 2, 2), (2, 2, 2), (1, 1, 1)]
)
def test_the_survivors_form_whole_groups_or_one_smaller(alive, workers, shards):
    """Every column and every slot belongs to a worker, however many workers are left."""
    shape = regroup(Placement(4, 2, 1, 0.0), alive)
    assert (shape.workers, shape.shards) == (workers, shards)
    assert shape.groups * shape.shards == shape.workers <= alive


def test_min_workers_is_at_most_workers():
    with pytest.raises(ValueError, match="min_workers=3 is more than workers=2"):
        ClusterConfig(workers=2, min_workers=3)

"""Shared by all tests: one tiny world, one local Ray for the whole run, no progress bars."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator

import pytest

# Before anything imports them: no hub, no usage report, a token that is never written to a home.
os.environ.update(HF_HUB_OFFLINE="1", RAY_USAGE_STATS_ENABLED="0", TQDM_DISABLE="1")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
os.environ.pop("RAY_ADDRESS", None)
os.environ["RAYMERGE_CACHE"] = tempfile.mkdtemp(prefix="raymerge-tests-")
# The models are tiny: a second thread only waits, and waits busily where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory):
    """Read-only: a tiny model, four experts, their images. Copy before changing a file."""
    from world import make_world

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for the whole session: starting it takes seconds. Logical CPUs exceed real ones."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")  # as the Ray that raymerge starts
    ray.init(
        num_cpus=6,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=200_000_000,
    )
    yield
    ray.shutdown()

"""A world for training, made once."""

from __future__ import annotations

import pytest
from finetune_world import TrainingWorld, make_training_world


@pytest.fixture(scope="session")
def training_world(tmp_path_factory: pytest.TempPathFactory) -> TrainingWorld:
    """Read-only: copy before changing a file."""
    return make_training_world(tmp_path_factory.mktemp("training_world"))

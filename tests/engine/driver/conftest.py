"""Shared by the tests of the driver."""

from __future__ import annotations

import pytest
from commands import cache_tokenizer


@pytest.fixture
def only_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge in this process, and draw nothing."""
    cache_tokenizer(monkeypatch)
    monkeypatch.setattr("raymerge.runs.folder.write_plots", lambda folder: None)
    monkeypatch.setattr("raymerge.runs.folder.write_report", lambda folder: None)
    monkeypatch.setattr("raymerge.runs.workers._uses_cluster", lambda config: False)

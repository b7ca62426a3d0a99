"""The errors of failed tasks. No cluster."""

from __future__ import annotations

import pytest
from ray.exceptions import RayTaskError, WorkerCrashedError

from raymerge.distributed import tasks
from raymerge.errors import UserError, WorkerLostError


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (WorkerCrashedError(), WorkerLostError, "the process of a task died; finished tasks are"),
        (RayTaskError("train", "", UserError("bad file")), UserError, "^bad file$"),
    ],
)
def test_a_failed_task_raises_its_own_error_or_what_to_do(
    error: Exception, raised: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(reference: object) -> None:
        raise error

    monkeypatch.setattr("ray.get", get)
    with pytest.raises(raised, match=message):
        tasks._result(None)

"""Reading a run's ``lambdas.json`` as the start of another.

Legend: K models, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from raymerge.checkpoints.locate import one_line
from raymerge.errors import UserError


def read_lambdas(
    reference: str, models: Sequence[str], layers: Sequence[str] | None = None
) -> Tensor:
    """λ (K, L) of an earlier run (its folder, or the file), matched by name; ``layers``: all.

    Raises :class:`UserError` where it does not fit.
    """
    path = Path(reference)
    path = path / "lambdas.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        values = torch.tensor(found["values"], dtype=torch.float64)
        rows = [found["tasks"].index(name) for name in models]
        columns = [found["layers"].index(name) for name in layers or found["layers"]]
        return values[rows][:, columns]
    except (OSError, TypeError, KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"method.start {path}: not the lambdas.json of a merge of these tasks by tensor "
            f"({one_line(error)}); give such a run's folder"
        ) from error

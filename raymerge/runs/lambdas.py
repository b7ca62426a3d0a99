"""Reading the ``lambdas.json`` of an earlier run as the starting point of another.

Rows and columns are matched by name, so the order of tasks and layers may differ.

Legend: K models, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymerge.config.loading import read_yaml
from raymerge.errors import UserError, one_line

_REMEDY = "give the folder of a layer-wise AdaMerging or Frank-Wolfe run of these models"


def read_lambdas(reference: str, models: Sequence[str], layers: Sequence[str]) -> Tensor:
    """Return λ (K, L) float64 of an earlier run, given as its folder or the file itself.

    Raises :class:`UserError` if a model or layer is missing, if a value is not finite, or if that
    run multiplied trimmed or rotated vectors instead of the task vectors themselves.
    """
    path = Path(reference)
    try:
        path = path / "lambdas.json" if path.is_dir() else path
        content = json.loads(path.read_text(encoding="utf-8"))
        values_KL = torch.tensor(content["values"], dtype=torch.float64)
        rows = _indices(content["tasks"], models, "model", path)
        columns = _indices(content["layers"], layers, "layer", path)
        if values_KL.shape != (len(content["tasks"]), len(content["layers"])):
            raise ValueError(f"its values have shape {list(values_KL.shape)}")
        lambdas_KL = values_KL[rows][:, columns]
    except OSError as error:
        raise UserError(f"method.start: {path}: {error.strerror}; {_REMEDY}") from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"is not a lambdas.json ({one_line(error)})"
        raise UserError(f"method.start: {path}: {reason}; {_REMEDY}") from error
    if not lambdas_KL.isfinite().all():
        raise UserError(f"method.start: {path}: holds NaN or Inf; {_REMEDY}")
    _require_plain_vectors(path)
    return lambdas_KL


def _indices(entries: Any, names: Sequence[str], what: str, path: Path) -> list[int]:
    """Return the position of each of ``names`` in the list ``entries``."""
    if not isinstance(entries, list):
        raise TypeError(f"{what}s: expected a list")
    missing = [name for name in names if name not in entries]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"method.start: {path}: has {len(entries)} {what}s, but not {missing[0]!r}{more} of "
            f"this merge's {len(names)}; {_REMEDY}"
        )
    return [entries.index(name) for name in names]


def _require_plain_vectors(path: Path) -> None:
    """Raise :class:`UserError` if the run's λ multiply trimmed or rotated vectors."""
    config = path.with_name("config.yaml")
    method = read_yaml(config).get("method") if config.is_file() else None
    vectors = method.get("task_vectors", "raw") if isinstance(method, dict) else "raw"
    if vectors != "raw":
        raise UserError(
            f"method.start: {path}: multiplies {vectors} vectors, not the task vectors themselves; "
            f"{_REMEDY} with method.task_vectors: raw"
        )

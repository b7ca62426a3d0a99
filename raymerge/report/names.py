"""Names that people read, for methods, runs and layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from raymerge.report.data import Run

if TYPE_CHECKING:
    from raymerge.merging.method import Method

_VARIANTS = {
    "adamerging": "AdaMerging (layer-wise)",
    "adamerging_block": "AdaMerging (block-wise)",
    "adamerging_task": "AdaMerging (task-wise)",
    "adamerging_500": "AdaMerging, 500 steps",
    "adamerging_pp": "AdaMerging++ (layer-wise)",
    "adamerging_pp_block": "AdaMerging++ (block-wise)",
    "adamerging_pp_task": "AdaMerging++ (task-wise)",
    "adamerging_kl": "AdaMerging, KL",
    "adamerging_tsv": "AdaMerging on TSV",
    "samerging": "SAMerging",
}


def _rows() -> Mapping[str, Method]:
    from raymerge.merging.registry import METHODS  # reads YAML: not for importing the report

    return METHODS


def known_methods() -> frozenset[str]:
    """Return the names of raymerge's methods, and of their variants in comparisons."""
    return frozenset({*_VARIANTS, *_rows()})


def is_merged(method: str) -> bool:
    """Return False for references: one model that saw no task, one model per task, one trained on
    all the labels."""
    row = _rows().get(method)
    return row is None or (row.merges and not row.reference)


def method_title(name: str) -> str:
    """Return "AdaMerging++ (layer-wise)" for ``adamerging_pp``; an unknown name stays."""
    row = _rows().get(name)
    return _VARIANTS.get(name) or (row.title if row else name)


def run_method(run: Run) -> str:
    """Return a run's method, by granularity and task vectors as a comparison names it."""
    name = (run.results.method if run.results else "") or run.settings.name
    if name != "adamerging":
        return name
    plus = "_pp" if run.settings.task_vectors == "ties" else ""
    is_task_wise = run.lambdas is not None and run.lambdas.layers == ("all",)
    granularity = "task" if is_task_wise else run.settings.granularity
    return name + plus + (f"_{granularity}" if granularity in ("task", "block") else "")


def first_lambda(run: Run) -> float | None:
    """Return the λ before the first step; None if the method does not learn λ, or is not known."""
    from raymerge.config.methods import AdaMerging

    row = _rows().get(run.settings.name)
    if row is None or row.loop is None or run.lambdas is None:
        return None
    if run.settings.name != "adamerging":
        return row.scaling(None, len(run.lambdas.tasks))
    try:
        options = AdaMerging(
            name="adamerging",
            task_vectors=run.settings.task_vectors or "raw",  # type: ignore[arg-type]
            init=run.settings.init,
        )
    except ValueError:  # of another version
        return None
    return options.effective_init


def run_title(run: Run) -> str:
    return method_title(run_method(run)) or "Merged model"


@dataclass(frozen=True)
class LayerGroup:
    """The columns ``start`` to ``stop`` (exclusive) of a heat map: one block of the network."""

    start: int
    stop: int
    label: str


def layer_groups(layers: Sequence[str]) -> list[LayerGroup]:
    """Return the runs of consecutive layers in the same block.

    A block is the path up to its first number (``transformer.resblocks.3``, ``layer1.0``) and
    is labelled by that number where all blocks share the rest. Layers before the first block are
    "pre", those after the last "post".
    """
    keys = [_block(name) for name in layers]
    shared = len({key.rpartition(".")[0] for key in keys if key}) <= 1
    blocks = [index for index, key in enumerate(keys) if key]
    groups = []
    for key, members in groupby(range(len(keys)), key=keys.__getitem__):
        columns = list(members)
        if key:
            label = key.rpartition(".")[2] if shared else ".".join(key.split(".")[-2:])
        else:
            label = _outside(columns[0], blocks)
        groups.append(LayerGroup(columns[0], columns[-1] + 1, label))
    return groups


def _block(layer: str) -> str:
    match = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", layer)
    return match.group() if match else ""


def _outside(column: int, blocks: list[int]) -> str:
    if not blocks or blocks[0] < column < blocks[-1]:
        return ""
    return "pre" if column < blocks[0] else "post"

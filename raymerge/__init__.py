"""raymerge: merge fine-tuned models, with coefficients learned from unlabeled images, on Ray.

    >>> import raymerge
    >>> result = raymerge.merge(raymerge.load_config("configs/my_merge.yaml"))

Importing this package is instant: torch, open_clip and Ray are imported where they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Config",
    "MergeResult",
    "MergedModule",
    "__version__",
    "evaluate",
    "load_config",
    "merge",
    "merge_module",
    "plan",
]

if TYPE_CHECKING:
    from raymerge.config import Config, load_config
    from raymerge.runs.merge import MergeResult, evaluate, merge
    from raymerge.runs.merge_module import MergedModule, merge_module
    from raymerge.runs.plan.make import make_plan as plan

_HOMES = {
    "Config": ("raymerge.config", "Config"),
    "load_config": ("raymerge.config", "load_config"),
    "plan": ("raymerge.runs.plan.make", "make_plan"),
    "MergedModule": ("raymerge.runs.merge_module", "MergedModule"),
    "merge_module": ("raymerge.runs.merge_module", "merge_module"),
    "MergeResult": ("raymerge.runs.merge", "MergeResult"),
    "evaluate": ("raymerge.runs.merge", "evaluate"),
    "merge": ("raymerge.runs.merge", "merge"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raymerge' has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)

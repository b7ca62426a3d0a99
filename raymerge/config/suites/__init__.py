"""The 8, 14 and 20 tasks of the merging literature: class names, templates, published copies.

Nothing is downloaded. A config names a suite or a data set; programs read the same specs with
:func:`load_suite` and :func:`load_data_set`.
"""

from raymerge.config.suites.specs import (
    DATA_SETS,
    SUITES,
    DataSet,
    HuggingFace,
    Split,
    Suite,
    TorchVision,
    load_data_set,
    load_suite,
)

__all__ = [
    "DATA_SETS",
    "SUITES",
    "DataSet",
    "HuggingFace",
    "Split",
    "Suite",
    "TorchVision",
    "load_data_set",
    "load_suite",
]

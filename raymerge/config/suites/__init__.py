"""The 8, 14 and 20 tasks of the merging literature: class names, templates, where the images are.

Nothing is downloaded. A config names a suite or a data set (``config.suites``), and a program
reads the same cards with :func:`load_suite` and :func:`load_data_set`.
"""

from raymerge.config.suites.cards import (
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

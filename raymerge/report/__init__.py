"""The report of a finished run, comparison or experiment, drawn from its files alone.

``records`` and ``data`` read the folder, ``charts`` and ``tables`` decide what to show, ``figures``
draws with matplotlib (imported on demand), and the templates make the page. No torch, no Ray.
"""

from raymerge.report.terminal import comparison_table
from raymerge.report.write import write_plots, write_report

__all__ = ["comparison_table", "write_plots", "write_report"]

"""Reports drawn from a finished run's files alone: no torch, no Ray, matplotlib only on demand."""

from raymerge.report.plots import write_plots
from raymerge.report.terminal import comparison_table
from raymerge.report.write import write_report

__all__ = ["comparison_table", "write_plots", "write_report"]

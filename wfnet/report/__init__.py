"""The report of a run: one HTML page that loads nothing, and its figures."""

from wfnet.report.page import write_report

__all__ = ["write_report"]

"""The report of a study: reads what a study left, runs nothing, and needs no torch."""

from steppe.report.page import build

__all__ = ["build"]

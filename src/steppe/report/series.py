"""Numbers by seed and date: rows of a table as a matrix, means, and comparisons paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steppe.study.statistics import Comparison, compare_all

__all__ = ["PERIODS_PER_YEAR", "Floats", "annual", "matrix", "mean", "paired"]

Floats: TypeAlias = NDArray[np.float64]

PERIODS_PER_YEAR = 252 / 5
"""Holding periods of a layer, five sessions each, in a year of 252 sessions."""


def matrix(rows: pl.DataFrame, seeds: Sequence[int | None], dates: Sequence[date], metric: str) -> Floats:
    """``[seeds, dates]`` of a column of rows that have a seed and a date; NaN where there is none."""
    table = np.full((len(seeds), len(dates)), np.nan)
    if metric in rows.columns:
        row_of = {seed: row for row, seed in enumerate(seeds)}
        column_of = {day: column for column, day in enumerate(dates)}
        for seed, day, value in rows.select("seed", "date", metric).iter_rows():
            table[row_of[seed], column_of[day]] = math.nan if value is None else value
    return table


def paired(baseline: str, series: Mapping[str, Floats], block: float | None = None) -> dict[str, Comparison]:
    """Each label's ``[seeds, dates]`` against the baseline's, on the seeds both have; corrected together."""
    base, pairs = series.get(baseline), {}
    for label, other in series.items():
        if base is None or label == baseline:
            continue
        both = np.isfinite(base).any(axis=1) & np.isfinite(other).any(axis=1)
        if both.any() and np.isfinite(base[both] + other[both]).all(axis=0).any():
            pairs[label] = (base[both], other[both])
    return {c.candidate: c for c in compare_all(baseline, pairs, block=block)}


def annual(returns: Floats) -> float:
    """Compounded return per year of a series of holding periods."""
    total = float(np.prod(1 + returns))
    return float(max(total, 0.0) ** (PERIODS_PER_YEAR / len(returns)) - 1) if len(returns) else math.nan


def mean(values: Sequence[float | None]) -> float:
    """Mean of the finite values; NaN without any."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan

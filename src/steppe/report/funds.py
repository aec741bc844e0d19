"""What a study left of its index-enhanced portfolios, gathered once for tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from steppe.report.results import NO_MODEL, Results
from steppe.report.series import Floats, matrix, mean, paired
from steppe.study.statistics import Comparison, Estimate, compare, default_block, estimate
from steppe.study.store import Store

__all__ = ["LAST", "Funds"]

SESSIONS_PER_YEAR = 252
LAST = "last 12 months"
"""The period of ``fund_yearly`` that is no calendar year."""
BLOCK = 20.0
"""Least mean length of a bootstrap block, in sessions: four weekly rebalances."""


@dataclass(frozen=True)
class Funds:
    """The portfolios of the spec's optimizers and of `NO_MODEL`; empty where the study ran none.

    A *fund* is the portfolio of one index under one score. Where several seeds were run, the fund of an optimizer that
    tables and curves show trades the score averaged over the seeds; differences are taken between the funds of single
    seeds, paired.

    Attributes:
        results: the study they belong to.
        daily, summary, yearly: the tables ``fund_daily``, ``fund``, ``fund_yearly``.
    """

    results: Results
    daily: pl.DataFrame
    summary: pl.DataFrame
    yearly: pl.DataFrame

    @classmethod
    def of(cls, store: Store, results: Results) -> Funds:
        """Read a store."""
        names = store.tables()
        known = pl.col("optimizer").is_in([*results.optimizers, NO_MODEL])
        own = pl.col("seed").is_null() | pl.col("seed").is_in(results.spec["seeds"])
        empty = pl.DataFrame(schema={"optimizer": pl.String, "seed": pl.Int64, "index": pl.String})
        tables = ("fund_daily", "fund", "fund_yearly")
        return cls(results, *(store.table(n).filter(known, own) if n in names else empty for n in tables))

    @property
    def facts(self) -> Mapping[str, Any]:
        """What they assume: costs, limits, and what each index is measured by."""
        facts: Mapping[str, Any] = self.results.panel.get("fund", {})
        return facts

    @cached_property
    def indices(self) -> list[str]:
        """Indices in the order they were run."""
        return self.summary["index"].unique(maintain_order=True).to_list()

    @cached_property
    def labels(self) -> list[str]:
        """Optimizers in the study's order, `NO_MODEL` last."""
        found = set(self.summary["optimizer"])
        return [label for label in (*self.results.optimizers, NO_MODEL) if label in found]

    def figure(self, index: str, label: str, column: str) -> float:
        """A column of ``fund`` for the fund that is shown."""
        return mean([row.get(column) for row in self._rows.get((index, label), [])])

    def periods(self, index: str) -> list[str]:
        """Calendar years in order, then `LAST`."""
        if self.yearly.is_empty():
            return []
        found: list[str] = self.yearly.filter(pl.col("index") == index)["period"].unique().to_list()
        return sorted(found, key=lambda period: (period == LAST, period))

    def of_period(self, index: str, label: str, period: str, column: str) -> float:
        """A column of ``fund_yearly`` for the fund that is shown."""
        return mean([row.get(column) for row in self._period_rows.get((index, label, period), [])])

    def excess(self, index: str, label: str) -> tuple[list[date], Floats]:
        """Sessions and daily excess r - b of the fund that is shown."""
        rows = self._daily.get((index, label))
        if rows is None:
            return [], np.empty(0)
        return rows["date"].to_list(), (rows["ret"] - rows["benchmark"]).to_numpy()

    def estimates(self, index: str) -> dict[str, Estimate]:
        """Mean excess per year (not compounded) with its interval, over the seeds' funds."""
        return {
            label: estimate(values, block=self._block(values))
            for label in self.labels
            if (values := self._series(index, label)).size
        }

    def comparisons(self, index: str) -> dict[str, Comparison]:
        """Every other optimizer against the baseline on the mean excess per year; corrected together per index."""
        series = {label: self._series(index, label) for label in self.labels if label != NO_MODEL}
        base = series.get(self.results.baseline)
        if base is None or not base.size:
            return {}
        return paired(self.results.baseline, series, self._block(base))

    def reference_comparison(self, index: str) -> Comparison | None:
        """`NO_MODEL` against the baseline, by itself."""
        base, other = (self._series(index, label) for label in (self.results.baseline, NO_MODEL))
        if not (base.size and other.size):
            return None
        names = (self.results.baseline, NO_MODEL)
        return compare(base, np.broadcast_to(other, base.shape), names=names, block=self._block(base))

    def _block(self, values: Floats) -> float:
        return max(BLOCK, default_block(values.shape[1]))

    def _series(self, index: str, label: str) -> Floats:
        """``[seeds, sessions]`` daily excess x 252 of the seeds' funds, on the sessions all of them have."""
        if self.daily.is_empty():
            return np.empty((0, 0))
        rows = self.daily.filter(pl.col("index") == index, pl.col("optimizer") == label)
        rows = rows.filter(pl.col("seed").is_null() == (label == NO_MODEL))
        if rows.is_empty():
            return np.empty((0, 0))
        excess = rows.with_columns(excess=SESSIONS_PER_YEAR * (pl.col("ret") - pl.col("benchmark")))
        seeds = [None] if label == NO_MODEL else sorted(self.results.spec["seeds"])
        return matrix(excess, seeds, self._sessions[index], "excess")

    @cached_property
    def _sessions(self) -> dict[str, list[date]]:
        return {
            index: sorted(self.daily.filter(pl.col("index") == index)["date"].unique())
            for index in self.indices
        }

    def _shown(self, table: pl.DataFrame) -> pl.DataFrame:
        """The rows of the funds that are shown: the averaged score's where there is one, else the one seed's."""
        if table.is_empty():
            return table
        averaged = pl.col("seed").is_null().any().over("optimizer", "index")
        return table.filter(pl.col("seed").is_null() | ~averaged)

    @cached_property
    def _rows(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        return _grouped(self._shown(self.summary), "index", "optimizer")

    @cached_property
    def _period_rows(self) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
        return _grouped(self._shown(self.yearly), "index", "optimizer", "period")

    @cached_property
    def _daily(self) -> dict[tuple[str, str], pl.DataFrame]:
        shown = self._shown(self.daily)
        if shown.is_empty():
            return {}
        # without an averaged score several seeds may be there: their mean
        daily = (
            shown.group_by("index", "optimizer", "date").agg(pl.col("ret", "benchmark").mean()).sort("date")
        )
        return {
            (str(i), str(o)): rows
            for (i, o), rows in daily.partition_by("index", "optimizer", as_dict=True).items()
        }


def _grouped(table: pl.DataFrame, *keys: str) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in table.to_dicts():
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups

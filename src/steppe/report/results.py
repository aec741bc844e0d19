"""What a study left, gathered once for tables and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steppe.study.statistics import Comparison, Estimate, compare_all, default_block, estimate
from steppe.study.store import Store, TrialRow

__all__ = ["PERIODS_PER_YEAR", "Cost", "Results", "Steps", "annual", "mean"]

Floats = NDArray[np.float64]

PERIODS_PER_YEAR = 252 / 5
"""Holding periods of a layer, five sessions each, in a year of 252 sessions."""


@dataclass(frozen=True)
class Cost:
    """What training one seed took, all parts together, mean over seeds.

    Ratios are to the baseline on the seeds both finished, NaN where there is none.
    """

    gradient_evaluations: float
    forward_evaluations: float
    seconds: float
    gradient_ratio: float
    seconds_ratio: float


@dataclass(frozen=True)
class Steps:
    """What an optimizer told of its steps in one part: the ledger's ``step_...``, means over epochs and trials.

    Attributes:
        seeds: trials behind the means, unfinished ones included.
        gradients: gradients per step.
        perturbed: share of steps with a gradient at perturbed weights w + e.
        perturbation: ‖e‖ as it was applied.
        surrogate_gap: L(w + e) − L(w).
        cosine: of the gradients at w and at w + e.
        gradient_norm: of the gradient at w.
        skipped: share of steps skipped because of a gradient that was not finite.

    What was never measured is NaN.
    """

    part: str
    optimizer: str
    seeds: int
    gradients: float
    perturbed: float
    perturbation: float
    surrogate_gap: float
    cosine: float
    gradient_norm: float
    skipped: float


@dataclass(frozen=True)
class Results:
    """The current plan's results of a study; tables are empty where the analysis has not run.

    Attributes:
        spec: the resolved spec.
        panel: facts of the data (``panel_info.json``); empty if unknown.
        environment: facts of the machine.
        trials: trials of the current plan.
        history: metrics per trial and epoch.
        ic, layers, factor: tables of the analysis, of the spec's optimizers and seeds only.
    """

    spec: Mapping[str, Any]
    panel: Mapping[str, Any]
    environment: Mapping[str, Any]
    trials: Sequence[TrialRow]
    history: pl.DataFrame
    ic: pl.DataFrame
    layers: pl.DataFrame
    factor: pl.DataFrame

    @classmethod
    def of(cls, store: Store) -> Results:
        """Read a store."""
        spec, names = store.spec, store.tables()

        def table(name: str) -> pl.DataFrame:
            if name not in names:
                return pl.DataFrame(schema={"optimizer": pl.String, "seed": pl.Int64, "part": pl.String})
            # a table of an earlier spec may still hold an optimizer or a seed that was dropped since
            return store.table(name).filter(
                pl.col("optimizer").is_in(list(spec["optimizers"])), pl.col("seed").is_in(spec["seeds"])
            )

        return cls(
            spec,
            store.read_json("panel_info", {}),
            store.read_json("environment", {}),
            store.trials(),
            store.history(),
            *(table(name) for name in ("ic", "layers", "factor")),
        )

    @property
    def baseline(self) -> str:
        """Label of the optimizer all others are compared with."""
        return str(self.spec["baseline"])

    @property
    def simulated(self) -> bool:
        """Whether the data are made up; unknown data count as real."""
        return bool(self.panel.get("simulated", False))

    @cached_property
    def optimizers(self) -> list[str]:
        """Labels in the spec's order, the baseline first."""
        return sorted(self.spec["optimizers"], key=lambda label: label != self.baseline)

    @cached_property
    def tested(self) -> list[str]:
        """Optimizers that have a RankIC of the final score."""
        found = set(self.ic.filter(pl.col("part") == self.final)["optimizer"])
        return [label for label in self.optimizers if label in found]

    @cached_property
    def parts(self) -> list[str]:
        """Trained parts, in the plan's order."""
        return list(dict.fromkeys(trial.part for trial in self.trials))

    @cached_property
    def scores(self) -> list[str]:
        """Scores that were tested: the parts, and the blend first if there is one."""
        found = list(dict.fromkeys(self.ic["part"]))
        return sorted(found, key=lambda part: (part != "blend", found.index(part)))

    @property
    def final(self) -> str:
        """The score a user would trade: the blend, or the only part."""
        return self.scores[0] if self.scores else ""

    @cached_property
    def block(self) -> float | None:
        """Mean bootstrap block: at least twice the dates that share a label; None without dates."""
        problem = self.spec["problem"]
        overlap = math.ceil(int(problem.get("horizon", 10)) / int(problem.get("every", 5)))
        dates = self.ic["date"].n_unique() if "date" in self.ic.columns else 0
        return max(default_block(dates), 2.0 * overlap) if dates else None

    def series(self, optimizer: str, part: str, metric: str = "rank_ic") -> Floats:
        """``[seeds, dates]`` of a column of ``ic``; NaN where there is none."""
        return _matrix(
            self.ic.filter(pl.col("optimizer") == optimizer, pl.col("part") == part),
            sorted(self.spec["seeds"]),
            self.dates,
            metric,
        )

    @cached_property
    def dates(self) -> list[date]:
        """Evaluation dates of the test block."""
        return sorted(self.ic["date"].unique()) if "date" in self.ic.columns else []

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """RankIC of the final score with its interval, over the seeds an optimizer has."""
        found = {}
        for label in self.tested:
            values = self.series(label, self.final)
            values = values[np.isfinite(values).any(axis=1)]
            if np.isfinite(values).all(axis=0).any():
                found[label] = estimate(values, block=self.block)
        return found

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Every other optimizer against the baseline on RankIC of the final score, on shared seeds and dates."""
        base = self.series(self.baseline, self.final)
        pairs = {}
        for label in self.tested:
            other = self.series(label, self.final)
            both = np.isfinite(base).any(axis=1) & np.isfinite(other).any(axis=1)
            complete = np.isfinite(base[both] + other[both]).all(axis=0)
            if label != self.baseline and both.any() and complete.any():
                pairs[label] = (base[both], other[both])
        return {c.candidate: c for c in compare_all(self.baseline, pairs, block=self.block)}

    def icir(self, optimizer: str, part: str) -> float:
        """Mean over dates of RankIC to its deviation, not annualised, mean over seeds."""
        ratios = []
        for row in self.series(optimizer, part):
            known = row[np.isfinite(row)]
            if len(known) > 1 and known.std(ddof=1) > 0:
                ratios.append(known.mean() / known.std(ddof=1))
        return mean(ratios)

    def factor_mean(self, optimizer: str, part: str, column: str) -> float:
        """A column of ``factor``, mean over seeds; NaN if it is not there."""
        return mean([row.get(column) for row in self._factor_rows.get((optimizer, part), [])])

    @cached_property
    def _factor_rows(self) -> dict[tuple[str, str], list[dict[str, float | None]]]:
        rows: dict[tuple[str, str], list[dict[str, float | None]]] = {}
        for row in self.factor.to_dicts():
            rows.setdefault((row["optimizer"], row["part"]), []).append(row)
        return rows

    def layer_dates(self, optimizer: str) -> list[date]:
        """First dates of the holding periods of the final score's layers."""
        return self._layers.get(optimizer, pl.DataFrame({"date": []}))["date"].unique().sort().to_list()

    def layer_returns(self, optimizer: str) -> dict[int, Floats]:
        """Layer -> return per period of the final score, mean over seeds."""
        if optimizer not in self._layers:
            return {}
        averaged = self._layers[optimizer].group_by("layer", "date").agg(pl.col("ret").mean())
        return _by_layer(averaged)

    def layer_excess(self, optimizer: str) -> dict[int, float]:
        """Layer -> annualised excess over the equal-weight universe, mean over seeds."""
        found: dict[int, list[float]] = {}
        if optimizer in self._layers:
            for rows in self._layers[optimizer].partition_by("seed"):
                returns = _by_layer(rows)
                for layer in list(returns)[1:]:
                    found.setdefault(layer, []).append(annual(returns[layer] - returns[0]))
        return {layer: mean(values) for layer, values in found.items()}

    @cached_property
    def _layers(self) -> dict[str, pl.DataFrame]:
        if self.layers.is_empty():
            return {}
        final = self.layers.filter(pl.col("part") == self.final)
        return {str(key[0]): rows for key, rows in final.partition_by("optimizer", as_dict=True).items()}

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """Cost per optimizer, over the seeds of which every part is done."""
        whole: dict[str, dict[int, Floats]] = {}
        for label in self.optimizers:
            for seed in self.spec["seeds"]:
                rows = [t for t in self.trials if (t.optimizer, t.seed) == (label, seed)]
                if rows and all(row.state == "done" for row in rows):
                    whole.setdefault(label, {})[seed] = np.sum([_cost(row) for row in rows], axis=0)
        costs = {}
        for label, seeds in whole.items():
            shared = [seed for seed in seeds if seed in whole.get(self.baseline, {})]
            ratio = np.full(3, np.nan)
            if shared:
                reference = np.mean([whole[self.baseline][seed] for seed in shared], axis=0)
                own = np.mean([seeds[seed] for seed in shared], axis=0)
                np.divide(own, reference, out=ratio, where=reference > 0)
            gradients, forwards, seconds = np.mean(list(seeds.values()), axis=0).tolist()
            costs[label] = Cost(gradients, forwards, seconds, float(ratio[0]), float(ratio[2]))
        return costs

    @cached_property
    def steps(self) -> list[Steps]:
        """Per part and optimizer; those that tell nothing of their steps, as plain ones, are not in it."""
        if "step_gradients" not in self.history.columns:
            return []
        measures = [field.name for field in fields(Steps)[3:]]
        columns = [f"step_{name}" for name in measures]
        told = self.history.filter(pl.col("step_gradients").is_not_null())
        trials = told.group_by("part", "optimizer", "trial").agg(pl.col("^step_.*$").mean())
        means = trials.group_by("part", "optimizer").agg(pl.col("^step_.*$").mean(), seeds=pl.len())
        found = {(row["part"], row["optimizer"]): row for row in means.to_dicts()}
        return [
            Steps(part, label, row["seeds"], *(math.nan if row.get(c) is None else row[c] for c in columns))
            for part in self.parts
            for label in self.optimizers
            if (row := found.get((part, label)))
        ]


def annual(returns: Floats) -> float:
    """Compounded return per year of a series of holding periods."""
    total = float(np.prod(1 + returns))
    return float(max(total, 0.0) ** (PERIODS_PER_YEAR / len(returns)) - 1) if len(returns) else math.nan


def mean(values: Sequence[float | None]) -> float:
    """Mean of the finite values; NaN without any."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _cost(row: TrialRow) -> Floats:
    known = (row.gradient_evaluations, row.forward_evaluations, row.seconds)
    return np.array([math.nan if value is None else value for value in known], dtype=np.float64)


def _by_layer(rows: pl.DataFrame) -> dict[int, Floats]:
    """Layer, ascending -> its returns by date; 0 is the equal-weight universe."""
    parts = rows.sort("layer", "date").partition_by("layer", as_dict=True)
    return {int(key[0]): part["ret"].to_numpy() for key, part in parts.items()}


def _matrix(rows: pl.DataFrame, seeds: Sequence[int], dates: Sequence[date], metric: str) -> Floats:
    table = np.full((len(seeds), len(dates)), np.nan)
    if metric in rows.columns:
        row_of = {seed: row for row, seed in enumerate(seeds)}
        column_of = {day: column for column, day in enumerate(dates)}
        for seed, day, value in rows.select("seed", "date", metric).iter_rows():
            table[row_of[seed], column_of[day]] = math.nan if value is None else value
    return table

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

from steppe.report.series import PERIODS_PER_YEAR, Floats, annual, matrix, mean, paired
from steppe.study.statistics import Comparison, Estimate, compare, default_block, estimate
from steppe.study.store import Store, TrialRow

__all__ = ["NO_MODEL", "Cost", "Results", "Steps", "frequency"]

NO_MODEL = "no_model"
"""Label of the score that no model made: what any training has to beat."""


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
    """What an optimizer told of its steps in one frequency: the ledger's ``step_...``, means over epochs and trials.

    Attributes:
        trials: those behind the means, unfinished ones included.
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
    trials: int
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
        ic, layers, factor, decay, factor_yearly: tables of the analysis, of the spec's optimizers and seeds only.
        averaged: the same tables' rows without a seed, by name: scores averaged over the seeds, and `NO_MODEL`.
    """

    spec: Mapping[str, Any]
    panel: Mapping[str, Any]
    environment: Mapping[str, Any]
    trials: Sequence[TrialRow]
    history: pl.DataFrame
    ic: pl.DataFrame
    layers: pl.DataFrame
    factor: pl.DataFrame
    decay: pl.DataFrame
    factor_yearly: pl.DataFrame
    averaged: Mapping[str, pl.DataFrame]

    @classmethod
    def of(cls, store: Store) -> Results:
        """Read a store."""
        spec, names = store.spec, store.tables()
        nothing = pl.DataFrame(schema={"optimizer": pl.String, "seed": pl.Int64, "part": pl.String})
        found = {
            name: store.table(name) if name in names else nothing
            for name in ("ic", "layers", "factor", "decay", "factor_yearly")
        }
        # a table of an earlier spec may still hold an optimizer or a seed that was dropped since
        own = pl.col("optimizer").is_in(list(spec["optimizers"]))
        of_seeds = {name: t.filter(own, pl.col("seed").is_in(spec["seeds"])) for name, t in found.items()}
        known = own | (pl.col("optimizer") == NO_MODEL)
        averaged = {name: t.filter(known, pl.col("seed").is_null()) for name, t in found.items()}
        return cls(
            spec,
            store.read_json("panel_info", {}),
            store.read_json("environment", {}),
            store.trials(),
            store.history(),
            **of_seeds,
            averaged=averaged,
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
    def references(self) -> list[str]:
        """`NO_MODEL`, where it was tested."""
        return [NO_MODEL] if NO_MODEL in set(self.averaged["ic"]["optimizer"]) else []

    @property
    def shown(self) -> list[str]:
        """What figures and tables of scores show: the tested optimizers, then `NO_MODEL`."""
        return [*self.tested, *self.references]

    @cached_property
    def parts(self) -> list[str]:
        """Trained parts, in the plan's order."""
        return list(dict.fromkeys(trial.part for trial in self.trials))

    @cached_property
    def frequencies(self) -> list[str]:
        """The parts, the blocks of a walk-forward taken together."""
        return list(dict.fromkeys(map(frequency, self.parts)))

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
        every = 5 if "walk_forward" in problem else problem.get("every", 5)
        overlap = math.ceil(int(problem.get("horizon", 10)) / int(problem.get("test_every", every)))
        dates = self.ic["date"].n_unique() if "date" in self.ic.columns else 0
        return max(default_block(dates), 2.0 * overlap) if dates else None

    def series(self, optimizer: str, part: str, metric: str = "rank_ic") -> Floats:
        """``[seeds, dates]`` of a column of ``ic``, one row for a score without seeds; NaN where there is none."""
        table, seeds = self._of_label("ic", optimizer)
        return matrix(table.filter(pl.col("part") == part), seeds, self.dates, metric)

    def _of_label(self, name: str, label: str) -> tuple[pl.DataFrame, list[int | None]]:
        """A label's rows of a table and its seeds: those of the spec, or the one None of `NO_MODEL`."""
        reference = label == NO_MODEL
        table: pl.DataFrame = self.averaged[name] if reference else getattr(self, name)
        return table.filter(pl.col("optimizer") == label), [None] if reference else sorted(self.spec["seeds"])

    @cached_property
    def dates(self) -> list[date]:
        """Evaluation dates of the test block."""
        return sorted(self.ic["date"].unique()) if "date" in self.ic.columns else []

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """RankIC of the final score with its interval, over the seeds an optimizer has."""
        found = {}
        for label in self.shown:
            values = self.series(label, self.final)
            values = values[np.isfinite(values).any(axis=1)]
            if np.isfinite(values).all(axis=0).any():
                found[label] = estimate(values, block=self.block)
        return found

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Every other optimizer against the baseline on RankIC of the final score, on shared seeds and dates."""
        return paired(
            self.baseline, {label: self.series(label, self.final) for label in self.tested}, self.block
        )

    @cached_property
    def reference_comparisons(self) -> dict[str, Comparison]:
        """`NO_MODEL` against the baseline on the same; no part of the family that is corrected together."""
        base = self.series(self.baseline, self.final)
        base = base[np.isfinite(base).any(axis=1)]
        found = {}
        for label in self.references if len(base) else []:
            other = np.broadcast_to(self.series(label, self.final), base.shape)
            if np.isfinite(base + other).all(axis=0).any():
                found[label] = compare(base, other, names=(self.baseline, label), block=self.block)
        return found

    @cached_property
    def layer_comparisons(self) -> dict[str, Comparison]:
        """Every other optimizer against the baseline on the top layer's return, per year (mean, not compounded)."""
        dates = sorted(self.layers["date"].unique()) if "date" in self.layers.columns else []
        seeds = sorted(self.spec["seeds"])

        def top(label: str) -> Floats:
            rows = self.layers.filter(pl.col("optimizer") == label, pl.col("part") == self.final)
            return PERIODS_PER_YEAR * matrix(
                rows.filter(pl.col("layer") == pl.col("layer").max()), seeds, dates, "ret"
            )

        return paired(self.baseline, {label: top(label) for label in self.tested} if dates else {})

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
        reference = self.averaged["factor"].filter(pl.col("optimizer") == NO_MODEL)
        for row in (*self.factor.to_dicts(), *reference.to_dicts()):
            rows.setdefault((row["optimizer"], row["part"]), []).append(row)
        return rows

    def decay_of(self, label: str) -> dict[int, float]:
        """Horizon in sessions -> mean RankIC of the final score, mean over seeds."""
        table, _ = self._of_label("decay", label)
        if "horizon" not in table.columns:
            return {}
        means = table.filter(pl.col("part") == self.final).group_by("horizon").agg(pl.col("rank_ic").mean())
        return dict(means.sort("horizon").iter_rows())

    def factor_years(self, label: str) -> dict[int, dict[str, float]]:
        """Year -> measures of the final score in it, means over seeds."""
        table, _ = self._of_label("factor_yearly", label)
        if "year" not in table.columns:
            return {}
        means = table.filter(pl.col("part") == self.final).group_by("year").agg(pl.selectors.float().mean())
        return {row.pop("year"): row for row in means.sort("year").to_dicts()}

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
        reference = self.averaged["layers"].filter(pl.col("optimizer") == NO_MODEL)
        final = pl.concat([self.layers, reference]).filter(pl.col("part") == self.final)
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
        told = self.history.filter(pl.col("step_gradients").is_not_null()).with_columns(
            pl.col("part").str.split("-").list.first()
        )
        trials = told.group_by("part", "optimizer", "trial").agg(pl.col("^step_.*$").mean())
        means = trials.group_by("part", "optimizer").agg(pl.col("^step_.*$").mean(), trials=pl.len())
        found = {(row["part"], row["optimizer"]): row for row in means.to_dicts()}
        return [
            Steps(part, label, row["trials"], *(math.nan if row.get(c) is None else row[c] for c in columns))
            for part in self.frequencies
            for label in self.optimizers
            if (row := found.get((part, label)))
        ]


def frequency(part: str) -> str:
    """``daily`` of the part ``daily-2017-01-03``: the parts of a walk-forward are blocks of a frequency."""
    return part.partition("-")[0]


def _cost(row: TrialRow) -> Floats:
    known = (row.gradient_evaluations, row.forward_evaluations, row.seconds)
    return np.array([math.nan if value is None else value for value in known], dtype=np.float64)


def _by_layer(rows: pl.DataFrame) -> dict[int, Floats]:
    """Layer, ascending -> its returns by date; 0 is the equal-weight universe."""
    parts = rows.sort("layer", "date").partition_by("layer", as_dict=True)
    return {int(key[0]): part["ret"].to_numpy() for key, part in parts.items()}

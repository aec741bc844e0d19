"""What a study left of its landscapes and flatness measures, gathered once for tables, figures and sentences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steppe.report.results import Results
from steppe.report.series import mean
from steppe.study.statistics import Association, holm, kendall
from steppe.study.store import Store

__all__ = [
    "MEASURES",
    "PLANES",
    "SPLITS",
    "Landscapes",
    "Link",
    "MeasureFacts",
    "Panel",
    "Taken",
    "facts_of",
    "sample_of",
]

Floats = NDArray[np.float64]

SPLITS = ("train", "validation", "test")

PLANES = ("trajectory", "random", "eigenvectors")
"""Of surfaces, in the page's order."""


class MeasureFacts(NamedTuple):
    """What a reader must know of a measure: its name, whether rescaled layers leave it be, what more of it means."""

    title: str
    invariant: bool
    larger: str = "sharper"


MEASURES = {
    "lambda_max": MeasureFacts("λmax", False),
    "trace": MeasureFacts("Trace of the Hessian", False),
    "relative_flatness": MeasureFacts("Relative flatness", True),
    "fisher_rao": MeasureFacts("Fisher–Rao norm", True),
    "sam": MeasureFacts("SAM sharpness", False),
    "adaptive_sam": MeasureFacts("Adaptive SAM sharpness", True),
    "epsilon_sharpness": MeasureFacts("ε-sharpness", False),
    "worst_case_l2": MeasureFacts("Adaptive worst case, ℓ2", True),
    "worst_case_linf": MeasureFacts("Adaptive worst case, ℓ∞", True),
    "average_case": MeasureFacts("Average case", False),
    "adaptive_average_case": MeasureFacts("Adaptive average case", True),
    "pac_bayes": MeasureFacts("PAC-Bayes 1/σ²", False),
    "magnitude_pac_bayes": MeasureFacts("PAC-Bayes 1/σ², relative to the weights", True),
    "local_entropy": MeasureFacts("Local entropy", False),
    "adaptive_local_entropy": MeasureFacts("Adaptive local entropy", True),
    "basin_width": MeasureFacts("Basin width", True, "flatter"),
    "barrier": MeasureFacts("Barrier", False),
    "time_dispersion": MeasureFacts("Dispersion across time", True),
}
"""Of `steppe.landscape.measures.MEASURES`, which the page cannot import: it would bring torch along."""


def facts_of(measure: str) -> MeasureFacts:
    """Of a measure nobody named here too, under its own name and with no claim to invariance."""
    return MEASURES.get(measure, MeasureFacts(measure.replace("_", " "), False))


@dataclass(frozen=True)
class Panel:
    """One surface.

    Attributes:
        trial: whose plane it is.
        plane: one of `PLANES`.
        x, y: coordinates of the grid.
        loss: ``[ny, nx]``.
    """

    trial: str
    optimizer: str
    split: str
    plane: str
    x: Floats
    y: Floats
    loss: Floats

    @property
    def at_origin(self) -> float:
        """The loss at the kept weights, bilinear between the four points around them; NaN outside the grid."""
        if not (self.x[0] <= 0 <= self.x[-1] and self.y[0] <= 0 <= self.y[-1]):
            return math.nan
        i, right = _cell(self.x)
        j, up = _cell(self.y)
        corners = self.loss[j : j + 2, i : i + 2]
        return float(np.array([1 - up, up]) @ corners @ np.array([1 - right, right]))

    @property
    def lowest(self) -> tuple[float, float]:
        """Where the loss of the grid is lowest, as x and y."""
        j, i = np.unravel_index(np.nanargmin(self.loss), self.loss.shape)
        return float(self.x[i]), float(self.y[j])


@dataclass(frozen=True)
class Taken:
    """A measure of an optimizer on one split, mean over its trials.

    Attributes:
        value: mean over the trials in which it could be taken.
        stderr: of the mean, from the chance within the measurements; NaN where they have none.
        trials: how many.
        converged: whether all of them did.
    """

    value: float
    stderr: float
    trials: int
    converged: bool


@dataclass(frozen=True)
class Link:
    """A measure against a number that says how well trials generalise.

    Attributes:
        outcome: the number's name.
        sign: of the tau that would speak for flatness: -1 where more of the outcome is better.
        p_holm: corrected over the links of the part.
    """

    measure: str
    outcome: str
    sign: int
    association: Association
    p_holm: float

    @property
    def shown(self) -> bool:
        """Whether it can be told from chance."""
        return self.p_holm < 1 - self.association.level


@dataclass(frozen=True)
class Landscapes:
    """The landscapes and measures of the current plan's trials; empty where none were computed.

    Attributes:
        results: the study they belong to.
        surface, path, axes, eigenvalues, lines, density, measures: the tables of `steppe.study.landscape`; a surface's
            ``kind`` is the ``plane`` here.
    """

    results: Results
    surface: pl.DataFrame
    path: pl.DataFrame
    axes: pl.DataFrame
    eigenvalues: pl.DataFrame
    lines: pl.DataFrame
    density: pl.DataFrame
    measures: pl.DataFrame

    @classmethod
    def of(cls, store: Store, results: Results) -> Landscapes:
        """Read a store."""
        names = store.tables()
        trials = [trial.id for trial in results.trials]

        def own(name: str) -> pl.DataFrame:
            if name not in names:
                about = {"trial": pl.String, "optimizer": pl.String, "seed": pl.Int64, "part": pl.String}
                return pl.DataFrame(schema=about)
            table = store.table(name)
            # an earlier plan may have left more
            ends = [column for column in ("trial", "origin") if column in table.columns]
            return table.filter(pl.all_horizontal(pl.col(ends).is_in(trials)))

        surface = own("landscape_surface")
        if "kind" in surface.columns:
            surface = surface.with_columns(pl.col("kind").replace("pca", "trajectory").alias("plane"))
        return cls(
            results,
            surface,
            path=own("landscape_path"),
            axes=own("landscape_axes"),
            eigenvalues=own("landscape_eigenvalues"),
            lines=own("landscape_line"),
            density=own("landscape_density"),
            measures=own("measures"),
        )

    @cached_property
    def parts(self) -> list[str]:
        """Parts with a surface, a line, a density or a measure, in the plan's order."""
        tables = (self.surface, self.lines, self.density, self.measures)
        found = {part for table in tables for part in table["part"]}
        return [part for part in self.results.parts if part in found]

    def views(self, part: str) -> list[tuple[int, str]]:
        """Seed and plane of the surfaces there are, in the page's order."""
        found = {(seed, plane) for at, seed, plane in self._panels if at == part}
        return sorted(found, key=lambda view: (PLANES.index(view[1]), view[0]))

    def panels(self, part: str, seed: int, plane: str = "trajectory") -> dict[str, dict[str, Panel]]:
        """Optimizer -> split -> its surface, optimizers in the study's order."""
        return self._panels.get((part, seed, plane), {})

    @cached_property
    def _panels(self) -> dict[tuple[str, int, str], dict[str, dict[str, Panel]]]:
        if self.surface.is_empty():
            return {}
        keys = ("part", "seed", "plane", "optimizer", "split")
        tables = self.surface.partition_by(*keys, as_dict=True)
        found: dict[tuple[str, int, str], dict[str, dict[str, Panel]]] = {}
        for (part, seed, plane), label, split in itertools.product(
            dict.fromkeys(key[:3] for key in tables), self.results.optimizers, SPLITS
        ):
            if (rows := tables.get((part, seed, plane, label, split))) is not None:
                pairs = found.setdefault((str(part), int(seed), str(plane)), {})
                pairs.setdefault(label, {})[split] = _panel(rows.sort("y", "x"))
        return found

    def way(self, panel: Panel) -> pl.DataFrame:
        """``epoch``, ``x`` and ``y`` of a trial's weights in the plane of its trajectory; empty in any other plane."""
        own = (pl.col("trial") == panel.trial) & (panel.plane == "trajectory")
        return self.path.filter(own).sort("epoch") if "epoch" in self.path.columns else self.path

    def keys(self, part: str) -> list[str]:
        """Measures of a part, those the page knows in its order, then the others."""
        found = self.measures.filter(pl.col("part") == part)["measure"].unique(maintain_order=True).to_list()
        order = list(MEASURES)
        return sorted(found, key=lambda key: order.index(key) if key in order else len(order))

    def splits(self, part: str) -> list[str]:
        """Splits a part's measures were taken on."""
        found = set(self.measures.filter(pl.col("part") == part)["split"])
        return [split for split in SPLITS if split in found]

    def labels(self, part: str) -> list[str]:
        """Optimizers with measures in a part, in the study's order."""
        found = set(self.measures.filter(pl.col("part") == part)["optimizer"])
        return [label for label in self.results.optimizers if label in found]

    def taken(self, part: str, split: str, label: str, measure: str) -> Taken | None:
        """A measure, mean over seeds; None if no trial gave it."""
        return _together(self._rows.get((part, split, label, measure), {}))

    def taken_with_baseline(self, part: str, label: str, measure: str) -> tuple[Taken, Taken] | None:
        """The measure on train of an optimizer and of the baseline, over the seeds that gave both."""
        own, base = (
            {
                seed: row
                for seed, row in self._rows.get((part, "train", name, measure), {}).items()
                if math.isfinite(row["value"])
            }
            for name in (label, self.results.baseline)
        )
        pair = (
            _together({seed: own[seed] for seed in own if seed in base}),
            _together({seed: base[seed] for seed in base if seed in own}),
        )
        return (pair[0], pair[1]) if pair[0] and pair[1] else None

    @cached_property
    def _rows(self) -> dict[tuple[str, str, str, str], dict[int, dict[str, Any]]]:
        rows: dict[tuple[str, str, str, str], dict[int, dict[str, Any]]] = {}
        for row in self.measures.to_dicts():
            row |= {key: math.nan if row[key] is None else row[key] for key in ("value", "stderr")}
            rows.setdefault((row["part"], row["split"], row["optimizer"], row["measure"]), {})[
                row["seed"]
            ] = row
        return rows

    def gaps(self, part: str) -> dict[str, tuple[float, float]]:
        """Trial -> its train and its test loss at the kept weights, of the trials with both surfaces.

        Of one plane per seed, the first of `PLANES`: those of others may be on other dates.
        """
        views = dict(reversed(self.views(part)))
        return {
            pair["train"].trial: (pair["train"].at_origin, pair["test"].at_origin)
            for view in views.items()
            for pair in self.panels(part, *view).values()
            if {"train", "test"} <= set(pair)
        }

    def outcomes(self, part: str) -> dict[str, tuple[int, dict[str, float]]]:
        """What says how a trial generalises: name -> (sign of a tau that speaks for flatness, trial -> value).

        The test RankIC of the trials' own scores where there is one, else the validation metric of the kept epoch; and
        the test loss less the train loss.
        """
        found: dict[str, tuple[int, dict[str, float]]] = {}
        ic = self.results.ic.filter(pl.col("part") == part)
        if not ic.is_empty():
            means = ic.group_by("optimizer", "seed").agg(pl.col("rank_ic").mean())
            of = {(label, seed): value for label, seed, value in means.iter_rows()}
            scored = {
                trial.id: of[trial.optimizer, trial.seed]
                for trial in self.results.trials
                if trial.part == part and (trial.optimizer, trial.seed) in of
            }
            found["test RankIC"] = (-1, scored)
        elif kept := self._kept(part):
            name, values = kept
            # of a loss or an error less is better
            sign = 1 if any(word in name for word in ("loss", "error", "perplexity")) else -1
            found[name] = (sign, values)
        gaps = {trial: test - train for trial, (train, test) in self.gaps(part).items()}
        if gaps:
            found["test loss − train loss"] = (1, gaps)
        return found

    def _kept(self, part: str) -> tuple[str, dict[str, float]] | None:
        """The validation metric of the kept epochs: its name, and trial -> value."""
        history = self.results.history
        metrics = sorted(
            (name for name in history.columns if name.startswith("validation_")),
            key=lambda name: "rank_ic" not in name,
        )
        if not metrics:
            return None
        best = {t.id: t.best_epoch for t in self.results.trials if t.part == part and t.state == "done"}
        values = {
            trial: value
            for trial, epoch, value in history.select("trial", "epoch", metrics[0]).iter_rows()
            if trial in best and best[trial] == epoch and value is not None
        }
        return metrics[0].replace("_", " "), values

    def links(self, part: str) -> list[Link]:
        """Every measure on train against every outcome across the part's trials, corrected together (Holm)."""
        train = self.measures.filter(pl.col("part") == part, pl.col("split") == "train")
        found: list[tuple[str, str, int, Association]] = []
        for outcome, (sign, values) in self.outcomes(part).items():
            for key in self.keys(part):
                rows = train.filter(pl.col("measure") == key)
                of = dict(rows.select("trial", "value").iter_rows())
                both = [trial for trial in of if of[trial] is not None and trial in values]
                if len(both) > 1:
                    tau = kendall([of[t] for t in both], [values[t] for t in both])
                    flipped = -sign if facts_of(key).larger == "flatter" else sign
                    found.append((key, outcome, flipped, tau))
        corrected = holm([association.p for *_, association in found])
        return [Link(*one, float(p)) for one, p in zip(found, corrected, strict=True)]

    def notes(self, part: str) -> Mapping[str, list[str]]:
        """What measurements said of themselves -> the trials and measures it was said of."""
        said: dict[str, list[str]] = {}
        for row in self.measures.filter(pl.col("part") == part).to_dicts():
            if row.get("note"):
                name = f"{facts_of(row['measure']).title} of {row['optimizer']}, seed {row['seed']}, {row['split']}"
                said.setdefault(row["note"], []).append(name)
        return said


def sample_of(table: pl.DataFrame) -> str:
    """What the rows of a table were computed on, in words."""
    found = table.select("dates", "stocks").unique().rows()
    if len(found) > 1:
        return "samples of dates and stocks that differ"
    return "{} dates of up to {} stocks".format(*found[0])


def _panel(rows: pl.DataFrame) -> Panel:
    x, y = (np.sort(rows[axis].unique().to_numpy()) for axis in ("x", "y"))
    loss = rows["loss"].cast(pl.Float64).to_numpy().reshape(len(y), len(x))
    trial, label, split, plane = (str(rows[name][0]) for name in ("trial", "optimizer", "split", "plane"))
    return Panel(trial, label, split, plane, x, y, loss)


def _cell(grid: Floats) -> tuple[int, float]:
    """The cell of an ascending grid that holds zero, and where in it zero lies, from 0 to 1."""
    i = min(max(int(np.searchsorted(grid, 0.0, side="right")) - 1, 0), len(grid) - 2)
    return i, float(-grid[i] / (grid[i + 1] - grid[i]))


def _together(rows: Mapping[int, Mapping[str, Any]]) -> Taken | None:
    known = [row for row in rows.values() if math.isfinite(row["value"])]
    if not known:
        return None
    chance = [row["stderr"] for row in known if math.isfinite(row["stderr"])]
    stderr = math.sqrt(sum(s * s for s in chance)) / len(known) if chance else math.nan
    return Taken(
        mean([row["value"] for row in known]), stderr, len(known), all(r["converged"] for r in known)
    )

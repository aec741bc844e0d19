"""What a study of functions left, gathered once for tables, figures and sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steppe.report.results import Results
from steppe.study.store import Store, TrialRow

__all__ = ["BACKWARD", "TOLERANCE", "Functions", "Grid", "Problem", "Reached", "Run"]

Floats = NDArray[np.float64]

BACKWARD = 2
"""Forward passes that a backward pass counts as, as in `steppe.core.objective`, which would bring torch along."""

TOLERANCE = 1e-3
"""How near the floor counts as reached: this much, times the floor's size where that is above one."""


@dataclass(frozen=True)
class Problem:
    """What is known of a function or a small learning problem.

    Attributes:
        part: its name in the study.
        floor: the lowest loss there is; None if it is not known.
        minima: ``[M, dim]``, may be empty.
        source: the publication it is taken from; empty if it is not from one.
        errors: what is wrong in the publication, in sentences.
        printed: its figures by what they are.
    """

    part: str
    title: str
    formula: str
    dim: int
    floor: float | None
    minima: Floats
    source: str
    errors: Sequence[str]
    printed: Mapping[str, Any]

    @classmethod
    def of(cls, part: str, facts: Mapping[str, Any]) -> Problem:
        """From the study's facts; a part without any is known by its name alone."""
        floor = facts.get("floor")
        return cls(
            part,
            str(facts.get("title") or part.replace("_", " ").capitalize()),
            str(facts.get("formula", "")),
            int(facts.get("dim", 0)),
            float(floor) if floor is not None and math.isfinite(floor) else None,
            np.atleast_2d(np.array(facts.get("minima") or np.empty((0, 0)), dtype=np.float64)),
            str(facts.get("source", "")),
            list(facts.get("errors", [])),
            facts.get("printed", {}),
        )


@dataclass(frozen=True)
class Grid:
    """A function of two coordinates: ``value [len(y), len(x)]``."""

    x: Floats
    y: Floats
    value: Floats

    @classmethod
    def of(cls, rows: pl.DataFrame, value: str) -> Grid:
        """From a long table of a whole grid."""
        x, y = (np.unique(rows[axis].to_numpy()) for axis in ("x", "y"))
        return cls(x, y, rows.sort("y", "x")[value].cast(pl.Float64).to_numpy().reshape(len(y), len(x)))


@dataclass(frozen=True)
class Run:
    """One trial as it went: a row per recorded epoch, and before them one for the start where it is known.

    Attributes:
        evaluations: forward passes so far, a gradient counted as one and its backward as `BACKWARD` more.
        value: the loss on all data at the weights of that moment.
        path: ``[epochs, 2]`` of two weights, else ``[epochs, 0]``.
        forward, gradient: evaluations of the loss alone and with its gradient, at the end.
        seconds: CPU seconds of the optimizer's steps, at the end.
    """

    trial: TrialRow
    evaluations: Floats
    value: Floats
    path: Floats
    forward: int
    gradient: int
    seconds: float

    @property
    def lowest(self) -> float:
        """The lowest recorded loss: that of the kept weights. Infinite if none is finite."""
        return float(np.min(self.value, where=np.isfinite(self.value), initial=math.inf))

    @property
    def final(self) -> float:
        """The loss where the run ended; infinite where it was no number any more."""
        ended = math.nan if self.trial.state == "failed" or not len(self.value) else float(self.value[-1])
        return ended if math.isfinite(ended) else math.inf

    @property
    def diverged(self) -> bool:
        """Whether the loss became infinite, or ended above all recorded before and at ten times the first."""
        if self.trial.state == "failed":
            return "diverged" in (self.trial.error or "")
        if len(self.value) < 3 or not math.isfinite(self.value[0]):
            return False
        return self.final >= max(10 * abs(self.value[0]), np.max(self.value[:-1]))

    def reached(self, target: float) -> tuple[float, float] | None:
        """Evaluations between which the loss first was at ``target`` or below: runs are recorded once an epoch."""
        below = np.flatnonzero(self.value <= target)
        if not len(below):
            return None
        first = int(below[0])
        return (float(self.evaluations[first - 1]) if first else 0.0, float(self.evaluations[first]))


@dataclass(frozen=True)
class Reached:
    """How an optimizer came to the floor of a problem.

    Attributes:
        runs: seeds that were run.
        seeds: of them, those that came within the tolerance.
        median: evaluations, over the seeds that did.
        span: from the fewest to the most evaluations it may have been, the coarseness of the record included.
    """

    optimizer: str
    runs: int
    seeds: int
    median: float
    span: tuple[float, float]


@dataclass(frozen=True)
class Functions:
    """The problems and runs of a study of functions.

    Attributes:
        results: the study.
        grid, start, boundary, points: the tables ``function_grid``, ``function_start``, ``boundary`` and
            ``function_points``.
    """

    results: Results
    grid: pl.DataFrame
    start: pl.DataFrame
    boundary: pl.DataFrame
    points: pl.DataFrame

    @classmethod
    def of(cls, store: Store, results: Results) -> Functions:
        """Read a store."""
        names, nothing = store.tables(), pl.DataFrame(schema={"part": pl.String})
        tables = ("function_grid", "function_start", "boundary", "function_points")
        return cls(results, *(store.table(n) if n in names else nothing for n in tables))

    @cached_property
    def problems(self) -> list[Problem]:
        """In the study's order."""
        facts = self.results.panel.get("parts", {})
        return [Problem.of(part, facts.get(part, {})) for part in self.results.parts]

    @cached_property
    def _runs(self) -> dict[tuple[str, str], list[Run]]:
        history = self.results.history
        if "validation_value" not in history.columns:
            return {}
        rows_of = {str(key[0]): rows for key, rows in history.partition_by("trial", as_dict=True).items()}
        starts = {(row["part"], row["seed"]): row for row in self.start.to_dicts()}
        found: dict[tuple[str, str], list[Run]] = {}
        for trial in sorted(self.results.trials, key=lambda trial: trial.seed):
            if trial.id in rows_of:
                run = _run(trial, rows_of[trial.id], starts.get((trial.part, trial.seed)))
                found.setdefault((trial.part, trial.optimizer), []).append(run)
            elif trial.state == "failed":  # in its first epoch, so that nothing was recorded
                nothing = np.empty(0)
                run = Run(trial, nothing, nothing, np.empty((0, 0)), 0, 0, math.nan)
                found.setdefault((trial.part, trial.optimizer), []).append(run)
        return found

    def runs(self, part: str) -> dict[str, list[Run]]:
        """Optimizer, in the study's order -> its runs by seed; without those that have not begun."""
        return {
            label: self._runs[part, label] for label in self.results.optimizers if (part, label) in self._runs
        }

    def lowest(self, part: str) -> float:
        """The lowest loss that any run of a part recorded."""
        return min((run.lowest for runs in self.runs(part).values() for run in runs), default=math.inf)

    def reference(self, problem: Problem) -> float:
        """The floor, or the lowest loss of any run where the floor is not known."""
        return self.lowest(problem.part) if problem.floor is None else problem.floor

    def target(self, problem: Problem) -> float:
        """The loss that counts as the floor reached."""
        reference = self.reference(problem)
        return reference + TOLERANCE * max(1.0, abs(reference))

    def reached(self, problem: Problem) -> dict[str, Reached]:
        """Optimizer -> how it came to the floor."""
        target = self.target(problem)
        found = {}
        for label, runs in self.runs(problem.part).items():
            spans = [span for run in runs if (span := run.reached(target))]
            fewest, most = (
                min((s[0] for s in spans), default=math.inf),
                max((s[1] for s in spans), default=math.inf),
            )
            median = float(np.median([s[1] for s in spans])) if spans else math.inf
            found[label] = Reached(label, len(runs), len(spans), median, (fewest, most))
        return found

    def grid_of(self, part: str) -> Grid | None:
        """The function over its plane, if it has one."""
        rows = self.grid.filter(pl.col("part") == part)
        return None if rows.is_empty() else Grid.of(rows, "value")

    def boundaries(self, part: str) -> dict[str, Grid]:
        """Optimizer -> the probability of the second class over the plane, of the first seed there is."""
        rows = self.boundary.filter(pl.col("part") == part)
        found = {}
        for label in self.results.optimizers if not rows.is_empty() else []:
            own = rows.filter(pl.col("optimizer") == label)
            if not own.is_empty():
                found[label] = Grid.of(own.filter(pl.col("seed") == own["seed"].min()), "probability")
        return found

    def data(self, part: str) -> pl.DataFrame:
        """``x``, ``y`` and ``label`` of the points a classifier was trained on."""
        return self.points.filter(pl.col("part") == part)

    @property
    def sweep(self) -> bool:
        """Whether every optimizer is there with several settings, so that these are what the study compares."""
        kinds = [settings.get("kind") for settings in self.results.spec["optimizers"].values()]
        return len(kinds) > 1 and all(kinds.count(kind) > 1 for kind in kinds)


def _run(trial: TrialRow, rows: pl.DataFrame, start: Mapping[str, Any] | None) -> Run:
    rows = rows.sort("epoch")
    forward, gradient = (rows[f"{name}_evaluations"].to_numpy() for name in ("forward", "gradient"))
    evaluations = (forward + (1 + BACKWARD) * gradient).astype(np.float64)
    value = rows["validation_value"].cast(pl.Float64).fill_null(math.nan).to_numpy()
    axes = [name for name in ("validation_x0", "validation_x1") if name in rows.columns]
    flat = len(axes) == 2 and not any(rows[name].null_count() for name in axes)
    path = rows.select(axes).to_numpy() if flat else np.empty((rows.height, 0))
    if start and flat:
        evaluations, value = np.append(0.0, evaluations), np.append(start["value"], value)
        path = np.vstack([[start["x"], start["y"]], path])
    seconds = float(rows["seconds"][-1])
    return Run(trial, evaluations, value, path, int(forward[-1]), int(gradient[-1]), seconds)

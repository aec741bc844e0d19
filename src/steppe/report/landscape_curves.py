"""What landscapes show along one axis: the loss between trained weights, and the spectral density of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steppe.report.figures import Figure, line, plot_layout
from steppe.report.landscapes import SPLITS, Landscapes

__all__ = ["Density", "Line", "densities", "density_figures", "line_figures", "lines"]

Floats = NDArray[np.float64]

POINTS = 600
"""Of a density's curve."""

WIDTH = 0.01
"""Standard deviation of the normal curve that smooths densities, over the widest spectrum's spread."""


@dataclass(frozen=True)
class Line:
    """The loss on the straight way from one trial's weights to another's.

    Attributes:
        start, end: optimizer and seed.
        t: 0 at the start, 1 at the end, ascending.
        loss: there.
    """

    start: tuple[str, int]
    end: tuple[str, int]
    split: str
    t: Floats
    loss: Floats

    @property
    def barrier(self) -> float:
        """The highest rise over the straight line between the losses at the ends (Entezari et al. 2022); 0 for none."""
        return float(max(self._rise.max(), 0.0))

    @property
    def highest(self) -> float | None:
        """Where the barrier is; None where there is none."""
        return float(self.t[int(np.argmax(self._rise))]) if self.barrier > 0 else None

    @property
    def _rise(self) -> Floats:
        return np.asarray(self.loss - ((1 - self.t) * self.loss[0] + self.t * self.loss[-1]))


def lines(landscapes: Landscapes, part: str) -> dict[str, list[Line]]:
    """The lines of a part, those that belong together under words for what they join; optimizers as in the study."""
    found: dict[str, list[Line]] = {}
    table = landscapes.lines.filter(pl.col("part") == part)
    if table.is_empty():
        return found
    order = landscapes.results.optimizers
    trials = {trial.id: (trial.optimizer, trial.seed) for trial in landscapes.results.trials}
    for (start, end, split), rows in table.partition_by("origin", "trial", "split", as_dict=True).items():
        rows = rows.sort("t")
        loss = rows["loss"].cast(pl.Float64).to_numpy()
        one = Line(trials[str(start)], trials[str(end)], str(split), rows["t"].to_numpy(), loss)
        (label, seed), same = one.start, one.start[0] == one.end[0]
        words = f"seed {seed} and the others" if same else f"{label} and the others, seed {seed}"
        found.setdefault(words, []).append(one)
    return {
        words: sorted(
            among,
            key=lambda one: (SPLITS.index(one.split), order.index(one.end[0]), one.start, one.end),
        )
        for words, among in sorted(found.items(), key=lambda item: item[0].startswith("seed"))
    }


def line_figures(landscapes: Landscapes, part: str) -> dict[str, list[Figure]]:
    """Words for what is joined -> a figure per split."""
    return {words: _line_figures(landscapes, among) for words, among in lines(landscapes, part).items()}


def _line_figures(landscapes: Landscapes, among: Sequence[Line]) -> list[Figure]:
    figures = []
    for split in dict.fromkeys(one.split for one in among):
        traces = []
        for one in (one for one in among if one.split == split):
            label, seed = one.end
            trace = line(landscapes.results, label, one.t.tolist(), one.loss.tolist())
            traces.append(trace | {"hovertemplate": f"%{{y:.4g}}<extra>{trace['name']}, seed {seed}</extra>"})
        layout = plot_layout(x="share of the way", height=240)
        figures.append(Figure(f"Loss on {split} dates", {"data": traces, "layout": layout}))
    return figures


@dataclass(frozen=True)
class Density:
    """Spectral densities, smoothed alike.

    Attributes:
        eigenvalue: ``[points]``.
        curves: optimizer -> ``[points]`` share of all eigenvalues per unit; NaN below a tenth of what a single
            eigenvalue makes.
        width: of the smoothing.
    """

    eigenvalue: Floats
    curves: Mapping[str, Floats]
    width: float


def densities(landscapes: Landscapes, part: str) -> dict[int, Density]:
    """Seed -> the densities of a part, optimizers as in the study."""
    table = landscapes.density.filter(pl.col("part") == part)
    if table.is_empty():
        return {}
    return {
        int(seed): _density(landscapes, rows)
        for (seed,), rows in sorted(table.partition_by("seed", as_dict=True).items())
    }


def _density(landscapes: Landscapes, rows: pl.DataFrame) -> Density:
    of = {
        label: rows.filter(pl.col("optimizer") == label)
        for label in landscapes.results.optimizers
        if label in set(rows["optimizer"])
    }
    width = WIDTH * max(float(np.ptp(own["eigenvalue"].to_numpy())) for own in of.values()) or WIDTH
    low, high = (
        float(edge) for edge in (rows["eigenvalue"].to_numpy().min(), rows["eigenvalue"].to_numpy().max())
    )
    grid = np.linspace(low - 4 * width, high + 4 * width, POINTS)
    height = 1 / (width * math.sqrt(2 * math.pi))
    curves = {}
    for label, own in of.items():
        z = (grid[:, None] - own["eigenvalue"].to_numpy()) / width
        curve = height * np.exp(-0.5 * z**2) @ own["weight"].to_numpy()
        curves[label] = np.where(curve < 0.1 * height / int(own["dim"][0]), np.nan, curve)
    return Density(grid, curves, width)


def density_figures(landscapes: Landscapes, part: str) -> dict[int, Figure]:
    """Seed -> one figure on a logarithmic scale, a line per optimizer."""
    figures = {}
    for seed, found in densities(landscapes, part).items():
        traces: list[dict[str, Any]] = [
            line(landscapes.results, label, found.eigenvalue.tolist(), curve.tolist())
            for label, curve in found.curves.items()
        ]
        layout = plot_layout(x="eigenvalue", height=260)
        layout["yaxis"] |= {"type": "log", "dtick": 1, "exponentformat": "power"}
        figures[seed] = Figure("Share of the eigenvalues per unit", {"data": traces, "layout": layout})
    return figures

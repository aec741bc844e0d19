"""Landscapes as plotly contours: train and test side by side, one scale for all that is to be compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steppe.report.figures import Figure
from steppe.report.landscapes import Landscapes, Panel, sample_of

__all__ = ["contours", "levels", "scale"]

Floats = NDArray[np.float64]

BANDS = 12
"""Contour levels at most."""

COLORSCALE = "Viridis"
"""Perceptually uniform, readable without colour vision, and the same on light and on dark pages."""

_HALO, _WAY = "rgba(0,0,0,0.55)", "#ffffff"


def levels(panels: Sequence[Panel]) -> list[float]:
    """Losses at which contours are drawn in all panels: rounded quantiles of all their losses together.

    Losses far from a minimum exceed those near it by far, so equal steps would leave the inner part blank; between
    quantiles lie equal areas of the panels.
    """
    values = np.concatenate([panel.loss.ravel() for panel in panels])
    values = values[np.isfinite(values)]
    if not values.size or values.min() == values.max():
        return []
    quantiles = np.quantile(values, np.linspace(0, 1, BANDS + 2)[1:-1])
    steps = np.diff(quantiles)
    step = float(np.median(steps[steps > 0])) if (steps > 0).any() else float(np.ptp(values))
    digits = 1 - math.floor(math.log10(step))  # two digits of the step between neighbours
    rounded = {round(float(value), digits) for value in quantiles}
    return sorted(value for value in rounded if values.min() < value < values.max())


def contours(landscapes: Landscapes, part: str, seed: int, plane: str = "trajectory") -> list[Figure]:
    """Per optimizer: its surface on each split beside the others, with its trajectory; one scale for all."""
    pairs = landscapes.panels(part, seed, plane)
    shared = levels([panel for pair in pairs.values() for panel in pair.values()])
    return [Figure(label, _pair(landscapes, pair, shared), optimizer=label) for label, pair in pairs.items()]


def scale(landscapes: Landscapes, part: str, seed: int, plane: str = "trajectory") -> Figure | None:
    """The colours of the contours and the losses they stand for; None if the loss is the same everywhere."""
    pairs = landscapes.panels(part, seed, plane)
    shared = levels([panel for pair in pairs.values() for panel in pair.values()])
    if not shared:
        return None
    n = len(shared)
    steps = np.diff(shared).min() if n > 1 else abs(shared[0])
    digits = max(0, 1 - math.floor(math.log10(steps))) if steps else 3
    texts = [f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}") for value in shared]
    while digits and all(text.endswith("0") for text in texts):
        digits, texts = digits - 1, [text[:-1].rstrip(".") for text in texts]
    band = {
        "type": "heatmap",
        "z": [list(range(n + 1))],
        "x": list(range(n + 2)),
        "y": [0, 1],
        "zmin": 0,
        "zmax": n,
        "colorscale": COLORSCALE,
        "showscale": False,
        "hoverinfo": "skip",
    }
    bare = {"showgrid": False, "zeroline": False, "fixedrange": True, "ticklen": 0}
    layout = _layout(56) | {
        "margin": {"l": 8, "r": 8, "t": 2, "b": 26},
        "xaxis": bare | {"tickvals": list(range(1, n + 1)), "ticktext": texts, "tickangle": 0},
        "yaxis": bare | {"visible": False},
    }
    here = (pl.col("part") == part) & (pl.col("seed") == seed) & (pl.col("plane") == plane)
    title = f"Loss on {sample_of(landscapes.surface.filter(here))}"
    return Figure(title, {"data": [band], "layout": layout})


def _pair(landscapes: Landscapes, pair: Mapping[str, Panel], shared: Sequence[float]) -> dict[str, Any]:
    """The panels of one optimizer; zooming one zooms the others."""
    width = 1 / len(pair)
    data: list[dict[str, Any]] = []
    layout = _layout(310)
    layout["annotations"] = []
    for number, (split, panel) in enumerate(pair.items()):
        suffix = str(number + 1) if number else ""
        on = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        low, high = number * width + (0.02 if number else 0), (number + 1) * width - 0.02 * (width < 1)
        layout[f"xaxis{suffix}"] = _axis([low, min(high, 1)], panel.x) | ({"matches": "x"} if number else {})
        layout[f"yaxis{suffix}"] = _axis([0, 0.93], panel.y) | (
            {"matches": "y", "showticklabels": False, "anchor": f"x{suffix}"} if number else {}
        )
        layout["annotations"].append(
            {
                "text": split,
                "x": low,
                "y": 1,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "top",
                "showarrow": False,
            }
        )
        data += [trace | on for trace in (_contour(panel, shared), *_way(landscapes, panel), *_marks(panel))]
    return {"data": data, "layout": layout}


def _contour(panel: Panel, shared: Sequence[float]) -> dict[str, Any]:
    # plotly wants levels one step apart: the number of a level stands for its loss, which the hover text tells
    edges = [-math.inf, *shared, math.inf]
    n = len(shared)
    position = np.interp(panel.loss, shared, np.arange(1, n + 1)) if shared else np.zeros_like(panel.loss)
    if n > 1:  # beyond the outer levels as steep as between the two next to them, to half a step
        low, high = panel.loss < edges[1], panel.loss > edges[-2]
        position[low] = 1 - np.minimum((edges[1] - panel.loss[low]) / (shared[1] - shared[0]), 0.9)
        position[high] = n + np.minimum((panel.loss[high] - edges[-2]) / (shared[-1] - shared[-2]), 0.9)
    position = np.where(np.isfinite(panel.loss), position, np.nan)
    return {
        "type": "contour",
        "x": panel.x.tolist(),
        "y": panel.y.tolist(),
        "z": np.round(position, 3).tolist(),
        "text": [[f"{value:.4g}".replace("-", "\N{MINUS SIGN}") for value in row] for row in panel.loss],
        "hovertemplate": "loss %{text}<extra></extra>",
        "colorscale": COLORSCALE,
        "zmin": 0,
        "zmax": n + 1,
        "zauto": False,
        "autocontour": False,
        "contours": {"start": 1, "end": max(n, 1), "size": 1, "coloring": "fill"},
        "line": {"width": 0.6, "color": "rgba(255,255,255,0.45)", "smoothing": 0.6},
        "showscale": False,
        "connectgaps": False,
    }


def _way(landscapes: Landscapes, panel: Panel) -> list[dict[str, Any]]:
    """The trajectory, a dark line under a light one so that it is seen on every colour."""
    way = landscapes.way(panel)
    if way.is_empty():
        return []
    line = {"type": "scatter", "x": way["x"].to_list(), "y": way["y"].to_list()}
    epochs = way["epoch"].to_list()
    every = max(1, math.ceil(len(epochs) / 5))
    named = [str(e) if i % every == 0 or i == len(epochs) - 1 else "" for i, e in enumerate(epochs)]
    return [
        line | {"mode": "lines", "line": {"color": _HALO, "width": 4.5}, "hoverinfo": "skip"},
        line
        | {
            "mode": "lines+markers+text",
            "line": {"color": _WAY, "width": 1.8},
            "marker": {"color": _WAY, "size": 5.5, "line": {"color": _HALO, "width": 1}},
            "text": named,
            "textposition": "top center",
            "textfont": {"color": _WAY, "size": 11, "shadow": "0 0 3px #000, 0 0 2px #000"},
            "customdata": epochs,
            "hovertemplate": "epoch %{customdata}<extra></extra>",
        },
    ]


def _marks(panel: Panel) -> list[dict[str, Any]]:
    """A diamond at the origin, the kept weights, and a cross where the grid's loss is lowest."""
    x, y = panel.lowest
    mark = {"type": "scatter", "mode": "markers"}
    return [
        mark
        | {
            "x": [x],
            "y": [y],
            "marker": {"symbol": "x-thin", "size": 10, "line": {"color": _WAY, "width": 2}},
            "hovertemplate": "lowest loss of the grid<extra></extra>",
        },
        mark
        | {
            "x": [0],
            "y": [0],
            "marker": {
                "symbol": "diamond",
                "size": 11,
                "color": "#ffd92f",
                "line": {"color": "#000000", "width": 1.2},
            },
            "hovertemplate": "the kept weights<extra></extra>",
        },
    ]


def _axis(domain: Sequence[float], grid: Floats) -> dict[str, Any]:
    return {
        "domain": list(domain),
        "range": [float(grid[0]), float(grid[-1])],
        "showgrid": False,
        "zeroline": False,
        "nticks": 6,
        "ticklabeloverflow": "hide past domain",  # labels of two panels would meet
        "ticklen": 3,
        "tickcolor": "var(--grid)",
        "automargin": True,
    }


def _layout(height: int) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 8, "r": 4, "t": 4, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--soft)", "size": 12, "family": "system-ui, sans-serif"},
        "showlegend": False,
        "hovermode": "closest",
    }

"""Figures of a study of functions: paths over contours, loss against evaluations, decision boundaries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from steppe.report.cells import plain, significant
from steppe.report.figures import Figure, line, trace_name
from steppe.report.function_results import Floats, Functions, Grid, Problem, Run

__all__ = ["boundaries", "losses", "paths", "stops"]

LEVELS = 14
"""Contours of a function."""

STOPS = 48
"""Positions of the slider at most."""

FARTHEST = 1e4
"""Losses that are drawn, over the largest first one: what diverges leaves the figure instead of flattening the rest."""

LEAST = 1e-12
"""Smallest distance from the floor that a logarithmic axis shows: below it is rounding."""


def stops(functions: Functions, part: str) -> list[int]:
    """Numbers of evaluations at which the slider stops, close together at the start, where paths move most."""
    counts = [run.evaluations for runs in functions.runs(part).values() for run in runs[:1] if run.path.size]
    most = max((c[-1] for c in counts), default=0.0)
    least = min((c[c > 0][0] for c in counts if (c > 0).any()), default=0.0)
    if most <= least:
        return []
    return sorted({0, *np.geomspace(least, most, STOPS).round().astype(int).tolist(), math.ceil(most)})


def paths(functions: Functions, problem: Problem) -> list[Figure]:
    """The way of every optimizer, from the first seed, over the contours of the function.

    All in one figure; in a sweep one figure per setting, since what is compared there is the shape of the way.
    """
    grid = functions.grid_of(problem.part)
    runs = {
        label: of[0] for label, of in functions.runs(problem.part).items() if of[0].path.size
    }  # the first seed
    if grid is None or not runs:
        return []
    ground = _ground(grid, problem)
    if functions.sweep:
        return [
            Figure(
                label,
                _plane([ground, *_way(functions, label, run), *_minima(problem)], grid, 300),
                label,
                ways=True,
            )
            for label, run in runs.items()
        ]
    ways = [trace for label, run in runs.items() for trace in _way(functions, label, run)]
    return [Figure(problem.title, _plane([ground, *ways, *_minima(problem)], grid, 460), ways=True)]


def losses(functions: Functions, problem: Problem) -> Figure:
    """Loss against evaluations on logarithmic axes: thin lines are seeds, the thick one is their median.

    Where the floor, or the lowest loss that stands for it, is not above zero a logarithmic axis cannot show it, so the
    distance from it is drawn.
    """
    reference = functions.reference(problem)
    above = 0 < reference < math.inf
    shift = 0.0 if above or not math.isfinite(reference) else reference
    traces: list[dict[str, Any]] = []
    for label, runs in functions.runs(problem.part).items():
        curves = [_curve(run, shift) for run in runs]
        curves = [curve for curve in curves if len(curve[0])]
        for x, y in curves if len(curves) > 1 else []:
            traces.append(
                line(functions.results, label, x.tolist(), y.tolist())
                | {"opacity": 0.28, "hoverinfo": "skip"}
            )
            traces[-1]["line"] |= {"width": 1}
            del traces[-1]["hovertemplate"]
        if curves:
            x, y = _median(curves)
            traces.append(line(functions.results, label, x.tolist(), y.tolist()))
    mark = reference if above else functions.target(problem) - shift
    name = "floor" if problem.floor is not None else "lowest loss found"
    shown = plain(reference, 6 if above else 4)
    text = f"{name} {shown}" if above else f"reached: within {plain(mark, 1)} of the {name}, {shown}"
    values = [v for trace in traces for v in trace["y"] if v is not None and math.isfinite(v)]
    begun = [trace["y"][0] for trace in traces if trace["y"]]
    low, high = min([mark, *values]), max([mark, *values])
    high = min(high, FARTHEST * max([mark, *begun]))
    span = [math.log10(low) - 0.06 * (1 + math.log10(high / low)), math.log10(high) + 0.1]
    layout = _layout(340) | {
        "margin": {"l": 8, "r": 10, "t": 8, "b": 8},
        "hovermode": "x",
        "xaxis": _axis()
        | {"type": "log", "title": {"text": "evaluations (forward passes)"}, "dtick": _decades(traces)},
        "yaxis": _axis()
        | {
            "type": "log",
            "title": {"text": "loss" if not shift else f"loss above {shown}"},
            "range": span,
            "exponentformat": "power",
            "showgrid": True,
            **({"dtick": math.ceil((span[1] - span[0]) / 7)} if span[1] - span[0] > 1.5 else {"dtick": "D2"}),
        },
        "shapes": [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": mark,
                "y1": mark,
                "line": {"color": "var(--ink)", "width": 1.2, "dash": "solid" if above else "dot"},
            }
        ],
        "annotations": [
            {
                "text": text,
                "xref": "paper",
                "x": 0.01,
                "y": math.log10(mark),
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"color": "var(--ink)", "size": 11.5},
            }
        ],
    }
    return Figure(
        "Loss against evaluations" if not shift else "Loss above the floor against evaluations",
        {"data": traces, "layout": layout},
    )


def boundaries(functions: Functions, problem: Problem) -> list[Figure]:
    """Per optimizer: the probability that it gives to the second class, the line where it is one half, and the data."""
    data = functions.data(problem.part)
    figures = []
    for label, grid in functions.boundaries(problem.part).items():
        every = slice(None, None, 2)  # half the points draw the same smooth band
        field = {
            "type": "contour",
            "x": grid.x[every].tolist(),
            "y": grid.y[every].tolist(),
            "z": np.round(grid.value[every, every], 3).tolist(),
            "zmin": 0,
            "zmax": 1,
            "autocontour": False,
            "contours": {"start": 0.1, "end": 0.9, "size": 0.1},
            "colorscale": [[0, "var(--class-0)"], [0.5, "var(--card)"], [1, "var(--class-1)"]],
            "line": {"width": 0},
            "showscale": False,
            "hovertemplate": "probability %{z:.2f}<extra></extra>",
        }
        edge = field | {
            "contours": {"start": 0.5, "end": 0.5, "size": 1, "coloring": "none"},
            "line": {"width": 2, "color": "var(--ink)"},
            "hoverinfo": "skip",
        }
        points = [
            {
                "type": "scatter",
                "mode": "markers",
                "x": data.filter(data["label"] == kind)["x"].to_list(),
                "y": data.filter(data["label"] == kind)["y"].to_list(),
                "marker": {
                    "size": 5.5,
                    "symbol": symbol,
                    "color": f"var(--point-{kind})",
                    "line": {"width": 0.8, "color": "var(--paper)"},
                },
                "hoverinfo": "skip",
            }
            for kind, symbol in ((0, "circle"), (1, "square"))
        ]
        figures.append(Figure(label, _plane([field, edge, *points], grid, 270), label))
    return figures


def _ground(grid: Grid, problem: Problem) -> dict[str, Any]:
    """Contours at equal steps of the logarithm of the distance from the floor, so that valleys are not blank."""
    finite = grid.value[np.isfinite(grid.value)]
    gap = grid.value - (finite.min() if problem.floor is None else problem.floor)
    known = gap[np.isfinite(gap) & (gap > 0)]
    # without a smallest step the minimum alone would take all levels
    least = max(float(np.quantile(known, 0.002)), 1e-6 * float(known.max())) if known.size else 1.0
    z = np.log10(np.maximum(gap, 0) + least)
    low, high = float(np.nanmin(z)), float(np.nanmax(z))
    step = (high - low) / LEVELS or 1.0
    return {
        "type": "contour",
        "x": grid.x.tolist(),
        "y": grid.y.tolist(),
        "z": np.round(z, 3).tolist(),
        "autocontour": False,
        "contours": {"start": low + step, "end": high - step / 2, "size": step, "coloring": "fill"},
        "colorscale": [[0, "var(--deep)"], [1, "var(--high)"]],
        "line": {"width": 0.7, "color": "var(--contour)", "smoothing": 0.6},
        "showscale": False,
        "hoverinfo": "skip",
    }


def _way(functions: Functions, label: str, run: Run) -> list[dict[str, Any]]:
    """The way and, at its end, where the optimizer is; the page's slider cuts both at a number of evaluations."""
    x, y, counts = run.path[:, 0].tolist(), run.path[:, 1].tolist(), run.evaluations.tolist()
    values = [significant(value, 4) for value in run.value]
    way = line(functions.results, label, x, y)
    way |= {
        "mode": "lines+markers",
        "marker": {"size": 3.2, "color": way["line"]["color"]},
        "customdata": [[int(count), value] for count, value in zip(counts, values, strict=True)],
        "hovertemplate": f"{trace_name(label)}<br>%{{customdata[0]}} evaluations, "
        "loss %{customdata[1]}<extra></extra>",
        "meta": {"evaluations": counts},
    }
    head = {
        "type": "scatter",
        "mode": "markers",
        "x": x[-1:],
        "y": y[-1:],
        "name": way["name"],
        "marker": {
            "size": 10,
            "color": way["line"]["color"],
            "line": {"width": 1.6, "color": "var(--paper)"},
        },
        "hoverinfo": "skip",
        "meta": {"head": True},
    }
    return [way, head]


def _minima(problem: Problem) -> list[dict[str, Any]]:
    if problem.minima.shape[1] != 2:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": problem.minima[:, 0].tolist(),
            "y": problem.minima[:, 1].tolist(),
            "marker": {
                "symbol": "star",
                "size": 13,
                "color": "var(--star)",
                "line": {"width": 1, "color": "var(--ink)"},
            },
            "hovertemplate": "minimum (%{x:.4g}, %{y:.4g})<extra></extra>",
        }
    ]


def _decades(traces: Sequence[dict[str, Any]]) -> int | str:
    """Ticks of a logarithmic axis: at powers of ten, and within two of them at twice and five times those too."""
    counts = [count for trace in traces for count in trace["x"]]
    return 1 if not counts or max(counts) > 100 * min(counts) else "D2"


def _curve(run: Run, shift: float) -> tuple[Floats, Floats]:
    """Evaluations and loss above ``shift`` as far as logarithmic axes can show them."""
    known = np.isfinite(run.value) & (run.evaluations > 0)
    return run.evaluations[known], np.maximum(run.value[known] - shift, LEAST)


def _median(curves: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Over the evaluations that all curves have; between records the loss is the last one recorded."""
    if len(curves) == 1:
        return curves[0]
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    counts = np.unique(np.concatenate([x for x, _ in curves]))
    counts = counts[(counts >= first) & (counts <= last)]
    found = [y[np.searchsorted(x, counts, side="right") - 1] for x, y in curves]
    return counts, np.median(found, axis=0)


def _plane(data: list[dict[str, Any]], grid: Grid, height: int) -> dict[str, Any]:
    bare = _axis() | {"showgrid": False, "zeroline": False, "nticks": 6}
    layout = _layout(height) | {
        "xaxis": bare | {"range": [float(grid.x[0]), float(grid.x[-1])]},
        "yaxis": bare | {"range": [float(grid.y[0]), float(grid.y[-1])]},
    }
    return {"data": data, "layout": layout}


def _axis() -> dict[str, Any]:
    return {
        "gridcolor": "var(--grid)",
        "linecolor": "var(--grid)",
        "zeroline": False,
        "ticklen": 4,
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
        "hoverlabel": {
            "bgcolor": "var(--paper)",
            "bordercolor": "var(--grid)",
            "font": {"color": "var(--ink)"},
        },
    }

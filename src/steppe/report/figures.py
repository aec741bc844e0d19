"""The figures of the report, as plain plotly specifications.

Colours are written as ``var(--name)``; the page's script puts in the style sheet's values, so figures follow the light
and the dark scheme and the printer.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from html import escape
from typing import Any

import numpy as np
import polars as pl

from steppe.report.cells import color
from steppe.report.funds import Funds
from steppe.report.results import NO_MODEL, Results

__all__ = [
    "Figure",
    "cumulative_rank_ic",
    "decay",
    "fund_excess",
    "layer_bars",
    "layer_values",
    "line",
    "plot_layout",
    "relative_value",
    "step_curves",
    "trace_name",
    "training_curves",
]

DASHES = ("solid", "dash", "dot")
"""Colours repeat after twelve candidates; the line's dash tells the rounds apart."""

COLORS = 12

METRICS = {
    "validation_ic": "Validation IC",
    "validation_ir": "Validation IC to its deviation (IR)",
    "validation_rank_ic": "Validation RankIC",
    "train_loss": "Training loss",
}

STEP_METRICS = {
    "step_cosine": ("Cosine of g and p", "normal"),
    "step_surrogate_gap": ("Surrogate gap L(w + e) − L(w)", "tozero"),
}
"""Title, and whether the axis shows zero: of the gap it is the sign that counts."""


@dataclass(frozen=True)
class Figure:
    """A plotly figure and the words around it.

    Attributes:
        title: stands over the figure.
        spec: ``data`` and ``layout``, JSON-able.
        optimizer: whose figure it is, if it shows one optimizer only.
        curves: its x axis can be switched between epochs and costs (traces carry all of them in ``meta``).
        ways: a slider cuts its ways at a number of evaluations (traces carry theirs in ``meta``).
    """

    title: str
    spec: Mapping[str, Any]
    optimizer: str = ""
    curves: bool = False
    ways: bool = False

    def json(self) -> str:
        """The specification, safe to stand inside a script element."""
        return json.dumps(_plain(self.spec), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def training_curves(results: Results) -> dict[str, list[Figure]]:
    """Part -> the validation curves of all optimizers over epochs; the kept epoch is marked."""
    metrics = [m for m in METRICS if m in results.history.columns and m != "train_loss"][:2]
    metrics = metrics or [m for m in results.history.columns if m.startswith("validation_")][:2]
    begun = set(results.history["part"])
    return {
        part: [
            _curve(results, part, metric, METRICS.get(metric, metric.replace("_", " "))) for metric in metrics
        ]
        for part in results.parts
        if metrics and part in begun
    }


def step_curves(results: Results) -> list[Figure]:
    """What optimizers tell of their steps over epochs, of those that tell it; one figure per part and measure."""
    several = len(results.parts) > 1
    told = [metric for metric in STEP_METRICS if metric in results.history.columns]
    known = {metric: set(results.history.drop_nulls(metric)["part"]) for metric in told}
    figures = []
    for part, metric in itertools.product(results.parts, told):
        if part in known[metric]:
            title, rangemode = STEP_METRICS[metric]
            title = f"{title}, {part}" if several else title
            figures.append(_curve(results, part, metric, title, height=220, rangemode=rangemode))
    return figures


def cumulative_rank_ic(results: Results) -> Figure:
    """RankIC summed over the test dates, mean over seeds."""
    traces = []
    for label in results.shown:
        daily = _mean_over_seeds(results.series(label, results.final))
        traces.append(line(results, label, results.dates, np.cumsum(np.nan_to_num(daily)).tolist()))
    return Figure("Cumulative RankIC", {"data": traces, "layout": plot_layout(x="date")})


def layer_bars(results: Results) -> list[Figure]:
    """Per optimizer: annualised excess of every layer over the equal-weight universe; one scale for all."""
    excess = {label: results.layer_excess(label) for label in results.shown}
    values = [100 * value for layers in excess.values() for value in layers.values() if math.isfinite(value)]
    extent = [min([0.0, *values]) * 1.08, max([0.0, *values]) * 1.08]
    return [
        Figure(
            label,
            {
                "data": [
                    {
                        "type": "bar",
                        "x": list(layers),
                        "y": [100 * value for value in layers.values()],
                        "marker": {"color": _color(results, label)},
                        "hovertemplate": "layer %{x}: %{y:.1f} % p.a.<extra></extra>",
                    }
                ],
                "layout": plot_layout(height=190, y_range=extent) | {"bargap": 0.25},
            },
            optimizer=label,
        )
        for label, layers in excess.items()
        if layers
    ]


def layer_values(results: Results) -> list[Figure]:
    """Per optimizer: net value of every layer; one scale for all."""
    curves = {label: results.layer_returns(label) for label in results.shown}
    values = {
        label: {layer: _net_value(returns) for layer, returns in sorted(layers.items())}
        for label, layers in curves.items()
        if layers
    }
    every = [v for layers in values.values() for curve in layers.values() for v in curve]
    extent = [min(every) * 0.97, max(every) * 1.03] if every else None
    figures = []
    for label, layers in values.items():
        most = max(layers)
        traces = [
            {
                "type": "scatter",
                "mode": "lines",
                "x": _period_ends(results.layer_dates(label)),
                "y": curve,
                "name": f"layer {layer}" if layer else "equal weight",
                "line": {"width": 2 if layer == most else 1.2, "color": _layer_color(layer, most)}
                | ({} if layer else {"dash": "dot", "width": 1.6}),
                "hovertemplate": "%{y:.3f}",
            }
            for layer, curve in layers.items()
        ]
        layout = plot_layout(x="date", height=210, y_range=extent)
        figures.append(Figure(label, {"data": traces, "layout": layout}, optimizer=label))
    return figures


def relative_value(results: Results) -> Figure:
    """Net value of the top layer's period returns less those of the equal-weight universe, all optimizers."""
    traces = []
    for label in results.shown:
        returns = results.layer_returns(label)
        if returns:
            excess = returns[max(returns)] - returns[0]
            dates = _period_ends(results.layer_dates(label))
            traces.append(line(results, label, dates, _net_value(excess)))
    return Figure(
        "Top layer against the equal-weight universe",
        {"data": traces, "layout": plot_layout(x="date")},
    )


def decay(results: Results) -> Figure:
    """Mean RankIC of the final score by how far ahead it looks, mean over seeds."""
    traces = []
    for label in results.shown:
        points = results.decay_of(label)
        if points:
            traces.append(
                line(results, label, list(points), list(points.values())) | {"mode": "lines+markers"}
            )
    layout = plot_layout(x="sessions ahead")
    layout["yaxis"]["rangemode"] = "tozero"
    return Figure("RankIC by horizon", {"data": traces, "layout": layout})


def fund_excess(funds: Funds) -> list[Figure]:
    """Per index: the compounded daily excess of every fund over its index, after costs."""
    figures = []
    for index in funds.indices:
        traces = []
        for label in funds.labels:
            sessions, excess = funds.excess(index, label)
            if sessions:
                value = (100 * (np.cumprod(1 + excess) - 1)).tolist()
                traces.append(line(funds.results, label, sessions, value) | {"hovertemplate": "%{y:+.2f} %"})
        if traces:
            figures.append(
                Figure(f"Excess over {index}, %", {"data": traces, "layout": plot_layout(x="date")})
            )
    return figures


def _curve(
    results: Results, part: str, metric: str, title: str, height: int = 300, rangemode: str = "normal"
) -> Figure:
    traces: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    best = {trial.id: trial.best_epoch for trial in results.trials}
    rows = results.history.filter(pl.col("part") == part).drop_nulls(metric)
    for label in results.optimizers:
        seeds = [
            group.sort("epoch")
            for _, group in rows.filter(pl.col("optimizer") == label).group_by("trial", maintain_order=True)
        ]
        if not seeds:
            continue
        several = len(seeds) > 1
        for group in seeds:
            trace = line(results, label, group["epoch"].to_list(), group[metric].to_list())
            if not several:
                trace |= {"mode": "lines+markers", "marker": {"size": 4}}
            else:
                trace |= {"opacity": 0.45, "line": trace["line"] | {"width": 1}, "hoverinfo": "skip"}
                del trace["hovertemplate"]
            traces.append(trace | {"meta": _axes(group)})
            kept.append(
                _kept(results, label, group.filter(pl.col("epoch") == (best[group["trial"][0]] or 0)), metric)
            )
        if several:
            # a mean over fewer seeds than before would jump where one stops
            shared = min(group.height for group in seeds)
            together = pl.concat([group.head(shared) for group in seeds])
            averaged = together.group_by("epoch").agg(pl.selectors.numeric().mean()).sort("epoch")
            trace = line(results, label, averaged["epoch"].to_list(), averaged[metric].to_list())
            traces.append(trace | {"meta": _axes(averaged)})
    layout = plot_layout(x="epoch", height=height)
    layout["yaxis"]["rangemode"] = rangemode
    if rows["epoch"].n_unique() <= 12:
        layout["xaxis"]["dtick"] = 1  # no ticks between epochs
    # dots last, so that no line runs over them
    return Figure(title, {"data": traces + kept, "layout": layout}, curves=True)


def _kept(results: Results, label: str, group: pl.DataFrame, metric: str) -> dict[str, Any]:
    """A dot at the epoch whose weights a trial keeps; ``group`` is that epoch's row, or empty."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": group["epoch"].to_list(),
        "y": group[metric].to_list(),
        "name": trace_name(label),
        "marker": {
            "color": _color(results, label),
            "size": 9,
            "line": {"width": 1.5, "color": "var(--paper)"},
        },
        "hoverinfo": "skip",
        "meta": _axes(group),
    }


def trace_name(label: str) -> str:
    """A label as plotly takes it: plotly reads a name as markup."""
    return escape(label)


def _axes(group: pl.DataFrame) -> dict[str, list[float]]:
    return {
        "epoch": group["epoch"].to_list(),
        "gradient evaluations": group["gradient_evaluations"].to_list(),
        "seconds": group["seconds"].to_list(),
    }


def line(results: Results, label: str, x: Sequence[Any], y: Sequence[float | None]) -> dict[str, Any]:
    """A trace in the colour and the dash that an optimizer has on the whole page."""
    order = results.optimizers.index(label) if label in results.optimizers else 1
    dash = "dot" if label == NO_MODEL else DASHES[max(order - 1, 0) // COLORS % len(DASHES)]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": y,
        "name": trace_name(label),
        "line": {"color": _color(results, label), "width": 2.4 if order == 0 else 2, "dash": dash},
        "hovertemplate": "%{y:.4g}",
    }


def plot_layout(x: str = "", height: int = 300, y_range: Sequence[float] | None = None) -> dict[str, Any]:
    """The layout of a figure on this page; ``x`` is the title of its axis, ``"date"`` for dates."""
    axis = {
        "gridcolor": "var(--grid)",
        "linecolor": "var(--grid)",
        "zerolinecolor": "var(--zero)",
        "zerolinewidth": 1,
        "tickcolor": "var(--grid)",
        "ticklen": 4,
        "automargin": True,
    }
    return {
        "height": height,
        "margin": {"l": 8, "r": 10, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--soft)", "size": 12, "family": "system-ui, sans-serif"},
        "showlegend": False,
        "hovermode": "x unified" if x else "closest",
        "hoverlabel": {
            "bgcolor": "var(--paper)",
            "bordercolor": "var(--grid)",
            "font": {"color": "var(--ink)"},
        },
        "xaxis": axis
        | {"showgrid": False}
        | (
            {"type": "date", "nticks": 6, "tickangle": 0, "tickformat": "%b\n%Y"}
            if x == "date"
            else {"title": {"text": x}}
            if x
            else {"dtick": 1}
        ),
        "yaxis": axis | ({"range": list(y_range)} if y_range else {}),
    }


def _color(results: Results, label: str) -> str:
    return f"var({color(results, label)})"


def _layer_color(layer: int, most: int) -> str:
    """From ochre (lowest scores) over grey to blue (highest); equal weight in the colour of text."""
    if layer == 0:
        return "var(--ink)"
    stops = np.array([[191, 114, 20], [170, 170, 166], [26, 101, 180]], dtype=float)
    at = 2 * (layer - 1) / max(most - 1, 1)
    low = min(int(at), 1)
    red, green, blue = (stops[low] + (at - low) * (stops[low + 1] - stops[low])).round().astype(int)
    return f"rgb({red},{green},{blue})"


def _period_ends(dates: Sequence[date]) -> list[date]:
    """The dates and one more: a net value starts at 1 on the first, and the last period needs an end."""
    return [*dates, dates[-1] + (dates[-1] - dates[-2])] if len(dates) > 1 else [*dates, *dates]


def _net_value(returns: np.ndarray) -> list[float]:
    return [1.0, *np.cumprod(1 + returns).tolist()]


def _mean_over_seeds(table: np.ndarray) -> np.ndarray:
    known = np.isfinite(table)
    count = known.sum(axis=0)
    total = np.where(known, table, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def _plain(value: Any) -> Any:
    """JSON-able: dates as text, five significant digits, None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value.isoformat() if isinstance(value, date) else value

"""The single-factor test: does a score order next week's returns?

RankIC and IC per date, ten layers held for a week, and the same after industry and size are taken out. The
conventions are those of the published test the factor comes from: weekly dates, a 10-session label next to a
5-session holding period, both entered at the vwap of t + 1, equal weights, NO costs. One of them looks ahead:
stocks that cannot be bought at t + 1 (no trade, or an open at the upper limit) are dropped before ranking,
which is not known at t. Judge an investable result by a backtest, not by this test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from steppe.core.errors import DataError, SpecError
from steppe.quant import performance
from steppe.quant.labels import forward_returns
from steppe.quant.panel import Panel
from steppe.quant.ranking import correlation, rank_ic, ranks

__all__ = [
    "FactorTest",
    "factor_test",
    "layer_of",
    "neutralised",
    "stderr",
]

MAD = 5.0
"""Scores beyond this many median absolute deviations are pulled in before neutralising (published: 5)."""


@dataclass(frozen=True)
class FactorTest:
    """What `factor_test` found.

    Attributes:
        ic: one row per evaluation date: date, stocks (scored, buyable, with a label), ic, rank_ic (label
            horizon), rank_ic_5 (holding period; named after it), rank_ic_neutral. Null where skipped.
        layers: date, layer, ret: return over the holding period after the date; layer 1 has the lowest
            scores, the last layer the highest, layer 0 is the equal-weight universe.
        skipped: date, measure, reason: every date a measure could not be taken on.
        summary: see `factor_test`.
    """

    ic: pl.DataFrame
    layers: pl.DataFrame
    skipped: pl.DataFrame
    summary: dict[str, float]


def neutralised(
    scores: ArrayLike, industry: NDArray[np.int16], float_cap: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Scores without what industry and log float cap explain, per date.

    Scores are pulled in to the median +- 5 median absolute deviations, then the residual of the least-squares
    regression on industry dummies and log float cap is taken (solved exactly by demeaning within industries
    first). Unknown industry (-1) is a group of its own.

    Args:
        scores: ``[D, N]``, NaN outside the universe.
        industry: ``[D, N]``.
        float_cap: ``[D, N]``, > 0; NaN unknown.

    Returns:
        ``[D, N]``; NaN where the score or the float cap is.
    """
    x = np.asarray(scores, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.log(np.asarray(float_cap, dtype=np.float64))
    valid = np.isfinite(x) & np.isfinite(size)
    centre = _median(np.where(valid, x, np.nan))
    spread = _median(np.where(valid, np.abs(x - centre), np.nan))
    # more than half the stocks tied: there is no spread to judge an outlier by
    reach = np.where(spread > 0, MAD * spread, np.inf)
    x = np.clip(x, centre - reach, centre + reach)
    groups = int(industry.max(initial=-1)) + 2
    cell = ((industry + 1).astype(np.int64) + groups * np.arange(len(x))[:, None])[valid]
    count = np.maximum(np.bincount(cell, minlength=groups * len(x)), 1)

    def within(a: NDArray[np.float64]) -> NDArray[np.float64]:
        out = np.zeros_like(a)
        flat = a[valid]
        out[valid] = flat - (np.bincount(cell, flat, minlength=len(count)) / count)[cell]
        return out

    x, size = within(x), within(size)
    explained = np.einsum("dn,dn->d", size, size)
    slope = np.divide(np.einsum("dn,dn->d", x, size), explained, out=np.zeros(len(x)), where=explained > 1e-9)
    return np.where(valid, x - slope[:, None] * size, np.nan)


def layer_of(scores: ArrayLike, layers: int) -> NDArray[np.int64]:
    """The layer 1..layers of each finite score of ``[D, N]`` by rank, 0 where NaN.

    Rank r of n goes to layer ``floor((r - 1/2) / n * layers) + 1``; tied scores share their average rank and
    so their layer: the result depends on neither the order of the stocks nor the scale of the scores.
    """
    rank = ranks(scores)
    count = np.maximum(np.isfinite(rank).sum(axis=1, keepdims=True), 1)
    layer = np.floor((rank - 0.5) / count * layers) + 1
    return np.where(np.isfinite(layer), np.minimum(layer, layers), 0).astype(np.int64)


def stderr(series: ArrayLike, lags: int = 0) -> float:
    """Standard error of the mean of a series that is correlated up to `lags` (Newey and West 1987, eq. 5).

    ``sqrt((g_0 + 2 sum_l (1 - l / (lags + 1)) g_l) / n)`` with the autocovariances g; lags 0 is std / sqrt(n)
    (ddof 1).
    """
    x = np.asarray(series, dtype=np.float64)
    n = len(x)
    if n < 2:
        return float("nan")
    d = x - x.mean()
    total = d @ d + 2 * sum(
        (1 - lag / (lags + 1)) * (d[lag:] @ d[:-lag]) for lag in range(1, min(lags, n - 1) + 1)
    )
    return float(np.sqrt(total / (n - 1) / n))


def factor_test(
    scores: ArrayLike,
    panel: Panel,
    rows: ArrayLike,
    *,
    layers: int = 10,
    horizon: int = 10,
    holding: int = 5,
    neutralise: bool = False,
) -> FactorTest:
    """Test one factor. No costs; stocks not buyable at t + 1 are left out (see the module: this looks ahead).

    ICs are taken on every date. Layers are formed on the dates that lie at least `holding` sessions apart,
    counted from the first, so that holding periods never overlap: all of them, when dates are weekly.

    The summary holds, for rank_ic, rank_ic_5 and rank_ic_neutral each: the mean; ``_std`` over dates (ddof
    1); ``_ir``, mean / std, the ICIR, not annualised; ``_positive``, share of dates above 0; ``_stderr`` of
    the mean, corrected for labels that overlap (`stderr`). For IC the mean ``ic``. For the top layer,
    annualised with 252 sessions: ``top_annual_return``, ``top_annual_excess`` over the equal-weight universe
    (period differences compounded), ``top_tracking_error``, ``top_information_ratio`` = annual excess /
    tracking error, ``top_max_drawdown`` of the excess, ``top_monthly_win_rate`` (share of calendar months
    with positive excess), ``top_turnover``, the mean of sum_i abs(w_i - w_i drifted) per rebalance
    (two-sided: 2 is a full exchange); further ``universe_annual_return``, and the counts ``dates``,
    ``layer_dates`` and ``stocks`` (mean per date).

    Args:
        scores: ``[D, N]``, higher is better; NaN outside the universe of the date.
        panel: the market.
        rows: ``[D]`` increasing indices into ``panel.dates``, the evaluation dates.
        layers: layers by score; published 10.
        horizon: sessions of the label of ic, rank_ic and rank_ic_neutral; published 10.
        holding: sessions a layer is held, and the return of ``rank_ic_5``; published 5.
        neutralise: form layers from scores neutralised to industry and size, as the published test does. Off
            by default (ours): a layer then is what the score itself would buy.

    Raises:
        DataError: shapes that do not fit, infinite scores, or a measure that cannot be taken on any date. On
            single dates a measure that cannot be taken (fewer than 2 x layers stocks, constant scores, a layer
            left empty by ties, a return beyond the panel's end) is skipped and listed in `FactorTest.skipped`;
            so is rank_ic_neutral throughout (NaN in the summary) for a panel without float caps.
        SpecError: fewer than two layers.
    """
    x, at = _checked(scores, panel, rows, layers)
    tomorrow = np.minimum(at + 1, len(panel.dates) - 1)  # beyond the end the return is NaN anyway
    buyable = panel.traded[tomorrow] & ~panel.limit_up[tomorrow]
    label = np.where(buyable, forward_returns(panel, horizon, rows=at), np.nan)
    held = np.where(buyable, forward_returns(panel, holding, rows=at), np.nan)
    scored = np.where(np.isfinite(label) | np.isfinite(held), x, np.nan)
    neutral = neutralised(scored, panel.industry[at], panel.float_cap[at])

    name = f"rank_ic_{holding}"
    pairs = {"rank_ic": (x, label), name: (x, held), "rank_ic_neutral": (neutral, label)}
    series = {key: rank_ic(*pair) for key, pair in pairs.items()} | {"ic": correlation(x, label)}
    dates = panel.dates[at]
    skipped: list[tuple[np.datetime64, str, str]] = []
    for key, pair in (pairs | {"ic": (x, label)}).items():
        count = _count(*pair)
        known = at + 1 + (holding if key == name else horizon) < len(panel.dates)
        bad = ~known | (count < 2 * layers) | ~np.isfinite(series[key])
        series[key][bad] = np.nan
        skipped += [
            (dates[d], key, _reason(bool(known[d]), int(count[d]), 2 * layers)) for d in np.flatnonzero(bad)
        ]
        if bad.all() and key != "rank_ic_neutral":  # a panel may have no float cap
            raise DataError(f"{key} cannot be taken on any of {len(at)} dates: {skipped[-1][2]}.")
    ic = pl.DataFrame(
        {"date": dates, "stocks": _count(x, label)}
        | {key: series[key] for key in ("ic", "rank_ic", name, "rank_ic_neutral")}
    ).fill_nan(None)

    summary = {
        "dates": float(len(at)),
        "stocks": float(_count(x, label).mean()),
        "ic": float(np.nanmean(series["ic"])),
    }
    spacing = int(np.diff(at).min()) if len(at) > 1 else horizon
    for key in pairs:
        sessions = holding if key == name else horizon
        summary |= _summary(key, series[key], lags=-(-sessions // spacing) - 1)

    apart = _apart(at, holding)
    known = at[apart] + 1 + holding < len(panel.dates)
    chosen = (neutral if neutralise else x)[apart]
    frame, top = _layer_test(chosen, held[apart], dates[apart], known, layers, holding, skipped)
    return FactorTest(
        ic=ic,
        layers=frame,
        skipped=pl.DataFrame(
            {
                "date": np.array([d for d, _, _ in skipped], dtype="datetime64[D]"),
                "measure": [m for _, m, _ in skipped],
                "reason": [r for _, _, r in skipped],
            },
            schema={"date": pl.Date, "measure": pl.String, "reason": pl.String},
        ),
        summary=summary | top,
    )


def _layer_test(
    scores: NDArray[np.float64],
    held: NDArray[np.float32],
    dates: NDArray[np.datetime64],
    known: NDArray[np.bool_],
    layers: int,
    holding: int,
    skipped: list[tuple[np.datetime64, str, str]],
) -> tuple[pl.DataFrame, dict[str, float]]:
    """The layers table and the top layer's figures; dates that cannot be layered are added to `skipped`."""
    valid = np.isfinite(scores) & np.isfinite(held)
    count = valid.sum(axis=1)
    layer = layer_of(np.where(valid, scores, np.nan), layers)
    cell = (layer + (layers + 1) * np.arange(len(layer))[:, None]).ravel()
    size = np.bincount(cell, minlength=(layers + 1) * len(layer)).reshape(-1, layers + 1)
    total = np.bincount(cell, np.where(valid, held, 0.0).ravel(), size.size).reshape(size.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        returns = total / size
        returns[:, 0] = total.sum(axis=1) / count  # cell 0 held the stocks outside the universe
    good = known & (count >= 2 * layers) & (size[:, 1:] > 0).all(axis=1)
    for d in np.flatnonzero(~good):
        skipped.append((dates[d], "layers", _reason(bool(known[d]), int(count[d]), 2 * layers)))
    if not good.any():
        raise DataError(f"layers cannot be formed on any of {len(dates)} dates: {skipped[-1][2]}.")
    returns, dates = returns[good], dates[good]
    frame = pl.DataFrame(
        {
            "date": np.repeat(dates, layers + 1),
            "layer": np.tile(np.arange(layers + 1), len(dates)),
            "ret": returns.ravel(),
        }
    )
    best, universe = returns[:, layers], returns[:, 0]
    year = performance.SESSIONS_PER_YEAR / holding
    return frame, {
        "layer_dates": float(len(dates)),
        "universe_annual_return": performance.annual_return(universe, year),
        "top_annual_return": performance.annual_return(best, year),
        "top_annual_excess": performance.annual_excess(best, universe, year),
        "top_tracking_error": performance.tracking_error(best, universe, year),
        "top_information_ratio": performance.information_ratio(best, universe, year),
        "top_max_drawdown": performance.max_drawdown(best - universe),
        "top_monthly_win_rate": performance.monthly_win_rate(best, universe, dates),
        "top_turnover": _turnover(layer[good] == layers, held[good]),
    }


def _turnover(chosen: NDArray[np.bool_], held: NDArray[np.float32]) -> float:
    """Mean over rebalances of sum_i abs(new weight - old weight drifted with the returns held); NaN for one date."""
    if len(chosen) < 2:
        return float("nan")
    weight = chosen / chosen.sum(axis=1, keepdims=True)
    drifted = weight * (1 + np.where(chosen, held, 0.0))
    drifted /= drifted.sum(axis=1, keepdims=True)
    return float(np.abs(weight[1:] - drifted[:-1]).sum(axis=1).mean())


def _checked(
    scores: ArrayLike, panel: Panel, rows: ArrayLike, layers: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    if layers < 2:
        raise SpecError(f"layers {layers}: at least 2.")
    at = np.asarray(rows)
    if at.ndim != 1 or not len(at) or not np.issubdtype(at.dtype, np.integer):
        raise DataError("rows must be a non-empty list of integer indices into panel.dates.")
    if np.any(np.diff(at) <= 0) or at[0] < 0 or at[-1] >= len(panel.dates):
        raise DataError(f"rows must increase strictly and lie within 0..{len(panel.dates) - 1}.")
    x = np.asarray(scores, dtype=np.float64)
    if x.shape != (len(at), panel.shape[1]):
        raise DataError(
            f"scores are {x.shape}, expected {(len(at), panel.shape[1])} [evaluation dates, stocks]."
        )
    if np.isinf(x).any():
        day = panel.dates[at[np.isinf(x).any(axis=1)][0]]
        raise DataError(f"scores of {day} are infinite: mark what is outside the universe with NaN.")
    return x, at.astype(np.int64)


def _apart(rows: NDArray[np.int64], sessions: int) -> NDArray[np.int64]:
    """Positions of the rows that lie at least `sessions` after the one kept before."""
    kept = [0]
    for position in range(1, len(rows)):
        if rows[position] - rows[kept[-1]] >= sessions:
            kept.append(position)
    return np.array(kept)


def _summary(key: str, series: NDArray[np.float64], lags: int) -> dict[str, float]:
    x = series[np.isfinite(series)]
    if not len(x):
        return dict.fromkeys(
            (key, *(f"{key}_{part}" for part in ("std", "ir", "positive", "stderr"))), float("nan")
        )
    std = float(x.std(ddof=1)) if len(x) > 1 else float("nan")
    return {
        key: float(x.mean()),
        f"{key}_std": std,
        f"{key}_ir": float(x.mean() / std) if std > 0 else float("nan"),
        f"{key}_positive": float((x > 0).mean()),
        f"{key}_stderr": stderr(x, lags),
    }


def _reason(known: bool, stocks: int, needed: int) -> str:
    if not known:
        return "its return ends after the panel does"
    if stocks < needed:
        return f"{stocks} stocks with a score and a return, {needed} needed"
    return "scores (or returns) are constant or tied so that a layer is empty"


def _count(x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.int64]:
    return np.asarray((np.isfinite(x) & np.isfinite(y)).sum(axis=1))


def _median(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median per row without NaN, ``[D, 1]``; NaN for an empty row (numpy's would warn)."""
    ordered = np.sort(x, axis=1)
    count = np.isfinite(x).sum(axis=1)[:, None]
    low, high = np.maximum((count - 1) // 2, 0), count // 2
    return (
        np.take_along_axis(ordered, low, axis=1)
        + np.take_along_axis(ordered, np.minimum(high, x.shape[1] - 1), axis=1)
    ) / 2

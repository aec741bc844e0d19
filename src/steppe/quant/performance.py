"""Performance of a return series. Every function takes simple returns per period, ``[periods]``.

Returns compound: V_k = prod_{j <= k} (1 + r_j). A year has 252 sessions, so `per_year` is 252 for daily
returns and 252 / 5 for five-session ones. The excess over a benchmark is the per-period difference d_k = r_k
- b_k, and an excess net value compounds those differences: of the possible definitions the one that the
published index-enhancement tables fit.
"""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from steppe.core.errors import DataError

__all__ = [
    "SESSIONS_PER_YEAR",
    "annual_excess",
    "annual_return",
    "by_year",
    "calmar",
    "excess_metrics",
    "information_ratio",
    "max_drawdown",
    "monthly_returns",
    "monthly_win_rate",
    "net_value",
    "tracking_error",
    "volatility",
]

SESSIONS_PER_YEAR = 252


def net_value(returns: ArrayLike) -> NDArray[np.float64]:
    """V_k = prod_{j <= k} (1 + r_j), ``[periods]``; the starting value 1 is not part of it."""
    series = np.asarray(returns, dtype=np.float64)
    if series.ndim != 1 or not len(series) or not np.isfinite(series).all():
        raise DataError(
            f"returns must be a non-empty series of finite numbers, not an array of {series.shape}."
        )
    return np.asarray(np.cumprod(1 + series))


def annual_return(returns: ArrayLike, per_year: float = SESSIONS_PER_YEAR) -> float:
    """V_K ** (per_year / K) - 1 over K periods; -1 for a series that lost everything."""
    value = net_value(returns)
    return float(max(value[-1], 0.0) ** (per_year / len(value)) - 1)


def volatility(returns: ArrayLike, per_year: float = SESSIONS_PER_YEAR) -> float:
    """std(r) sqrt(per_year), sample standard deviation (ddof 1); NaN for a single period."""
    series = np.asarray(returns, dtype=np.float64)
    return float(np.std(series, ddof=1) * np.sqrt(per_year)) if len(series) > 1 else float("nan")


def max_drawdown(returns: ArrayLike) -> float:
    """max_k (1 - V_k / max(1, V_1 .. V_k)): the largest loss from a peak, a number >= 0."""
    value = net_value(returns)
    return float(np.max(1 - value / np.maximum(np.maximum.accumulate(value), 1.0)))


def annual_excess(returns: ArrayLike, benchmark: ArrayLike, per_year: float = SESSIONS_PER_YEAR) -> float:
    """`annual_return` of the differences d = r - b."""
    return annual_return(_excess(returns, benchmark), per_year)


def tracking_error(returns: ArrayLike, benchmark: ArrayLike, per_year: float = SESSIONS_PER_YEAR) -> float:
    """`volatility` of the differences d = r - b."""
    return volatility(_excess(returns, benchmark), per_year)


def information_ratio(returns: ArrayLike, benchmark: ArrayLike, per_year: float = SESSIONS_PER_YEAR) -> float:
    """`annual_excess` / `tracking_error`; NaN where the tracking error is 0 or unknown."""
    excess = _excess(returns, benchmark)
    return _ratio(annual_return(excess, per_year), volatility(excess, per_year))


def calmar(returns: ArrayLike, benchmark: ArrayLike, per_year: float = SESSIONS_PER_YEAR) -> float:
    """`annual_excess` / `max_drawdown` of the differences d = r - b; NaN without a drawdown."""
    excess = _excess(returns, benchmark)
    return _ratio(annual_return(excess, per_year), max_drawdown(excess))


def monthly_returns(returns: ArrayLike, dates: NDArray[np.datetime64]) -> NDArray[np.float64]:
    """The periods compounded by the calendar month of their date, ``[months that have a period]``.

    Args:
        returns: ``[periods]``.
        dates: ``[periods]`` datetime64, increasing.
    """
    series = np.asarray(returns, dtype=np.float64)
    months = np.asarray(dates).astype("datetime64[M]")
    if series.shape != months.shape or not len(series):
        raise DataError(f"{len(series)} returns for {len(months)} dates.")
    starts = np.flatnonzero(np.r_[True, months[1:] != months[:-1]])
    return np.asarray(np.multiply.reduceat(1 + series, starts) - 1)


def monthly_win_rate(returns: ArrayLike, benchmark: ArrayLike, dates: NDArray[np.datetime64]) -> float:
    """Share of calendar months whose compounded differences d = r - b are above 0."""
    return float(np.mean(monthly_returns(_excess(returns, benchmark), dates) > 0))


def excess_metrics(
    returns: ArrayLike, benchmark: ArrayLike, dates: NDArray[np.datetime64]
) -> dict[str, float]:
    """The line of a published index-enhancement table, from daily returns.

    Args:
        returns: ``[sessions]`` of the portfolio.
        benchmark: ``[sessions]`` of its index.
        dates: ``[sessions]`` datetime64, increasing.

    Returns:
        annual_return, benchmark_annual_return, annual_excess, tracking_error, information_ratio,
        excess_max_drawdown, excess_calmar and monthly_win_rate, each as the function of that name defines it.
        The drawdown and the ratios are those of the differences d = r - b; NaN where a risk is 0 or unknown.

    Raises:
        DataError: series of different lengths, empty, or with a number that is not finite.
    """
    return {
        "annual_return": annual_return(returns),
        "benchmark_annual_return": annual_return(benchmark),
        "annual_excess": annual_excess(returns, benchmark),
        "tracking_error": tracking_error(returns, benchmark),
        "information_ratio": information_ratio(returns, benchmark),
        "excess_max_drawdown": max_drawdown(_excess(returns, benchmark)),
        "excess_calmar": calmar(returns, benchmark),
        "monthly_win_rate": monthly_win_rate(returns, benchmark, dates),
    }


def by_year(returns: ArrayLike, benchmark: ArrayLike, dates: NDArray[np.datetime64]) -> pl.DataFrame:
    """`excess_metrics` of each calendar year alone, and of the last year.

    A drawdown counts from the start of its year. A year the series covers in part is annualised like any
    other: `sessions` says how much of it there is.

    Args:
        returns: ``[sessions]`` of the portfolio.
        benchmark: ``[sessions]`` of its index.
        dates: ``[sessions]`` datetime64, increasing.

    Returns:
        period ("2017", ..., and "last 12 months", the last 252 sessions, where there are as many), sessions,
        and the keys of `excess_metrics`; undefined ratios are null.
    """
    ours, theirs, days = np.asarray(returns), np.asarray(benchmark), np.asarray(dates)
    if not len(ours) == len(theirs) == len(days):
        raise DataError(f"{len(ours)} returns, {len(theirs)} of the benchmark, {len(days)} dates.")
    years = days.astype("datetime64[Y]")
    periods = {str(year): years == year for year in np.unique(years)}
    if len(days) >= SESSIONS_PER_YEAR:
        periods["last 12 months"] = np.arange(len(days)) >= len(days) - SESSIONS_PER_YEAR
    return pl.DataFrame(
        [
            {"period": name, "sessions": int(chosen.sum())}
            | excess_metrics(ours[chosen], theirs[chosen], days[chosen])
            for name, chosen in periods.items()
        ]
    ).fill_nan(None)


def _excess(returns: ArrayLike, benchmark: ArrayLike) -> NDArray[np.float64]:
    ours, theirs = np.asarray(returns, dtype=np.float64), np.asarray(benchmark, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise DataError(
            f"{ours.shape} returns against a benchmark of {theirs.shape}: the periods must be the same."
        )
    return ours - theirs


def _ratio(gain: float, risk: float) -> float:
    return gain / risk if risk > 0 else float("nan")

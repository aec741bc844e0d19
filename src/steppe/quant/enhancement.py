"""From scores to an index-enhanced fund: weekly optimised portfolios, traded, and measured against the index.

For every date with scores the optimizer (`steppe.quant.portfolio`) gives the portfolio that a fund on the index
would want, from what is known at the close; `steppe.quant.backtest` trades it on the next session.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from steppe.core.errors import DataError
from steppe.quant.backtest import Backtest, backtest
from steppe.quant.bars import carried_closes
from steppe.quant.panel import Panel
from steppe.quant.performance import (
    SESSIONS_PER_YEAR,
    by_year,
    excess_metrics,
    tracking_error as tracking_error_of,
)
from steppe.quant.portfolio import IndexEnhancement, Limits, Market, Solution
from steppe.quant.risk_model import RiskModel
from steppe.quant.universe import index_weights, universe_mask

__all__ = ["Enhanced", "enhance", "index_returns", "member_returns"]

Array = NDArray[np.float64]

PUBLISHED: Final = Limits()
SEASONED: Final = 91
"""Calendar days since listing, about 63 sessions, before a stock's returns enter the risk model."""


@dataclass(frozen=True)
class Enhanced:
    """An index-enhanced fund over its life.

    Attributes:
        index: name of the index.
        weights: where the index's weights come from: "data", or "float_cap" of its members.
        benchmark: "price index", or "float-cap return of members" where the panel has no series of the index.
        copy_tracking_error: of the weights themselves, held without costs, against the benchmark: how well they are
            known. Part of any fund's tracking error that no optimizer can see.
        daily: date, ret (net of costs), benchmark.
        rebalances: date (of the fills), turnover (two-sided), held (stocks), cash, relaxed (the limits that gave
            way, empty if none; see `steppe.quant.portfolio.relaxation`), violation (the largest widening, in the
            unit of its limit), blocked (orders that could not be filled), objective. The first builds the
            portfolio from cash.
        yearly: `steppe.quant.performance.by_year`.
        summary: `steppe.quant.performance.excess_metrics`, and turnover (mean per rebalance, without the first),
            cost_annual (all costs, per year), rebalances (how many) and relaxed (on how many of them a limit gave
            way; a suspended stock beyond its own limit, which nobody can trade, does not count).
        capacity: what the orders would have been of the traded value of their session: see `enhance`.
        trades: the backtest itself, with the weights after every rebalance.
    """

    index: str
    weights: Literal["data", "float_cap"]
    benchmark: Literal["price index", "float-cap return of members"]
    copy_tracking_error: float
    daily: pl.DataFrame
    rebalances: pl.DataFrame
    yearly: pl.DataFrame
    summary: Mapping[str, float]
    capacity: Mapping[str, float]
    trades: Backtest


def enhance(
    panel: Panel,
    scores: ArrayLike,
    rows: ArrayLike,
    index: str,
    *,
    limits: Limits = PUBLISHED,
    risk_aversion: float | None = None,
    tracking_error: float | None = None,
    risk_model: RiskModel | None = None,
    cost: float = 0.002,
    delisting_loss: float = 0.0,
    assets: float = 1e8,
    end: str | np.datetime64 | None = None,
) -> Enhanced:
    """Run a fund that follows `scores` close to an index.

    At the close of each date the candidates are the stocks with a score, the index's and those held. Their
    scores are standardised; a candidate without one (a member or a holding outside the universe of the
    scores) is neutral, 0. Size is the z-score of log float cap over the candidates, 0 where unknown.

    Only what is known at the close is used: a stock suspended on the date is taken to stay so and is left as
    it is; the fills of the next session follow the real state (`steppe.quant.backtest.backtest`), and what
    is blocked there is kept and seen by the next decision. The fund starts in cash: its first portfolio is
    built without the turnover limit.

    The benchmark is the price index, without dividends, while the fund's are reinvested: in that part the
    excess is none of the scores' doing. Without a series of the index, it is the return of its members by the
    weights of the evening before, with dividends. The first session counts from the fund's fills; the benchmark's
    return on it is therefore that of its members from vwap to close.

    Args:
        panel: the market, T dates and N stocks.
        scores: ``[D, N]``, higher is better; NaN outside the universe of the date.
        rows: ``[D]`` increasing indices into ``panel.dates``, the dates of the scores.
        index: a name in ``panel.members`` or ``panel.weights``.
        limits: the published ones by default.
        risk_aversion, tracking_error: see `steppe.quant.portfolio.IndexEnhancement`; neither: the published
            linear programme, which knows no risk. Scores being standardised, the risk aversion is what one unit
            of active variance per year costs in standard deviations of the score (hundreds, for a tracking
            error of some per cent).
        risk_model: prepared once for several funds; by default one of every stock listed for 91 days. Only
            used with one of the two above.
        cost, delisting_loss: see `steppe.quant.backtest.backtest`.
        assets: value of the fund in currency units for `Enhanced.capacity`, which no result depends on: mean
            (participation) and 95th percentile (participation_95) over all orders after the first rebalance of
            order / traded value of the stock on the session of the fill. Ours: 100 million.
        end: last date; by default the last portfolio is held as long as the median one before it.

    Raises:
        DataError: scores that do not fit, a date without any score; an unknown index, or one without members
            or without a level of its series on some of the dates.
        SolverError: the optimizer failed; see `steppe.quant.portfolio`.
    """
    x, at = _checked(panel, scores, rows)
    weights, source = index_weights(panel, index)
    last = _last_row(panel, at, end)
    life = np.arange(at[0], max(last, at[-1] + 1))
    _require(
        panel, weights[life].sum(axis=1) > 0, life, f"index {index!r} has no members with a known weight"
    )
    members = member_returns(panel, weights, int(at[0]), last)
    published = index in panel.benchmarks
    market_returns = index_returns(panel, index, int(at[0]), last) if published else members
    if risk_aversion is None and tracking_error is None:
        risk_model = None
    elif risk_model is None:
        risk_model = RiskModel(panel, universe_mask(panel, min_age=SEASONED))
    desk = _Desk(panel, index, weights, dict(zip(at.tolist(), x, strict=True)), risk_model)
    program = {"risk_aversion": risk_aversion, "tracking_error": tracking_error}
    build = IndexEnhancement(replace(limits, turnover=2.0), **program)
    keep = IndexEnhancement(limits, **program)
    solutions: list[Solution] = []
    orders: list[Array] = []

    def decide(row: int, holdings: Array) -> Array:
        market = desk.market(row, holdings)
        solution = (keep if holdings.any() else build).solve(market)
        target = np.zeros_like(holdings)
        target[market.stocks] = solution.weights
        solutions.append(solution)
        orders.append(np.abs(target - holdings))
        return target

    trades = backtest(panel, at, decide, cost=cost, delisting_loss=delisting_loss, end=panel.dates[last])
    sessions = np.searchsorted(panel.dates, trades.dates)
    benchmark = market_returns[sessions]
    benchmark[0] = _from_fills(panel, weights[at[0]], int(at[0]) + 1)
    rebalances = pl.DataFrame(
        {
            "date": trades.fills["date"],
            "turnover": trades.turnover,
            "held": trades.fills["held"],
            "cash": trades.fills["cash"],
            "relaxed": [", ".join(r.limit for r in s.relaxed) for s in solutions],
            "violation": [max((r.by for r in s.relaxed), default=0.0) for s in solutions],
            "blocked": trades.fills["blocked_buys"] + trades.fills["blocked_sells"],
            "objective": [s.objective for s in solutions],
        }
    )
    summary = excess_metrics(trades.returns, benchmark, trades.dates) | {
        "turnover": float(trades.turnover[1:].mean()) if len(trades.turnover) > 1 else float("nan"),
        "cost_annual": float(trades.cost.sum() * SESSIONS_PER_YEAR / len(trades.returns)),
        "relaxed": float(sum(any(r.limit != "suspended" for r in s.relaxed) for s in solutions)),
        "rebalances": float(len(rebalances)),
    }
    return Enhanced(
        index=index,
        weights=source,
        benchmark="price index" if published else "float-cap return of members",
        copy_tracking_error=tracking_error_of(members[sessions[1:]], benchmark[1:]),
        daily=pl.DataFrame({"date": trades.dates, "ret": trades.returns, "benchmark": benchmark}),
        rebalances=rebalances,
        yearly=by_year(trades.returns, benchmark, trades.dates),
        summary=summary,
        capacity=_capacity(panel, at[: len(orders)] + 1, orders, assets),
        trades=trades,
    )


def index_returns(panel: Panel, index: str, first: int, last: int) -> Array:
    """Close-to-close returns of a price index on the sessions after row `first`, to row `last`.

    Returns:
        ``[T]``, NaN on all other sessions.

    Raises:
        DataError: a level is unknown on one of the dates.
    """
    rows = np.arange(first, last + 1)
    level = np.asarray(panel.benchmarks[index][rows], dtype=np.float64)
    _require(panel, np.isfinite(level) & (level > 0), rows, f"index {index!r} has no level")
    out = np.full(len(panel.dates), np.nan)
    out[rows[1:]] = level[1:] / level[:-1] - 1
    return out


def member_returns(panel: Panel, weights: Array, first: int, last: int) -> Array:
    """Close-to-close returns of an index's members, with dividends, by the weights of the evening before.

    A suspended member earns nothing, and the whole gap on the session it trades again.

    Args:
        panel: the market, T dates and N stocks.
        weights: ``[T, N]`` at the close of each date, with a sum above 0 on the rows first..last - 1.
        first, last: rows; the first return is that of the session after `first`.

    Returns:
        ``[T]``, NaN on all other sessions.
    """
    price = carried_closes(panel.field("close")[: last + 1])[first:].astype(np.float64)
    change = price[1:] / price[:-1] - 1
    held = np.where(np.isfinite(change), weights[first:last], 0.0)
    out = np.full(len(panel.dates), np.nan)
    out[first + 1 : last + 1] = np.where(held > 0, held * change, 0.0).sum(axis=1) / held.sum(axis=1)
    return out


def _from_fills(panel: Panel, weights: Array, row: int) -> float:
    """Return of an index's members from the vwap of a session to its close; what does not trade earns nothing."""
    traded = np.asarray(panel.traded[row])
    vwap, close = (panel.field(name)[row, traded].astype(np.float64) for name in ("vwap", "close"))
    return float(weights[traded] @ (close / vwap - 1))


class _Desk:
    """What is known on each date, as the optimizer wants it."""

    def __init__(
        self,
        panel: Panel,
        index: str,
        weights: Array,
        scores: Mapping[int, Array],
        risk_model: RiskModel | None,
    ) -> None:
        self.panel, self.weights, self.scores, self.risk_model = panel, weights, scores, risk_model
        self.members: NDArray[np.bool_] = panel.members.get(index, weights > 0)

    def market(self, row: int, holdings: Array) -> Market:
        """The candidates at the close of `row`, in the order of the panel's stocks."""
        score = self.scores[row]
        stocks = np.flatnonzero(np.isfinite(score) | (self.weights[row] > 0) | (holdings > 0))
        with np.errstate(invalid="ignore", divide="ignore"):
            size = np.log(self.panel.float_cap[row, stocks].astype(np.float64))
        traded = np.asarray(self.panel.traded[row, stocks])
        return Market(
            stocks=stocks,
            scores=_standardised(score[stocks]),
            benchmark=self.weights[row, stocks],
            holdings=holdings[stocks],
            industry=self.panel.industry[row, stocks].astype(np.int64),
            size=_standardised(size),
            in_index=np.asarray(self.members[row, stocks]),
            can_buy=traded,
            can_sell=traded,
            risk=None if self.risk_model is None else self.risk_model.at(row, stocks),
        )


def _standardised(x: Array) -> Array:
    """Z-scores of what is finite; 0 elsewhere, and everywhere if it is all the same."""
    known = np.isfinite(x)
    out = np.zeros(len(x))
    if known.any():
        centred = x[known] - x[known].mean()
        std = float(np.sqrt(np.mean(centred**2)))
        # the mean's rounding noise is no spread
        if std > 1e-12 * (1 + float(np.abs(x[known]).max())):
            out[known] = centred / std
    return out


def _capacity(
    panel: Panel, sessions: NDArray[np.int64], orders: list[Array], assets: float
) -> dict[str, float]:
    shares: list[Array] = []
    for row, order in list(zip(sessions, orders, strict=True))[1:]:
        value = panel.field("vwap")[row].astype(np.float64) * panel.field("volume")[row]
        traded = (order > 1e-8) & np.isfinite(value) & (value > 0)
        shares.append(order[traded] * assets / value[traded])
    share = np.concatenate(shares) if shares else np.empty(0)
    return {
        "assets": assets,
        "participation": float(share.mean()) if len(share) else float("nan"),
        "participation_95": float(np.quantile(share, 0.95)) if len(share) else float("nan"),
    }


def _checked(panel: Panel, scores: ArrayLike, rows: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    at = panel.rows(rows)
    x = np.asarray(scores, dtype=np.float64)
    if x.shape != (len(at), panel.shape[1]):
        raise DataError(f"scores are {x.shape}, expected {(len(at), panel.shape[1])} [dates, stocks].")
    _require(panel, np.all(~np.isinf(x), axis=1), at, "scores are infinite")
    _require(panel, np.any(np.isfinite(x), axis=1), at, "no stock has a score")
    return x, at


def _last_row(panel: Panel, at: NDArray[np.int64], end: str | np.datetime64 | None) -> int:
    if end is not None:
        return int(np.searchsorted(panel.dates, np.datetime64(end), side="right")) - 1
    step = int(np.median(np.diff(at))) if len(at) > 1 else 1
    return min(int(at[-1]) + step, len(panel.dates) - 1)


def _require(panel: Panel, fine: ArrayLike, rows: NDArray[np.int64], complaint: str) -> None:
    bad = panel.dates[rows[~np.asarray(fine, dtype=bool)]]
    if len(bad):
        places = ", ".join(str(day) for day in bad[:3]) + (
            f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        )
        raise DataError(f"panel {panel.name!r}: {complaint} on {places}.")

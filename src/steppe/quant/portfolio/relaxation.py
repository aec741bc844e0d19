"""What gives way when a date cannot satisfy every limit.

In this order, each only where what stands before it is not enough, and each by the least amount that suffices
(lexicographic: a limit later in the order is never widened to spare an earlier one):

1. suspended: a stock that may not trade keeps a weight outside its own limit; no choice, so always first.
2. tracking_error (in `rebalance`): the cap rises to the least tracking error that the other limits allow.
3. turnover, 4. size, 5. industry (all industries alike), 6. in_index: each an elastic linear programme.
7. active: all stocks alike, where the tradable ones within their limits do not add up to the whole portfolio.
8. invested: where too much is suspended to hold the whole portfolio, the rest stays cash.

Weights never become negative, and what may not be bought or sold is not.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from steppe.core.errors import SolverError
from steppe.quant.portfolio.linear import LinearSolver
from steppe.quant.portfolio.market import LimitName, Limits, Market, Relaxed
from steppe.quant.portfolio.trades import Box, Trades

__all__ = ["stock_limits", "widen"]

ORDER: tuple[LimitName, ...] = ("turnover", "size", "industry", "in_index")
NONE = {"turnover": 4.0, "size": 1e6, "industry": 4.0, "in_index": 0.0}
# a widened limit gets this much more, so that the solvers find an interior
MARGIN = 1e-7


def stock_limits(market: Market, limits: Limits) -> tuple[Box, list[Relaxed]]:
    """Lowest and highest weight per stock: the active limit, no short sales, what may not trade; widened if needed."""
    fixed_low = np.where(market.can_sell, 0.0, market.holdings)
    fixed_high = np.where(market.can_buy, 1.0, market.holdings)

    def box(active: float) -> Box:
        low, high = market.benchmark - active, market.benchmark + active
        return Box(np.clip(low, fixed_low, fixed_high), np.clip(high, fixed_low, fixed_high))

    relaxed: list[Relaxed] = []
    found = box(limits.active)
    stuck = np.maximum(found.low - market.benchmark, market.benchmark - found.high).max() - limits.active
    if stuck > 1e-12:
        relaxed.append(Relaxed("suspended", float(stuck)))
    if found.low.sum() <= 1 <= found.high.sum():
        return found, relaxed
    if fixed_high.sum() < 1:
        relaxed.append(Relaxed("invested", float(1 - fixed_high.sum())))
        return Box(fixed_high, fixed_high, float(fixed_high.sum())), relaxed
    # totals of the box are monotone in its width: bisection down to the last bit
    few, enough = limits.active, 1.0
    while few < (middle := (few + enough) / 2) < enough:
        trial = box(middle)
        few, enough = (few, middle) if trial.low.sum() <= 1 <= trial.high.sum() else (middle, enough)
    relaxed.append(Relaxed("active", enough - limits.active))
    return box(enough), relaxed


def widen(market: Market, limits: Limits, box: Box, solver: LinearSolver) -> tuple[Limits, list[Relaxed]]:
    """Limits that can be kept, and what was widened: empty where the limits given can be kept."""
    for depth in range(len(ORDER)):
        if (least := _least(market, limits, box, solver, depth)) is not None:
            break
    else:
        raise SolverError("the rebalance stays infeasible with every limit but the stocks' own left out.")
    relaxed: list[Relaxed] = []
    for level in range(depth, -1, -1):
        if least is None and (least := _least(market, limits, box, solver, level)) is None:
            raise SolverError(f"the rebalance became infeasible again while {ORDER[level]} was relaxed.")
        if least > 1e-9:
            name, by = ORDER[level], least + MARGIN
            value = getattr(limits, name)
            limits = replace(limits, **{name: max(value - by, 0.0) if name == "in_index" else value + by})
            relaxed.append(Relaxed(name, by))
        least = None
    return limits, relaxed[::-1]


def _least(market: Market, limits: Limits, box: Box, solver: LinearSolver, level: int) -> float | None:
    without = replace(limits, **{name: NONE[name] for name in ORDER[:level]})
    return solver.least(Trades(market, without, box, elastic=True), ORDER[level])

"""A rebalance written in trades: columns are buys and sells, rows are what ties the stocks together.

w = start + sum of sign_c z_c over the columns c, 0 <= z <= room. `start` is the nearest portfolio to today's that
keeps every stock's own limits, so the trades that a stock's limits force are already made in it and the turnover
that they cost is already spent. Rows: 0 total weight, 1 turnover, 2 in-index weight, 3 size, 4... industries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steppe.quant.portfolio.market import Limits, Market

__all__ = ["FIRST_INDUSTRY", "INVESTED", "IN_INDEX", "SIZE", "TURNOVER", "Box", "Trades", "violation"]

INVESTED, TURNOVER, IN_INDEX, SIZE, FIRST_INDUSTRY = range(5)
# a smaller distance between two bounds is rounding, not room
ROOM = 1e-12


@dataclass(frozen=True)
class Box:
    """Lowest and highest weight of every stock ``[n]``, and the total weight to hold."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    invested: float = 1.0


class Trades:
    """Columns and rows of one rebalance.

    Attributes:
        start: ``[n]`` weights after the forced trades.
        traded: ``[t]`` positions of the stocks that can trade: buys only, then both ways, then sells only.
        stock: ``[c]`` position of each column's stock: ``traded[:buys]``, then ``traded[first_sell:]``.
        sign: ``[c]`` +1 for a buy, -1 for a sell.
        room: ``[c]`` upper bound of each column.
        buys: how many of the columns are buys; they come first.
        first_sell: place in ``traded`` of the first stock that can be sold.
        group: ``[n]`` row of each stock's industry, counted from 0.
        industries: ``[g]`` the industries' numbers in the order of their rows.
        row_low, row_high: ``[4 + g]`` limits of the rows' sums over the columns.
    """

    def __init__(self, market: Market, limits: Limits, box: Box, *, elastic: bool = False) -> None:
        self.market = market
        self.start = np.clip(market.holdings, box.low, box.high)
        budget = limits.turnover - float(np.abs(self.start - market.holdings).sum())
        if -1e-9 < budget < 0:  # rounding
            budget = 0.0
        # no single trade can be larger than the turnover that is left, unless that limit is about to be widened
        most = np.inf if elastic else max(budget, 0.0)
        up = np.minimum(box.high - self.start, most)
        down = np.minimum(self.start - box.low, most)
        may_buy, may_sell = up > ROOM, down > ROOM
        both = np.flatnonzero(may_buy & may_sell)
        only_buy, only_sell = np.flatnonzero(may_buy & ~may_sell), np.flatnonzero(may_sell & ~may_buy)
        self.traded = np.concatenate([only_buy, both, only_sell])
        self.buys, self.first_sell = len(only_buy) + len(both), len(only_buy)
        self.stock = np.concatenate([self.traded[: self.buys], self.traded[self.first_sell :]])
        self.sign = np.ones(len(self.stock))
        self.sign[self.buys :] = -1
        self.room = np.where(self.sign > 0, up[self.stock], down[self.stock])

        self.industries, group = np.unique(market.industry, return_inverse=True)
        self.group = group.astype(np.int32)
        active = self.start - market.benchmark
        size = float(market.size @ active)
        exposure = np.bincount(group, active, minlength=len(self.industries))
        missing = box.invested - float(self.start.sum())
        first = [
            missing,
            -np.inf,
            limits.in_index - float(self.start[market.in_index].sum()),
            -limits.size - size,
        ]
        last = [missing, budget, np.inf, limits.size - size]
        self.row_low = np.concatenate([first, -limits.industry - exposure])
        self.row_high = np.concatenate([last, limits.industry - exposure])

    def weights(self, amounts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights ``[n]`` after trading ``amounts`` ``[c]``; a buy and a sell of one stock net out."""
        w = self.start.copy()
        w[self.stock[: self.buys]] += amounts[: self.buys]
        w[self.stock[self.buys :]] -= amounts[self.buys :]
        return w


def violation(market: Market, weights: NDArray[np.float64], limits: Limits, box: Box) -> tuple[str, float]:
    """The limit that ``weights`` ``[n]`` break most, and by how much (0 or less: none is broken)."""
    active = weights - market.benchmark
    _, group = np.unique(market.industry, return_inverse=True)
    broken = {
        "active": float(np.max(np.maximum(box.low - weights, weights - box.high))),
        "invested": abs(float(weights.sum()) - box.invested),
        "in_index": limits.in_index - float(weights[market.in_index].sum()),
        "size": abs(float(market.size @ active)) - limits.size,
        "industry": float(np.abs(np.bincount(group, active)).max()) - limits.industry,
        "turnover": float(np.abs(weights - market.holdings).sum()) - limits.turnover,
    }
    worst = max(broken, key=lambda name: broken[name])
    return worst, broken[worst]

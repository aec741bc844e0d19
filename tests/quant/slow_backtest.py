"""The backtest again, as slow and obvious as possible: one day, one stock at a time, shares and cash."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from steppe.quant.panel import FIELDS, Panel

CLOSE, VWAP = FIELDS.index("close"), FIELDS.index("vwap")


class Slow(NamedTuple):
    returns: list[float]
    gross: list[float]
    turnover: list[float]
    cost: list[float]
    cash: list[float]
    weights: list[list[float]]
    delisted: int


def slow_backtest(
    panel: Panel,
    rows: np.ndarray,
    decide: Callable[[int, np.ndarray], np.ndarray],
    cost: float = 0.002,
    delisting_loss: float = 0.0,
    absent: int = 252,
) -> Slow:
    sessions, stocks = panel.shape
    shares: dict[int, float] = {}
    price: dict[int, float] = {}  # of the last trade seen, held or not
    silent = dict.fromkeys(range(stocks), 0)  # sessions without a bar
    cash, yesterday, orders = 1.0, 1.0, None
    out = Slow([], [], [], [], [], [], 0)
    delisted = 0
    signals = {int(r) for r in rows}
    for day in range(sessions):
        # what is gone becomes cash
        for i in range(stocks):
            silent[i] = 0 if panel.traded[day, i] else silent[i] + 1
            if i in shares and (panel.delisted[day, i] or silent[i] >= absent):
                cash += shares.pop(i) * price[i] * (1 - delisting_loss)
                delisted += 1

        # the fills
        paid = 0.0
        if orders is not None:
            for i in range(stocks):
                if panel.traded[day, i]:
                    price[i] = float(panel.values[day, i, VWAP])
            wealth = cash + sum(shares[i] * price[i] for i in shares)
            sold = bought = 0.0
            for i in list(shares):
                too_much = shares[i] * price[i] - orders[i] * wealth
                if too_much > 0 and panel.traded[day, i] and not panel.sealed_down[day, i]:
                    sold += too_much
                    cash += too_much - cost * too_much
                    shares[i] -= too_much / price[i]
                    if orders[i] == 0:
                        del shares[i]
            wanted = {}
            for i in range(stocks):
                if panel.traded[day, i] and not panel.sealed_up[day, i] and not panel.delisted[day, i]:
                    too_little = orders[i] * wealth - shares.get(i, 0.0) * price[i]
                    if too_little > 0:
                        wanted[i] = too_little
            bill = sum(wanted.values()) * (1 + cost)
            cut = 1.0 if bill <= cash else cash / bill
            for i, amount in wanted.items():
                bought += cut * amount
                shares[i] = shares.get(i, 0.0) + cut * amount / price[i]
                cash -= cut * amount * (1 + cost)
            out.turnover.append((bought + sold) / wealth)
            paid = cost * (bought + sold) / wealth
            out.cost.append(paid)
            after = cash + sum(shares[i] * price[i] for i in shares)
            out.cash.append(cash / after)
            out.weights.append([shares.get(i, 0.0) * price.get(i, 0.0) / after for i in range(stocks)])
            orders = None

        # the close
        for i in range(stocks):
            if panel.traded[day, i]:
                price[i] = float(panel.values[day, i, CLOSE])
        wealth = cash + sum(shares[i] * price[i] for i in shares)
        if out.turnover:
            out.returns.append(wealth / yesterday - 1)
            out.gross.append(wealth / yesterday / (1 - paid) - 1)
        yesterday = wealth
        if day in signals:
            held = [shares[i] * price[i] / wealth if i in shares else 0.0 for i in range(stocks)]
            orders = decide(day, np.array(held))
    return out._replace(delisted=delisted)

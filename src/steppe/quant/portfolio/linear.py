"""The linear programme, solved by HiGHS's simplex on the columns that matter.

Of thousands of possible trades a few dozen are made. The programme is solved on a working set: every sell, and the
buys that look best at the row prices (dual values) of the date before. The new prices then say which of the buys
left out would pay; they are added until none does. That is exact, 5 to 10 times faster than the whole programme, and
the state kept from date to date is one price per row, which fits whatever candidates the next date has.

Ties. Equal scores leave many optima, and which of them a simplex method ends in depends on where it began. So every
score is raised by a number of its stock's own, between 0 and `TIE` standard deviations of the scores, drawn by
hashing the stock's number: the optimum becomes one point, the same whatever was solved before and in whatever order
the stocks stand (to about 1e-10 in the weights; the
objective gives up at most 2 `TIE` standard deviations).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from steppe.core.errors import SolverError
from steppe.quant.portfolio.market import LimitName
from steppe.quant.portfolio.trades import FIRST_INDUSTRY, IN_INDEX, INVESTED, SIZE, TURNOVER, Trades

__all__ = ["TIE", "LinearSolver", "tie_breakers"]

TIE = 1e-8
# Costs are passed as this many units per standard deviation of the scores: HiGHS's smallest dual tolerance, 1e-10
# units, then lies a million times below a tie's breaker.
UNITS = 1e4
# buys a working set begins with, and buys that join per round
FIRST, MORE = 100, 100
# by which a row may be missed where nothing can be traded
KEPT = 1e-9


def tie_breakers(stocks: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """A number in [0, 1) per stock that depends on the stock's number alone (splitmix64)."""
    with np.errstate(over="ignore"):
        x = stocks.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


class LinearSolver:
    """Solves linear rebalances one after another; `iterations` counts simplex iterations since the last reset."""

    def __init__(self) -> None:
        try:
            import highspy
        except ModuleNotFoundError as error:
            raise SolverError("portfolios need highspy: pip install 'steppe[quant]'.") from error
        self._optimal = highspy.HighsModelStatus.kOptimal
        self._infeasible = highspy.HighsModelStatus.kInfeasible
        highs = self._highs = highspy.Highs()
        options: dict[str, bool | int | float | str] = {
            "log_to_console": False,
            "output_flag": False,
            "threads": 1,
            "parallel": "off",
            "presolve": "off",  # a working set leaves nothing to presolve
            "solver": "simplex",
            "simplex_scale_strategy": 0,  # the rows are of one size by nature
            "primal_feasibility_tolerance": 1e-10,
            "dual_feasibility_tolerance": 1e-10,
        }
        for option, value in options.items():
            highs.setOptionValue(option, value)
        self._prices: tuple[NDArray[np.float64], dict[int, float]] | None = None
        self.iterations = 0

    def solve(self, trades: Trades) -> NDArray[np.float64] | None:
        """Amounts ``[c]`` of the best trades, or None where no trades satisfy every limit.

        Raises:
            SolverError: HiGHS ended in another way.
        """
        if trades.row_high[TURNOVER] < 0:  # the forced trades alone cost more
            return None
        market, stock, buys = trades.market, trades.stock, trades.buys
        if not len(stock):  # which HiGHS refuses: the start is all there is
            kept = (trades.row_low <= KEPT).all() and (trades.row_high >= -KEPT).all()
            return np.zeros(0) if kept else None
        spread = float(market.scores.std()) or 1.0
        score = UNITS * ((market.scores - market.scores.mean()) / spread + TIE * tie_breakers(market.stocks))
        gain = trades.sign * score[stock]
        index, value = _columns(trades)

        used = np.ones(len(stock), dtype=bool)
        if (prices := self._start_prices(trades)) is not None and buys > FIRST:
            worth = _worth(gain, index, value, prices)[:buys]
            used[:buys] = False
            used[np.argpartition(worth, buys - FIRST)[buys - FIRST :]] = True
        columns = np.flatnonzero(used)
        self._pass(gain, trades, index, value, columns)
        while not self._run():
            if used.all():
                return None
            used[:] = True  # too few columns to satisfy the limits: take all of them
            columns = np.arange(len(stock))
            self._pass(gain, trades, index, value, columns)
        while True:
            solution = self._highs.getSolution()
            prices = -np.asarray(solution.row_dual)
            if used.all():
                break
            worth = np.where(used, 0.0, _worth(gain, index, value, prices))
            new = np.flatnonzero(worth > 1e-9)
            if not len(new):
                break
            if len(new) > MORE:
                new = new[np.argpartition(worth[new], len(new) - MORE)[len(new) - MORE :]]
            used[new] = True
            columns = np.concatenate([columns, new])
            count, width = len(new), index.shape[1]
            starts = np.arange(0, width * count, width, dtype=np.int32)
            cost, room = -gain[new], trades.room[new]
            entries, rows = value[new].ravel(), index[new].ravel()
            self._highs.addCols(count, cost, np.zeros(count), room, width * count, starts, rows, entries)
            self._run()
        industries = prices[FIRST_INDUSTRY:].tolist()
        self._prices = prices[:FIRST_INDUSTRY], dict(zip(trades.industries.tolist(), industries, strict=True))
        amounts = np.zeros(len(stock))
        amounts[columns] = solution.col_value
        return np.clip(amounts, 0.0, trades.room)

    def least(self, trades: Trades, limit: LimitName) -> float | None:
        """The least that ``limit`` has to be widened by to be kept, or None where that alone does not help."""
        rows = _rows_of(trades, limit)
        index, value = _columns(trades)
        count, width = index.shape
        m = len(trades.row_low)
        # every row twice, once for each side, so that one column can push both sides of a range outwards
        index = np.concatenate([index, index + m], axis=1).astype(np.int32)
        value = np.concatenate([value, value], axis=1)
        sides = np.concatenate([rows, rows + m]).astype(np.int32)
        push = np.concatenate([-np.ones(len(rows)), np.ones(len(rows))])
        starts = np.append(np.arange(0, 2 * width * count + 1, 2 * width), 2 * width * count + len(sides))
        low = np.concatenate([np.full(m, -np.inf), trades.row_low])
        high = np.concatenate([trades.row_high, np.full(m, np.inf)])
        self._highs.passModel(
            *(count + 1, 2 * m, int(starts[-1]), 1, 1, 0.0),
            *(
                np.append(np.zeros(count), 1.0),
                np.zeros(count + 1),
                np.append(trades.room, np.inf),
                low,
                high,
            ),
            *(starts.astype(np.int32), np.append(index.ravel(), sides), np.append(value.ravel(), push)),
            np.zeros(count + 1, dtype=np.int32),
        )
        return max(float(self._highs.getInfo().objective_function_value), 0.0) if self._run() else None

    def _pass(
        self,
        gain: NDArray[np.float64],
        trades: Trades,
        index: NDArray[np.int32],
        value: NDArray[np.float64],
        columns: NDArray[np.intp],
    ) -> None:
        count, width = len(columns), index.shape[1]
        starts = np.arange(0, width * count + 1, width, dtype=np.int32)
        if count < len(index):
            gain, room, index, value = gain[columns], trades.room[columns], index[columns], value[columns]
        else:
            room = trades.room
        self._highs.passModel(
            *(count, len(trades.row_low), width * count, 1, 1, 0.0),  # entries column by column, minimise
            *(-gain, np.zeros(count), room, trades.row_low, trades.row_high),
            *(starts, index.ravel(), value.ravel(), np.zeros(count, dtype=np.int32)),
        )

    def _run(self) -> bool:
        """Whether the programme passed has a solution."""
        highs = self._highs
        highs.run()
        self.iterations += max(highs.getInfo().simplex_iteration_count, 0)
        if (status := highs.getModelStatus()) == self._optimal:
            return True
        if status == self._infeasible:
            return False
        raise SolverError(f"HiGHS ended with {highs.modelStatusToString(status)!r} on the linear programme.")

    def _start_prices(self, trades: Trades) -> NDArray[np.float64] | None:
        if self._prices is None:
            return None
        first, industries = self._prices
        return np.concatenate([first, [industries.get(number, 0.0) for number in trades.industries.tolist()]])


def _columns(trades: Trades) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Row numbers and entries ``[c, 5]`` of every column."""
    market, stock, sign = trades.market, trades.stock, trades.sign
    index = np.empty((len(stock), 5), dtype=np.int32)
    index[:, :4] = (INVESTED, TURNOVER, IN_INDEX, SIZE)
    index[:, 4] = trades.group[stock] + FIRST_INDUSTRY
    value = np.empty(index.shape)
    value[:, 0] = sign
    value[:, 1] = 1
    value[:, 2] = sign * market.in_index[stock]
    value[:, 3] = sign * market.size[stock]
    value[:, 4] = sign
    return index, value


def _worth(
    gain: NDArray[np.float64],
    index: NDArray[np.int32],
    value: NDArray[np.float64],
    prices: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Gain of each column less what its rows charge."""
    return np.asarray(gain - value[:, :4] @ prices[:4] - value[:, 4] * prices[index[:, 4]])


def _rows_of(trades: Trades, limit: LimitName) -> NDArray[np.intp]:
    single = {"turnover": TURNOVER, "in_index": IN_INDEX, "size": SIZE}
    if limit == "industry":
        return np.arange(FIRST_INDUSTRY, len(trades.row_low))
    return np.array([single[limit]])

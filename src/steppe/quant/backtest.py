"""What a portfolio would have earned: weekly targets, filled at the vwap of the next session, at a cost.

Everything is a value in currency, starting at 1, and every price an adjusted one, so that dividends are
reinvested in the stock on the ex-date. Cash earns nothing. There are no lots, no short positions and no
market impact: a fill takes the whole order at the vwap, whatever its share of the session's volume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from steppe.core.errors import DataError, SpecError
from steppe.quant.panel import FIELDS, Panel
from steppe.quant.universe import buyable, sellable

__all__ = ["ABSENT", "Backtest", "Decide", "Fill", "backtest", "fill"]

Decide: TypeAlias = Callable[[int, NDArray[np.float64]], NDArray[np.float64]]
"""``decide(t, holdings)``: row t of the panel and the weights ``[N]`` held at its close (the rest to 1 is cash), to
the target weights ``[N]``, >= 0 and with a sum of at most 1. It may look at the panel up to row t, no further."""

ABSENT = 252
"""A holding without a bar for this many sessions is taken for delisted (ours; the longest suspensions are as long)."""

_CLOSE, _VWAP = FIELDS.index("close"), FIELDS.index("vwap")
_ROUNDING = 1e-8
"""What solvers leave: a target this near to 0 is 0, a sum this far above 1 is 1, a change this small is none."""


@dataclass(frozen=True)
class Backtest:
    """What `backtest` found. P sessions from the first trade on, K trades, N stocks.

    Attributes:
        dates: ``[P]`` datetime64.
        returns: ``[P]`` close to close after costs; the first is from the vwap of the first trade.
        gross: ``[P]`` the same without the cost of the session: 1 + returns = (1 + gross) (1 - cost).
        turnover: ``[K]`` sum of all fills, bought and sold, over the value of the portfolio just before them.
        cost: ``[K]`` what they cost, over the same value.
        weights: ``[K, N]`` after the fills and their cost; the rest to 1 is cash.
        fills: one row per trade: date; signal, the session whose close decided; bought, sold, over the value just
            before; blocked_buys, blocked_sells, how many stocks were to be bought (sold) and could not be;
            unfilled, the weight of those and of what cash did not suffice for; delisted, how many holdings
            were paid out since the trade before; cash, after the fills, and held, the number of stocks.
        skipped: signal, reason: every signal that was not traded on.
    """

    dates: NDArray[np.datetime64]
    returns: NDArray[np.float64]
    gross: NDArray[np.float64]
    turnover: NDArray[np.float64]
    cost: NDArray[np.float64]
    weights: NDArray[np.float64]
    fills: pl.DataFrame
    skipped: pl.DataFrame


class Fill(NamedTuple):
    """What `fill` leaves: values ``[N]`` held and cash; what was bought and sold, and not for want of cash."""

    values: NDArray[np.float64]
    cash: float
    bought: float
    sold: float
    short: float


def fill(
    values: NDArray[np.float64],
    cash: float,
    target: NDArray[np.float64],
    can_buy: NDArray[np.bool_],
    can_sell: NDArray[np.bool_],
    cost: float,
) -> Fill:
    """Trade towards target weights of the value before costs: first the sales, then the purchases.

    What is above its target is sold down to it where it can be; the proceeds less costs go to cash. What is
    below is bought up to it where it can be; if cash does not suffice for all purchases and their costs
    (sales that were blocked, or the costs themselves), all of them are cut by one factor. What cannot be
    bought stays cash. values + cash falls by cost x (bought + sold), to rounding, and cash is never negative.

    Args:
        values: ``[N]`` held, at the prices of the fill.
        cash: >= 0.
        target: ``[N]`` weights >= 0, sum at most 1.
        can_buy, can_sell: ``[N]``.
        cost: of each side, over its value.
    """
    missing = target * (values.sum() + cash) - values
    sales = np.where(can_sell, np.maximum(-missing, 0.0), 0.0)
    wanted = np.where(can_buy, np.maximum(missing, 0.0), 0.0)
    sold, total = float(sales.sum()), float(wanted.sum())
    cash += (1 - cost) * sold
    share = min(1.0, cash / ((1 + cost) * total)) if total > 0 else 0.0
    bought = share * total
    cash = max(cash - (1 + cost) * bought, 0.0)
    return Fill(values - sales + share * wanted, cash, bought, sold, total - bought)


def backtest(
    panel: Panel,
    rows: ArrayLike,
    decide: Decide,
    *,
    cost: float = 0.002,
    delisting_loss: float = 0.0,
    absent: int = ABSENT,
    end: str | np.datetime64 | None = None,
) -> Backtest:
    """Trade what `decide` wants, the session after each signal.

    For each row t of `rows`, at its close, ``decide(t, weights held)`` gives target weights. On session t + 1:

    1. Holdings that are delisted by then become cash (below). The others go from their last close to the
       vwap; a stock that does not trade keeps its value.
    2. Targets are weights of the portfolio at these values, before costs. `fill`: first sales, then
       purchases as far as cash goes. Stocks that do not trade, or are at the upper limit all session, are not
       bought; those that do not trade, or are at the lower limit all session, not sold. Nothing is carried
       over: the next decision sees what is held. Weights drift from the close to the vwap, so that a little
       more is traded than was decided (published under a limit of 30 %: 32.4 %), even for ``target = held``.
    3. Costs are paid from cash at once; the first session buys only.
    4. What is held then goes from the vwap to the close.

    Until the next trade weights drift. A suspended stock is worth its last close, and the whole gap is earned
    on the session it trades again. On the first session on which a holding is ``panel.delisted``, or has
    had no bar for `absent` sessions, it becomes cash at its last close less `delisting_loss`.

    Args:
        panel: the market, T dates and N stocks.
        rows: increasing indices into ``panel.dates``, the sessions with a signal.
        decide: see `Decide`. Its result is checked.
        cost: of each side, over the value traded; published 0.2 %.
        delisting_loss: share of its last close that a delisted holding loses; 0 (ours).
        absent: sessions without a bar after which a holding is taken for delisted.
        end: last date of the result; the panel's last by default. A signal whose session t + 1 lies
            beyond it is listed in `Backtest.skipped`.

    Raises:
        DataError: rows or targets that do not fit, no signal that can be traded, a bar without a price, or a
            portfolio that has lost everything.
        SpecError: cost or delisting_loss outside [0, 1), [0, 1], or absent < 1.
    """
    if not (0 <= cost < 1 and 0 <= delisting_loss <= 1 and absent >= 1):
        raise SpecError(
            f"cost {cost}, delisting_loss {delisting_loss}, absent {absent}: costs and losses are shares (0.002 is "
            "0.2 %), and a holding can be absent for a session at least."
        )
    at, stop = _checked(panel, rows, end)
    signals = at[at + 1 < stop]
    if not len(signals):
        raise DataError(
            f"no signal can be traded: the first is of {panel.dates[at[0]]}, and the session after it lies beyond "
            "the end."
        )
    book = _Book(panel, cost, delisting_loss, absent)
    wealth: list[NDArray[np.float64]] = [np.ones(1)]
    records = []
    weights = np.zeros((len(signals), panel.shape[1]))
    for k, (signal, following) in enumerate(zip(signals, [*signals[1:], stop - 1], strict=True)):
        held = book.weights()
        target = _target(panel, signal, decide(int(signal), held.copy()))
        records.append(book.trade(signal + 1, target, held))
        weights[k] = book.weights()
        wealth.append(book.hold(signal + 1, following))
    value = np.concatenate(wealth)
    returns = value[1:] / value[:-1] - 1
    fills = pl.DataFrame(records)
    turnover = (fills["bought"] + fills["sold"]).to_numpy()
    gross = returns.copy()
    traded = signals - signals[0]
    gross[traded] = (1 + returns[traded]) / (1 - cost * turnover) - 1
    late = panel.dates[at[len(signals) :]]
    return Backtest(
        dates=panel.dates[signals[0] + 1 : stop],
        returns=returns,
        gross=gross,
        turnover=turnover,
        cost=cost * turnover,
        weights=weights,
        fills=fills.select(
            pl.Series("date", panel.dates[signals + 1]), pl.Series("signal", panel.dates[signals]), pl.all()
        ),
        skipped=pl.DataFrame(
            {"signal": late, "reason": ["its session lies beyond the end"] * len(late)},
            schema={"signal": pl.Date, "reason": pl.String},
        ),
    )


class _Book:
    """The portfolio between decisions: shares ``[N]`` in adjusted units, the price each is valued at, and cash."""

    def __init__(self, panel: Panel, cost: float, loss: float, absent: int) -> None:
        stocks = panel.shape[1]
        self.panel, self.cost, self.loss, self.absent = panel, cost, loss, absent
        self.bars, self.gone = np.asarray(panel.values), np.asarray(panel.delisted)
        self.can_buy, self.can_sell = buyable(panel), sellable(panel)
        self.shares, self.price = np.zeros(stocks), np.zeros(stocks)
        self.seen = np.zeros(stocks, dtype=np.int64)  # row of the last bar
        self.cash = 1.0
        self.paid_out = 0  # holdings that were delisted since the last trade

    def weights(self) -> NDArray[np.float64]:
        values = self.shares * self.price
        return np.asarray(values / (values.sum() + self.cash))

    def trade(self, row: int, target: NDArray[np.float64], held: NDArray[np.float64]) -> dict[str, float]:
        """Session `row` up to its fills; `held` are the weights the targets were decided on."""
        stocks = np.flatnonzero((self.shares > 0) | (target > 0))
        traded, vwap = self.panel.traded[row, stocks], self.bars[row, stocks, _VWAP]
        self._check(row, stocks[traded & ~(vwap > 0)], "vwap")
        absent = ~traded & (row - self.seen[stocks] >= self.absent)
        gone = (self.gone[row, stocks] | absent) & (self.shares[stocks] > 0)
        self.price[stocks[gone]] *= 1 - self.loss
        self._to_cash(stocks[gone])
        self.price[stocks[traded]] = vwap[traded]
        self.seen[stocks[traded]] = row

        price, change = self.price[stocks], target[stocks] - held[stocks]
        can_buy, can_sell = self.can_buy[row, stocks], self.can_sell[row, stocks]
        values = self.shares[stocks] * price
        before = float(values.sum()) + self.cash
        done = fill(values, self.cash, target[stocks], can_buy, can_sell, self.cost)
        self.shares[stocks] = np.divide(done.values, price, out=np.zeros(len(stocks)), where=done.values > 0)
        self.cash = done.cash
        no_buy, no_sale = (change > _ROUNDING) & ~can_buy, (change < -_ROUNDING) & ~can_sell & ~gone
        record = {
            "bought": done.bought / before,
            "sold": done.sold / before,
            "blocked_buys": int(no_buy.sum()),
            "blocked_sells": int(no_sale.sum()),
            "unfilled": float(np.abs(change[no_buy | no_sale]).sum()) + done.short / before,
            "delisted": self.paid_out,
            "cash": self.cash / (float(done.values.sum()) + self.cash),
            "held": int(np.count_nonzero(done.values)),
        }
        self.paid_out = 0
        return record

    def hold(self, first: int, last: int) -> NDArray[np.float64]:
        """The portfolio's value at the closes of the rows first..last, both included."""
        held = np.flatnonzero(self.shares)
        last_price = self.price[held]
        session = np.arange(first, last + 1)[:, None]
        traded = self.panel.traded[first : last + 1, held]
        closes = self.bars[first : last + 1, held, _CLOSE].astype(np.float64)
        if (bad := traded & ~(closes > 0)).any():
            day = int(bad.any(axis=1).argmax())
            self._check(first + day, held[bad[day]], "close")
        seen = np.maximum.accumulate(np.where(traded, session, self.seen[held]), axis=0)
        known = np.take_along_axis(closes, np.maximum(seen - first, 0), axis=0)
        prices = np.where(seen >= first, known, last_price)

        gone = self.gone[first : last + 1, held] | (session - seen >= self.absent)
        leaving = np.flatnonzero(gone.any(axis=0))
        for column in leaving:
            day = int(gone[:, column].argmax())
            left = prices[day - 1, column] if day else last_price[column]
            prices[day:, column] = left * (1 - self.loss)
        wealth = prices @ self.shares[held] + self.cash
        if not wealth.min() > 0:
            day = self.panel.dates[first + int(wealth.argmin())]
            raise DataError(f"the portfolio has lost everything by {day}: nothing is left to trade.")
        self.price[held], self.seen[held] = prices[-1], seen[-1]
        self._to_cash(held[leaving])
        return wealth

    def _to_cash(self, stocks: NDArray[np.intp]) -> None:
        self.cash += float(self.shares[stocks] @ self.price[stocks])
        self.shares[stocks] = 0.0
        self.paid_out += len(stocks)

    def _check(self, row: int, without: NDArray[np.intp], price: str) -> None:
        if len(without):
            raise DataError(
                f"panel {self.panel.name!r}: {self.panel.symbols[without[0]]} has a bar on "
                f"{self.panel.dates[row]}, but no {price}."
            )


def _checked(panel: Panel, rows: ArrayLike, end: str | np.datetime64 | None) -> tuple[NDArray[np.intp], int]:
    """The rows as an array, and the number of sessions up to `end`."""
    at = panel.rows(rows)
    last = panel.dates[-1] if end is None else np.datetime64(str(end), "D")
    return at, int(np.searchsorted(panel.dates, last, side="right"))


def _target(panel: Panel, row: int, wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """The decision without the dust of a solver; what is off by more is an error."""
    target = np.asarray(wanted, dtype=np.float64)
    if target.shape != (panel.shape[1],):
        raise DataError(
            f"targets of {panel.dates[row]} are {target.shape}, expected {(panel.shape[1],)} [stocks]."
        )
    low, total = target.min(), target.sum()
    if not (low >= -_ROUNDING and total <= 1 + _ROUNDING):  # NaN fails too
        raise DataError(
            f"targets of {panel.dates[row]}: weights must be >= 0 with a sum of at most 1, not from {low:g} with "
            f"a sum of {total:g}. NaN is no weight: a stock not wanted has 0."
        )
    target = np.where(target > _ROUNDING, target, 0.0)
    return np.asarray(target / max(target.sum(), 1.0))

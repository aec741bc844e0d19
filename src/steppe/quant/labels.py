"""The label: what a score formed after the close of t is asked to order."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steppe.core.errors import SpecError
from steppe.quant.panel import FIELDS, Panel

__all__ = ["forward_returns"]


def forward_returns(
    panel: Panel, horizon: int, *, rows: ArrayLike | None = None, price: str = "vwap"
) -> NDArray[np.float32]:
    """``price(t + 1 + horizon) / price(t + 1) - 1`` in adjusted prices: bought the session after t, held `horizon`.

    A score of t is formed after its close, so t + 1 is the first session it can trade on. A stock that does
    not trade at t + 1 cannot be bought: NaN. One that does not trade at t + 1 + horizon (suspended or
    delisted in between) is valued at its last known price in the window. NaN too where t + 1 + horizon lies
    beyond the panel, so the last ``horizon + 1`` rows are NaN. An entry depends on no date after t + 1 +
    horizon.

    Args:
        panel: the market, T dates and N stocks.
        horizon: sessions held, at least 1. 10 is the label of the published factor, 5 its holding period.
        rows: ``[D]`` indices into ``panel.dates``; all dates by default.
        price: one of `steppe.quant.panel.FIELDS` but volume. vwap, since trades fill there.

    Returns:
        ``[T, N]`` float32, or ``[D, N]`` with `rows`.

    Raises:
        SpecError: horizon < 1, or no such price.
    """
    if horizon < 1:
        raise SpecError(f"horizon {horizon}: a return needs at least one session.")
    if price not in FIELDS[:-1]:
        raise SpecError(f"price {price!r}: one of {', '.join(FIELDS[:-1])}.")
    dates, stocks = panel.shape
    at = np.arange(dates) if rows is None else np.asarray(rows, dtype=np.int64)
    out = np.full((len(at), stocks), np.nan, dtype=np.float32)
    known = at + 1 + horizon < dates
    entry_row = at[known] + 1
    prices = panel.field(price)
    entry = prices[entry_row]
    last = entry.copy()
    for step in range(1, horizon + 1):
        now = prices[entry_row + step]
        np.copyto(last, now, where=np.isfinite(now))
    out[known] = last / entry - 1
    return out

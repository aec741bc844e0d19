"""The label: what a score formed after the close of t is asked to order."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steppe.core.errors import SpecError
from steppe.quant.panel import FIELDS, Panel

__all__ = ["forward_returns", "forward_returns_over"]


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
    return forward_returns_over(panel, (horizon,), rows=rows, price=price)[horizon]


def forward_returns_over(
    panel: Panel, horizons: Iterable[int], *, rows: ArrayLike | None = None, price: str = "vwap"
) -> dict[int, NDArray[np.float32]]:
    """`forward_returns` over several horizons from one pass through the prices, by horizon."""
    wanted = sorted(set(horizons))
    if not wanted or wanted[0] < 1:
        raise SpecError(f"horizon {wanted[0] if wanted else None}: a return needs at least one session.")
    if price not in FIELDS[:-1]:
        raise SpecError(f"price {price!r}: one of {', '.join(FIELDS[:-1])}.")
    dates, stocks = panel.shape
    at = np.arange(dates) if rows is None else np.asarray(rows, dtype=np.int64)
    out = {horizon: np.full((len(at), stocks), np.nan, dtype=np.float32) for horizon in wanted}
    known = {horizon: at + 1 + horizon < dates for horizon in wanted}
    if not known[wanted[0]].any():
        return out
    first = int(at.min()) + 1
    prices = np.array(panel.field(price)[first : int(at.max()) + 2 + wanted[-1]])
    entry = prices[np.minimum(at + 1 - first, len(prices) - 1)]
    # the price at t + 1 is known, so the last price known at all is one of the window
    for before, now in pairwise(prices):
        np.copyto(now, before, where=np.isnan(now))
    for horizon in wanted:
        some = known[horizon]
        value = prices[at[some] + 1 + horizon - first]
        value -= entry[
            some
        ]  # exact for prices this close: small returns keep all their digits, and their order
        value /= entry[some]
        out[horizon][some] = value
    return out

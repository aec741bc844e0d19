"""Which stocks a date's cross-section holds, what an index is made of, and what a fill can trade."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from steppe.core.errors import DataError, unknown
from steppe.quant.panel import Panel

__all__ = ["buyable", "index_weights", "sellable", "universe_mask"]


def universe_mask(panel: Panel, indices: Sequence[str] = (), *, min_age: int = 0) -> NDArray[np.bool_]:
    """The stocks that are scored, by what is known at the close of each date.

    Args:
        panel: the market, T dates and N stocks.
        indices: a stock must be a member of any of them on the date; of none if empty.
        min_age: calendar days since listing; 91 is about the 63 sessions of published tests.

    Returns:
        ``[T, N]``: traded at the date, not under special treatment, a member, and old enough.

    Raises:
        DataError: the panel does not know an index.
    """
    mask = np.asarray(panel.traded) & ~np.asarray(panel.special) & (panel.age >= min_age)
    if not indices:
        return mask
    for name in indices:
        if name not in panel.members:
            raise DataError(f"panel {panel.name!r}: {unknown('index', name, panel.members)}")
    return mask & np.logical_or.reduce([panel.members[name] for name in indices])


def index_weights(panel: Panel, index: str) -> tuple[NDArray[np.float64], Literal["data", "float_cap"]]:
    """What an index holds at the close of each date.

    Args:
        panel: the market, T dates and N stocks.
        index: a name in ``panel.weights`` or ``panel.members``.

    Returns:
        the weights ``[T, N]``, rows summing to 1 (to 0 on dates without a member whose weight is known), and
        where they come from: "data", the panel's own; or "float_cap", the members' free-float values where
        the panel has no weights. A member without a float cap, or delisted, then has none: name the source
        wherever a number rests on it.

    Raises:
        DataError: the panel does not know the index, or has neither weights nor float caps for it.
    """
    source: Literal["data", "float_cap"]
    if index in panel.weights:
        source, raw = "data", panel.weights[index].astype(np.float64)
    elif index in panel.members:
        source = "float_cap"
        raw = np.where(panel.members[index] & ~panel.delisted, panel.float_cap, np.nan).astype(np.float64)
    else:
        raise DataError(f"panel {panel.name!r}: {unknown('index', index, {*panel.members, *panel.weights})}")
    weights = np.where(raw > 0, raw, 0.0)
    total = weights.sum(axis=1, keepdims=True)
    if not total.any():
        raise DataError(
            f"panel {panel.name!r}: index {index!r} has neither weights nor members with a float cap on any date."
        )
    return np.divide(weights, total, out=weights, where=total > 0), source


def buyable(panel: Panel) -> NDArray[np.bool_]:
    """``[T, N]``: can be bought at the vwap of the date: trades, not delisted, not at the upper limit all session."""
    return np.asarray(panel.traded) & ~np.asarray(panel.sealed_up) & ~np.asarray(panel.delisted)


def sellable(panel: Panel) -> NDArray[np.bool_]:
    """``[T, N]``: can be sold at the vwap of the date: trades, not at the lower limit all session."""
    return np.asarray(panel.traded) & ~np.asarray(panel.sealed_down)

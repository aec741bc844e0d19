"""Ranks and correlations over the stocks of each date, NaN left out.

Arrays are worked through in blocks of dates that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Ordered", "correlation", "date_blocks", "rank_autocorrelation", "rank_ic", "ranks"]

BLOCK = 1 << 16
"""Entries of a block of dates."""


def date_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of dates that hold about `BLOCK` entries of a ``[D, N]`` array each."""
    step = max(1, BLOCK // max(shape[1], 1))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


class Ordered:
    """The rows of ``[D, N]``, each sorted once: ranks among any of their entries are then a matter of counting.

    Scores that share a panel are ranked against the same returns, but each over the stocks it knows itself.

    Attributes:
        order: ``[D, N]`` int32, the position in the row of its smallest, second smallest, ... entry; NaN last.
        ties: ``[3, M]``: every place in `order` whose entry is equal to a neighbour's, counted through all
            rows, with the first and the last place of its group.
    """

    def __init__(self, x: ArrayLike) -> None:
        x = np.asarray(x)
        self._last: tuple[NDArray[np.bool_], NDArray[np.float32]] | None = None
        self.order: NDArray[np.int32] = np.empty(x.shape, dtype=np.int32)
        ties = []
        for block in date_blocks(x.shape):
            order, repeated = _sorted(x[block])
            self.order[block] = order
            if repeated.any():
                ties.append(_tie_groups(repeated) + block.start * x.shape[1])
        self.ties: NDArray[np.int64] = np.concatenate(ties, axis=1) if ties else np.empty((3, 0), dtype=int)

    def rows(self, index: NDArray[np.integer]) -> Ordered:
        """The rows at strictly increasing `index`."""
        part = object.__new__(Ordered)
        part._last = None
        part.order = self.order[index]
        stocks = self.order.shape[1]
        moved = np.full(len(self.order), -1)
        moved[index] = np.arange(len(index))
        row = self.ties[0] // max(stocks, 1)
        kept = moved[row] >= 0
        part.ties = self.ties[:, kept] + (moved[row] - row)[kept] * stocks
        return part

    def ranks(self, keep: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Ranks 1..n among the entries of ``keep [D, N]``, none of them NaN; ties share their mean, the rest are 0."""
        out = np.empty(self.order.shape)
        for block in date_blocks(out.shape):
            place = self._places(block)
            rank = self._count(block, keep[block].ravel()[place])
            out[block].ravel()[place] = rank
        return out

    def rank_ic(self, ranks: NDArray[np.float64]) -> NDArray[np.float64]:
        """Spearman correlation per row with something of these `ranks`, over the entries that have one.

        The ranks here are kept until other entries are asked for: whatever is ranked over the same ones shares them.

        Args:
            ranks: ``[D, N]`` as `ranks` gives them: 1..n, 0 for what is left out. An entry that is NaN here must
                be left out.

        Returns:
            ``[D]``; NaN where fewer than two entries are ranked or one side is constant.
        """
        keep = ranks > 0
        if self._last is None or not np.array_equal(self._last[0], keep):
            self._last = keep, self.ranks(keep).astype(np.float32)  # halves of whole numbers: exact
        ours = self._last[1]
        out = np.empty(len(ranks))
        for block in date_blocks(ranks.shape):
            a, b = ranks[block], ours[block].astype(np.float64)
            # multiples of a quarter below 2 ** 53: these sums have no rounding error, so 0 is exactly 0
            n = np.count_nonzero(keep[block], axis=1)
            mean = n * ((n + 1) / 2) ** 2
            both, first, second = (np.einsum("dn,dn->d", p, q) - mean for p, q in ((a, b), (a, a), (b, b)))
            varies = (first > 0) & (second > 0)
            out[block] = np.divide(both, np.sqrt(first * second), out=np.full(len(n), np.nan), where=varies)
        return np.clip(out, -1, 1)

    def _places(self, block: slice) -> NDArray[np.int64]:
        """The order of a block of dates as positions in the flattened block."""
        order = self.order[block]
        return order + np.arange(0, order.size, order.shape[1] or 1, dtype=np.int64)[:, None]

    def _count(self, block: slice, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Ranks in sorted order: `kept` and the result are ``[dates of the block, N]``, 0 where not kept."""
        count = np.cumsum(kept, axis=1, dtype=np.int32)
        rank = count.astype(np.float64)
        rank *= kept
        stocks = kept.shape[1]
        some = slice(*np.searchsorted(self.ties[0], (block.start * stocks, block.stop * stocks)))
        if some.start < some.stop:
            at, first, last = self.ties[:, some] - block.start * stocks
            flat, flag = count.ravel(), kept.ravel()
            rank.ravel()[at] = (flat[first] - flag[first] + flat[last] + 1) / 2 * flag[at]
        return rank


def ranks(x: ArrayLike) -> NDArray[np.float64]:
    """Ranks 1..n along the last axis of ``[D, N]``, ties get their average rank; NaN stays NaN and is not counted."""
    x = np.asarray(x)
    known = ~np.isnan(x)
    return np.where(known, Ordered(x).ranks(known), np.nan)


def rank_ic(scores: ArrayLike, returns: ArrayLike) -> NDArray[np.float64]:
    """Spearman correlation per row of two ``[D, N]`` arrays over the stocks finite in both; average ranks for ties.

    Returns:
        ``[D]``; NaN where fewer than two stocks are left or one side is constant.
    """
    scores, returns = np.asarray(scores), np.asarray(returns)
    both = np.isfinite(scores) & np.isfinite(returns)
    return Ordered(returns).rank_ic(Ordered(scores).ranks(both))


def rank_autocorrelation(order: Ordered, finite: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Spearman correlation of each row with the next, ``[D - 1]``, over what is ``finite [D, N]`` in both."""
    steps = np.arange(len(finite) - 1)
    return order.rows(steps + 1).rank_ic(order.rows(steps).ranks(finite[1:] & finite[:-1]))


def correlation(x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
    """Pearson correlation per row of two ``[D, N]`` arrays over the stocks that are finite in both.

    Returns:
        ``[D]``; NaN where fewer than two stocks are left or one side is constant.
    """
    x, y = (a if np.issubdtype(a.dtype, np.floating) else a.astype(float) for a in map(np.asarray, (x, y)))
    out = np.empty(len(x))
    for block in date_blocks(x.shape):
        a, b = x[block], y[block]
        valid = np.isfinite(a) & np.isfinite(b)
        count = np.maximum(np.count_nonzero(valid, axis=1), 1)[:, None]
        p, p_mean = _centred(a, valid, count)
        q, q_mean = _centred(b, valid, count)
        spp, sqq, spq = (np.einsum("dn,dn->d", f, g) for f, g in ((p, p), (q, q), (p, q)))
        varies = (spp > 0) & (sqq > 0)
        # a constant row leaves rounding noise, not exact zeros: judge it on the values themselves
        noise = (1e-14 * count[:, 0]) ** 2 * count[:, 0]
        for row in np.flatnonzero((spp <= noise * p_mean**2) | (sqq <= noise * q_mean**2)):
            kept = valid[row]
            varies[row] &= bool(kept.any() and np.ptp(a[row, kept]) > 0 and np.ptp(b[row, kept]) > 0)
        out[block] = np.divide(spq, np.sqrt(spp * sqq), out=np.full(len(a), np.nan), where=varies)
    return np.clip(out, -1, 1)


def _sorted(x: NDArray[Any]) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
    """The order of each row, and where an entry equals the one before it in that order (never for NaN)."""
    repeated = np.zeros(x.shape, dtype=bool)
    if x.dtype == np.float32:
        # value and position in one integer: sorting those is faster than an argsort
        bits = (x + np.float32(0)).view(np.int32)  # + 0: -0.0 and 0.0 are equal
        bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)  # the order of integers, for negative numbers too
        bits[np.isnan(x)] = 0x7FFFFFFF
        keys = bits.astype(np.int64)
        keys <<= 32
        keys |= np.arange(x.shape[1])
        keys.sort(axis=1)
        values = (keys >> 32).astype(np.int32)
        repeated[:, 1:] = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] != 0x7FFFFFFF)
        return keys.astype(np.int32), repeated  # the lower half
    missing = np.isnan(x)
    if missing.any() and not np.isposinf(x).any():
        order = np.argsort(np.where(missing, np.inf, x), axis=1)  # NaN in the input costs it the fast path
    else:
        order = np.argsort(x, axis=1)
    ordered = np.take_along_axis(x, order, axis=1)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return order, repeated


def _tie_groups(repeated: NDArray[np.bool_]) -> NDArray[np.int64]:
    """``[3, M]``: the flat places of tied entries with the first and last place of their group."""
    follows = np.zeros_like(repeated)
    follows[:, :-1] = repeated[:, 1:]
    at = np.flatnonzero(repeated | follows)
    starts, ends = ~repeated.ravel()[at], ~follows.ravel()[at]
    return np.stack([at, at[starts][np.cumsum(starts) - 1], at[ends][np.cumsum(ends) - ends]])


def _centred(
    x: NDArray[np.floating], valid: NDArray[np.bool_], count: NDArray[np.integer]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Deviations from the mean of the valid entries, 0 elsewhere, and that mean ``[D]``."""
    kept = np.where(valid, x, np.float64(0))
    mean = kept.sum(axis=1, keepdims=True) / count
    kept -= mean
    kept *= valid
    return kept, mean[:, 0]

"""Ranks and correlations over the stocks of each date, NaN left out."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["correlation", "rank_ic", "ranks"]


def ranks(x: ArrayLike) -> NDArray[np.float64]:
    """Ranks 1..n along the last axis of ``[D, N]``, ties get their average rank; NaN stays NaN and is not counted."""
    x = np.asarray(x)
    order = np.argsort(x, axis=1)  # NaN last
    ordered = np.take_along_axis(x, order, axis=1)
    position = np.broadcast_to(np.arange(1.0, x.shape[1] + 1), x.shape)
    starts = np.ones(x.shape, dtype=bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    ends = np.ones(x.shape, dtype=bool)
    ends[:, :-1] = starts[:, 1:]
    first = np.maximum.accumulate(np.where(starts, position, 0), axis=1)
    last = np.minimum.accumulate(np.where(ends, position, np.inf)[:, ::-1], axis=1)[:, ::-1]
    out = np.empty(x.shape)
    np.put_along_axis(out, order, (first + last) / 2, axis=1)
    out[np.isnan(x)] = np.nan
    return out


def correlation(x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
    """Pearson correlation per row of two ``[D, N]`` arrays over the stocks that are finite in both.

    Returns:
        ``[D]``; NaN where fewer than two stocks are left or one side is constant.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    valid = np.isfinite(x) & np.isfinite(y)
    count = np.maximum(valid.sum(axis=1, keepdims=True), 1)

    def centred(a: NDArray[np.float64]) -> NDArray[np.float64]:
        a = np.where(valid, a, 0.0)
        return np.where(valid, a - a.sum(axis=1, keepdims=True) / count, 0.0)

    a, b = centred(x), centred(y)
    saa, sbb, sab = (np.einsum("dn,dn->d", p, q) for p, q in ((a, a), (b, b), (a, b)))
    # a constant row leaves rounding noise, not exact zeros: judge constancy on the values themselves
    varies = _varies(x, valid) & _varies(y, valid) & (saa > 0) & (sbb > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(varies, np.clip(sab / np.sqrt(saa * sbb), -1, 1), np.nan)


def rank_ic(scores: ArrayLike, returns: ArrayLike) -> NDArray[np.float64]:
    """Spearman correlation per row of two ``[D, N]`` arrays over the stocks finite in both; average ranks for ties.

    Returns:
        ``[D]``; NaN where fewer than two stocks are left or one side is constant.
    """
    scores, returns = np.asarray(scores), np.asarray(returns)
    valid = np.isfinite(scores) & np.isfinite(returns)
    return correlation(ranks(np.where(valid, scores, np.nan)), ranks(np.where(valid, returns, np.nan)))


def _varies(x: NDArray[np.float64], valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(
        np.max(x, axis=1, where=valid, initial=-np.inf) > np.min(x, axis=1, where=valid, initial=np.inf)
    )

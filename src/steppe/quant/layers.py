"""Layers by score: what each of them earned, and how much of it is exchanged from date to date."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steppe.quant import performance
from steppe.quant.ranking import date_blocks, ranks

__all__ = ["Layers", "form_layers", "layer_of", "staggered_figures", "top_figures"]


@dataclass(frozen=True)
class Layers:
    """Layers of K dates. Column 0 of the figures is the equal-weight universe, the last one the highest scores.

    Attributes:
        layer: ``[K, N]`` 1..L, 0 outside the universe.
        size: ``[K, L + 1]`` stocks.
    """

    layer: NDArray[np.int16]
    size: NDArray[np.int64]

    def take(self, index: NDArray[np.bool_]) -> Layers:
        """Some of the dates."""
        return Layers(self.layer[index], self.size[index])

    def mean(self, returns: NDArray[np.floating]) -> NDArray[np.float64]:
        """The equal-weight mean of ``returns [K, N]``, ``[K, L + 1]``; NaN for an empty layer."""
        total = self._sum(lambda block: returns[block])
        total[:, 0] = total[:, 1:].sum(axis=1)  # cell 0 held the stocks outside
        with np.errstate(invalid="ignore", divide="ignore"):
            return total / self.size

    def entered(self) -> NDArray[np.float64]:
        """``[K, L + 1]``: the share of a layer's stocks that were not in it one date before; NaN on the first."""
        before = np.vstack([np.zeros_like(self.layer[:1]), self.layer[:-1]])
        stayed = self._sum(lambda block: self.layer[block] == before[block])
        stayed[:, 0] = np.count_nonzero((self.layer > 0) & (before > 0), axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            share = 1 - stayed / self.size
        share[:1] = np.nan
        return share

    def turnover(self, returns: NDArray[np.floating]) -> float:
        """Of the top layer: the mean over rebalances of sum_i abs(w_i - w_i drifted with ``returns [K, N]``).

        Two-sided: 2 is a full exchange. NaN for a single date.
        """
        if len(self.layer) < 2:
            return float("nan")
        date, stock = np.nonzero(self.layer == self.size.shape[1] - 1)
        grown = 1.0 + returns[date, stock]
        drifted = np.zeros(self.layer.shape)
        drifted[date, stock] = grown / np.bincount(date, grown)[date]
        later = date > 0
        date, stock = date[later], stock[later]
        # both sum to 1, so sum |a - b| = 2 - 2 sum min(a, b)
        common = np.minimum(1 / self.size[date, -1], drifted[date - 1, stock]).sum()
        return float(2 - 2 * common / (len(self.layer) - 1))

    def _sum(self, values: Callable[[slice], NDArray[Any]]) -> NDArray[np.float64]:
        """``[K, L + 1]``: sums by date and layer of the ``[dates, N]`` values of a block of dates."""
        out = np.empty(self.size.shape)
        for block in date_blocks(self.layer.shape):
            cell = _cells(self.layer[block], self.size.shape[1])
            out[block].ravel()[:] = np.bincount(cell, values(block).ravel(), out[block].size)
        return out


def form_layers(ranks: NDArray[np.float64], layers: int) -> Layers:
    """Layers from ``ranks [K, N]``, 1..n and 0 for what is left out; see `layer_of`."""
    layer = np.empty(ranks.shape, dtype=np.int16)
    size = np.empty((len(ranks), layers + 1), dtype=np.int64)
    for block in date_blocks(ranks.shape):
        rank = ranks[block]
        count = np.count_nonzero(rank, axis=1)
        # 2 r - 1 is a whole number, so that the one division decides every boundary exactly
        place = rank * (2 * layers)
        place -= layers
        place /= (2 * np.maximum(count, 1))[:, None]
        place += 1
        place *= rank > 0
        layer[block] = place  # cuts the fraction off
        size[block] = np.bincount(
            _cells(layer[block], layers + 1), minlength=(layers + 1) * len(rank)
        ).reshape(-1, layers + 1)
        size[block, 0] = count
    return Layers(layer, size)


def _cells(layer: NDArray[np.int16], width: int) -> NDArray[np.int64]:
    return (layer + width * np.arange(len(layer), dtype=np.int64)[:, None]).ravel()


def layer_of(scores: ArrayLike, layers: int) -> NDArray[np.int16]:
    """The layer 1..layers of each score of ``[D, N]`` by rank, 0 where NaN.

    Rank r of n goes to layer ``floor((r - 1/2) / n * layers) + 1``; tied scores share their average rank and
    so their layer: the result depends on neither the order of the stocks nor the scale of the scores.
    """
    return form_layers(np.nan_to_num(ranks(scores), nan=0.0), layers).layer


def top_figures(returns: NDArray[np.float64], sessions: int) -> dict[str, float]:
    """Of layer returns ``[K, L + 1]`` over so many sessions each, one after the other; NaN for none.

    Returns:
        annual_return of the top layer, annual_excess over the universe, information_ratio.
    """
    if not len(returns):
        return dict.fromkeys(("annual_return", "annual_excess", "information_ratio"), float("nan"))
    best, universe, year = returns[:, -1], returns[:, 0], performance.SESSIONS_PER_YEAR / sessions
    return {
        "annual_return": performance.annual_return(best, year),
        "annual_excess": performance.annual_excess(best, universe, year),
        "information_ratio": performance.information_ratio(best, universe, year),
    }


def staggered_figures(
    returns: NDArray[np.float64], rows: NDArray[np.integer], sessions: int
) -> dict[str, float]:
    """`top_figures` of periods that may overlap: the mean over the series of every k-th period, none of which does.

    Args:
        returns: ``[K, L + 1]``; dates with NaN are left out.
        rows: ``[K]`` the sessions the periods start from.
        sessions: length of a period.
    """
    kept = np.isfinite(returns[:, 0])
    returns, rows = returns[kept], rows[kept]
    gap = int(np.diff(rows).min()) if len(rows) > 1 else sessions
    every = max(min(-(-sessions // gap), len(rows)), 1)
    series = [top_figures(returns[start::every], sessions) for start in range(every)]
    return {key: float(np.mean([figures[key] for figures in series])) for key in series[0]}

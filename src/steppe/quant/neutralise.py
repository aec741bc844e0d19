"""Scores without outliers and without what industry and size explain: the published test's preparation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steppe.core.errors import SpecError
from steppe.quant.ranking import date_blocks

__all__ = ["MAD", "Neutraliser", "neutralised", "winsorised"]

MAD = 5.0
"""Scores beyond this many median absolute deviations are pulled in before neutralising (published: 5)."""


def winsorised(scores: ArrayLike, reach: float = MAD) -> NDArray[np.float64]:
    """Scores pulled in to the median +- `reach` median absolute deviations of their date.

    Where more than half the stocks of a date are tied there is no spread to judge an outlier by: unchanged.

    Args:
        scores: ``[D, N]``; NaN is left out and stays.
        reach: median absolute deviations, not scaled to a standard deviation; published 5.

    Raises:
        SpecError: reach is not above 0.
    """
    if not reach > 0:
        raise SpecError(f"reach {reach}: median absolute deviations, above 0.")
    x = np.array(scores, dtype=np.float64)
    for block in date_blocks(x.shape):
        centre = _median(x[block])
        spread = _median(np.abs(x[block] - centre))
        bound = np.where(spread > 0, reach * spread, np.inf)
        np.clip(x[block], centre - bound, centre + bound, out=x[block])
    return x


class Neutraliser:
    """Industry and log float cap of the evaluation dates, taken out of any number of scores.

    Args:
        industry: ``[D, N]``; unknown (-1) is a group of its own.
        float_cap: ``[D, N]``, > 0; NaN unknown.
    """

    def __init__(self, industry: NDArray[np.integer], float_cap: NDArray[np.floating]) -> None:
        with np.errstate(invalid="ignore", divide="ignore"):
            self.size = np.log(np.asarray(float_cap, dtype=np.float64))
        self.known = np.isfinite(self.size)
        self.size[~self.known] = 0.0
        self.group = np.asarray(industry + 1, dtype=np.int16)
        self.groups = int(self.group.max(initial=0)) + 1

    def __call__(self, scores: ArrayLike) -> NDArray[np.float64]:
        """What is left of ``scores [D, N]``; see `neutralised`."""
        x = np.asarray(scores, dtype=np.float64)
        valid = np.isfinite(x) & self.known
        out = winsorised(np.where(valid, x, np.nan))
        for block in date_blocks(x.shape):
            out[block] = self._residual(block, out[block], valid[block])
        return out

    def _residual(
        self, block: slice, x: NDArray[np.float64], valid: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        # one cell per date and industry, and a last one per date for the stocks that are left out
        width = self.groups + 1
        cell = np.where(valid, self.group[block], self.groups) + width * np.arange(len(x))[:, None]
        count = np.maximum(np.bincount(cell.ravel(), minlength=width * len(x)), 1)

        def within(a: NDArray[np.float64]) -> NDArray[np.float64]:
            a = np.where(valid, a, 0.0)
            mean = np.bincount(cell.ravel(), a.ravel(), minlength=len(count)) / count
            a -= mean[cell]
            return a

        x, size = within(x), within(self.size[block])
        size *= valid
        explained = np.einsum("dn,dn->d", size, size)
        slope = np.divide(
            np.einsum("dn,dn->d", x, size), explained, out=np.zeros(len(x)), where=explained > 1e-9
        )
        size *= slope[:, None]
        x -= size
        x[~valid] = np.nan
        return x


def neutralised(
    scores: ArrayLike, industry: NDArray[np.integer], float_cap: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Scores without what industry and log float cap explain, per date.

    Scores are pulled in by `winsorised`, then the residual of the least-squares regression on industry dummies
    and log float cap is taken (solved exactly by demeaning within industries first).

    Args:
        scores: ``[D, N]``, NaN outside the universe.
        industry: ``[D, N]``; unknown (-1) is a group of its own.
        float_cap: ``[D, N]``, > 0; NaN unknown.

    Returns:
        ``[D, N]``; NaN where the score or the float cap is.
    """
    return Neutraliser(industry, float_cap)(scores)


def _median(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Median per row without NaN, ``[D, 1]``; NaN for an empty row (numpy's would warn)."""
    ordered = np.sort(x, axis=1)
    count = (~np.isnan(x)).sum(axis=1)[:, None]
    low, high = np.maximum((count - 1) // 2, 0), count // 2
    return (
        np.take_along_axis(ordered, low, axis=1)
        + np.take_along_axis(ordered, np.minimum(high, x.shape[1] - 1), axis=1)
    ) / 2

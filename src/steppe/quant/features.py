"""The feed: from bars to a date's standardised windows, without ever materialising windows.

Bars are time-major, so the windows of a whole cross-section are one slice of rows, which is also the layout
``nn.GRU`` wants (``[window, stocks, fields]``).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["cross_section", "has_window", "standardise"]


def standardise(values: Tensor) -> Tensor:
    """Z-score over the stocks, dimension -2 of ``[..., stocks, fields]``; a constant column becomes 0."""
    std, mean = torch.std_mean(values, dim=-2, keepdim=True, correction=0)
    return (values - mean).div_(torch.where(std > 1e-7, std, torch.inf))


def cross_section(
    bars: NDArray[np.float32], date: int, stocks: NDArray[np.intp], window: int, stride: int = 1
) -> Tensor:
    """The feature windows of ``stocks`` at ``date``: ``[window, len(stocks), 6]`` float32.

    Rows ``date - stride*(window-1), ..., date - stride, date``; each series is divided by its last value, then
    standardised over the stocks per lag and field. Nothing after ``date`` is read.
    """
    rows = bars[date - stride * (window - 1) : date + 1 : stride]
    raw = torch.from_numpy(np.take(rows, stocks, axis=1))
    return standardise(raw / raw[-1])


def has_window(bars: NDArray[np.float32], window: int, stride: int = 1) -> NDArray[np.bool_]:
    """``[T, N]`` bool: a full window of bars ends here and its last values are positive (so it can be divided)."""
    span = stride * (window - 1)
    mask = np.zeros(bars.shape[:2], dtype=bool)
    if len(bars) > span:
        # bars have no holes after the first one, so the oldest row decides
        mask[span:] = ~np.isnan(bars[: len(bars) - span, :, 0]) & (bars[span:] > 0).all(axis=2)
    return mask

"""Bars a model reads: daily bars without holes, and rolling bars of several sessions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from steppe.quant.panel import FIELDS, Panel

__all__ = ["carried_closes", "daily_bars", "rolling_bars"]

_OPEN, _HIGH, _LOW, _CLOSE, _VWAP, _VOLUME = range(len(FIELDS))


def daily_bars(panel: Panel) -> NDArray[np.float32]:
    """``[T, N, 6]``: the panel's bars with suspensions filled from the past.

    On a date without trading all prices are the last known close and the volume is 0. Before the first bar
    everything is NaN; after the last one the last close stays (the universe excludes such stocks).
    """
    dates, _ = panel.shape
    traded = np.asarray(panel.traded)
    row = np.where(traded, np.arange(dates, dtype=np.int32)[:, None], np.int32(-1))
    last = np.maximum.accumulate(row, axis=0)
    close = np.take_along_axis(np.asarray(panel.field("close")), np.maximum(last, 0), axis=0)
    bars = np.array(panel.values)
    filled = ~traded & (last >= 0)
    for field in (_OPEN, _HIGH, _LOW, _CLOSE, _VWAP):
        np.copyto(bars[:, :, field], close, where=filled)
    bars[:, :, _VOLUME][filled] = 0.0
    bars[last < 0] = np.nan
    return bars


def carried_closes(close: NDArray[np.float32]) -> NDArray[np.float32]:
    """``[T, N]`` with the last close on dates without one; NaN before the first."""
    row = np.where(np.isfinite(close), np.arange(len(close), dtype=np.int32)[:, None], np.int32(0))
    carried: NDArray[np.float32] = np.take_along_axis(close, np.maximum.accumulate(row, axis=0), axis=0)
    return carried


def rolling_bars(bars: NDArray[np.float32], sessions: int) -> NDArray[np.float32]:
    """``[T, N, 6]``: at each date t the bar of the ``sessions`` sessions that end on t.

    First open, highest high, lowest low, last close, summed volume, and the volume-weighted mean of the vwaps
    (the close where nothing traded). Rolling bars end on the signal's date, so none holds a later session.
    The first ``sessions - 1`` rows are NaN.
    """
    rolled = np.full_like(bars, np.nan)
    if len(bars) < sessions:
        return rolled
    tail = rolled[sessions - 1 :]
    shifted = [bars[k : len(bars) - sessions + 1 + k] for k in range(sessions)]  # oldest session first
    tail[:, :, _OPEN] = shifted[0][:, :, _OPEN]
    tail[:, :, _CLOSE] = shifted[-1][:, :, _CLOSE]
    tail[:, :, _HIGH] = shifted[0][:, :, _HIGH]
    tail[:, :, _LOW] = shifted[0][:, :, _LOW]
    volume = shifted[0][:, :, _VOLUME].astype(np.float64)
    amount = volume * shifted[0][:, :, _VWAP]
    for bar in shifted[1:]:
        np.maximum(tail[:, :, _HIGH], bar[:, :, _HIGH], out=tail[:, :, _HIGH])
        np.minimum(tail[:, :, _LOW], bar[:, :, _LOW], out=tail[:, :, _LOW])
        volume += bar[:, :, _VOLUME]
        amount += bar[:, :, _VOLUME].astype(np.float64) * bar[:, :, _VWAP]
    tail[:, :, _VOLUME] = volume
    with np.errstate(invalid="ignore", divide="ignore"):
        tail[:, :, _VWAP] = np.where(volume > 0, amount / volume, tail[:, :, _CLOSE])
    return rolled

"""Panels made by hand for tests."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steppe.quant.panel import Panel


def make_panel(shape: tuple[int, int] = (40, 8), *, seed: int = 0, **overrides: Any) -> Panel:
    """A small consistent panel of `shape` (dates, stocks): a plain market in which everything trades.

    Business days from 2015-01-05, symbols S000, S001, ...; prices follow a random walk from 10 (vwap between
    low and high), factor 1, volume about a million shares. All stocks are traded, listed for 1000 days and more,
    not special, never at a limit, never delisted. Two industries take turns; the float cap is close x a fixed
    number of shares. One index "IDX": the first half of the stocks, weights by float cap, and its price index
    (float-cap weighted, weights of the evening before, from 1000).

    `overrides` replace whole fields of `Panel`. To suspend, delist or seal something, take the fields of a made
    panel, edit copies, and make it again; or let `traded` alone be given: values and factor become NaN where it
    is False.
    """
    dates, stocks = shape
    rng = np.random.default_rng(seed)
    close = 10 * np.exp(np.cumsum(0.02 * rng.standard_normal(shape), axis=0))
    opened = close * np.exp(0.005 * rng.standard_normal(shape))
    low = np.minimum(opened, close) * (1 - 0.01 * rng.random(shape))
    high = np.maximum(opened, close) * (1 + 0.01 * rng.random(shape))
    vwap = low + (high - low) * rng.uniform(0.3, 0.7, shape)
    volume = 1e6 * np.exp(0.3 * rng.standard_normal(shape))
    values = np.stack([opened, high, low, close, vwap, volume], axis=2).astype(np.float32)
    cap = (close * 1e8 * np.exp(rng.standard_normal(stocks))).astype(np.float32)
    member = np.zeros(shape, np.bool_)
    member[:, : max(stocks // 2, 1)] = True
    weights = np.where(member, cap, 0).astype(np.float64)
    growth = [weights[t].sum() / weights[t - 1].sum() for t in range(1, dates)]
    off = np.zeros(shape, np.bool_)
    panel = Panel(
        name="made",
        simulated=True,
        fingerprint="0" * 64,
        dates=np.busday_offset("2015-01-05", np.arange(dates)),
        symbols=np.array([f"S{i:03d}" for i in range(stocks)]),
        values=values,
        factor=np.ones(shape, np.float32),
        traded=~off,
        listed=~off,
        delisted=off.copy(),
        age=1000 + np.broadcast_to(np.arange(dates, dtype=np.int32)[:, None], shape),
        limit_up=off.copy(),
        limit_down=off.copy(),
        sealed_up=off.copy(),
        sealed_down=off.copy(),
        special=off.copy(),
        industry=np.broadcast_to(np.arange(stocks, dtype=np.int16) % 2, shape).copy(),
        float_cap=cap,
        industries=("banks", "steel"),
        members={"IDX": member},
        weights={"IDX": (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)},
        benchmarks={"IDX": 1000 * np.cumprod([1.0, *growth])},
    )
    if "traded" in overrides:
        on = np.asarray(overrides["traded"])
        overrides = {
            "values": np.where(on[:, :, None], panel.values, np.float32(np.nan)),
            "factor": np.where(on, panel.factor, np.float32(np.nan)),
        } | overrides
    return replace(panel, **overrides)


def with_other_future(panel: Panel, row: int, seed: int = 0) -> Panel:
    """The panel with everything after `row` replaced by noise: values, masks, members, weights, levels."""
    rng = np.random.default_rng([row, seed])

    def noisy(plane: NDArray[Any]) -> NDArray[Any]:
        plane = np.array(plane)
        tail = plane[row + 1 :]
        if plane.dtype == bool:
            plane[row + 1 :] = rng.random(tail.shape) < 0.5
        elif np.issubdtype(plane.dtype, np.integer):
            plane[row + 1 :] = rng.integers(0, 2, tail.shape)
        else:
            plane[row + 1 :] = np.exp(rng.normal(size=tail.shape))
        return plane

    planes = {f.name: getattr(panel, f.name) for f in fields(panel)}
    arrays = {k: noisy(v) for k, v in planes.items() if isinstance(v, np.ndarray) and v.ndim == 2}
    values = noisy(panel.values)
    arrays["values"] = np.where(arrays["traded"][:, :, None], values, np.nan).astype(np.float32)
    named = {
        kind: {name: noisy(plane) for name, plane in getattr(panel, kind).items()}
        for kind in ("members", "weights", "benchmarks")
    }
    return replace(panel, **arrays, **named)

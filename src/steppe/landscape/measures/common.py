"""What several measures share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from steppe.core.errors import SpecError
from steppe.landscape.point import Point

__all__ = ["allowed_rise", "crossing", "finite_or_inf", "normal", "over", "require_positive", "scale_of"]


def scale_of(theta: Tensor, adaptive: bool) -> Tensor:
    """The unit in which each weight moves, ``[dim]``: its own size, so that rescaling changes nothing, or 1.

    Biases count as weights, and there is no floor: with either, invariance would not be exact. A weight of 0 stays.
    """
    return theta.abs() if adaptive else torch.ones_like(theta)


def normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent standard normal numbers of the shape, dtype and device of `like`, drawn on the CPU."""
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def over(point: Point, per_batch: bool) -> list[tuple[float, int | None]]:
    """(weight in the mean, batch number): each batch on its own, or all data at once (None)."""
    return list(zip(point.shares, range(len(point.batches)), strict=True)) if per_batch else [(1.0, None)]


def allowed_rise(loss: float, rise: float | None) -> float:
    """How far the loss may rise: `rise`, by default a tenth of the size of the loss itself.

    Raises:
        SpecError: it is not above 0.
    """
    rise = 0.1 * abs(loss) if rise is None else rise
    if not rise > 0:
        raise SpecError(
            f"the allowed rise of the loss must be above 0, got {rise}: give it in units of the loss."
        )
    return rise


def crossing(above: Callable[[float], bool], first: float, limit: float, tol: float) -> tuple[float, float]:
    """(low, high) with ``above(high)``, not ``above(low)`` and ``high <= (1 + tol) low``, by doubling and bisection.

    Where `above` is still false at `limit` the answer is (limit, inf); where it is true at all sizes down to
    ``first / 2^60``, (0, that size).
    """
    low, high = 0.0, min(first, limit)
    while not above(high):
        if high >= limit:
            return limit, math.inf
        low, high = high, min(2 * high, limit)
    while low == 0:
        if high < first * 2.0**-60:
            return 0.0, high
        if above(high / 2):
            high /= 2
        else:
            low = high / 2
    while high > (1 + tol) * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if above(middle) else (middle, high)
    return low, high


def finite_or_inf(value: float) -> float:
    """A loss that overflowed counts as infinitely large."""
    return value if math.isfinite(value) else math.inf


def require_positive(**values: float) -> None:
    """Raise a `SpecError` that names each argument not above 0."""
    wrong = [f"{name}={value}" for name, value in values.items() if not value > 0]
    if wrong:
        raise SpecError(f"must be above 0: {', '.join(wrong)}.")

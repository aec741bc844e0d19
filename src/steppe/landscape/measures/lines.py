"""The loss along straight lines: the width of the basin, and the barrier between two trained models."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from steppe.core.errors import SpecError
from steppe.landscape.directions import random_directions
from steppe.landscape.measures.common import allowed_rise, crossing, finite_or_inf, require_positive
from steppe.landscape.point import Measurement, Point

__all__ = ["barrier", "basin_width"]


def basin_width(
    point: Point,
    generator: torch.Generator,
    rise: float | None = None,
    lines: int = 10,
    normalise: Literal["filter", "layer", "none"] = "filter",
    tol: float = 0.02,
    limit: float = 10.0,
) -> Measurement:
    """Flat volume: the geometric mean of the basin's radius along random lines; the larger, the flatter.

    The volume of Huang et al. 2020, arXiv:1906.03291, per dimension and with the filter-normalised
    directions of Li et al. 2018, arXiv:1712.09913, section 4 ::

        exp mean log r(u),   r(u) = min { r : L(w + r u) > L(w) + rise },   both ways along each line

    Huang et al. take the mean of ``r^dim``, which in many dimensions is that of the one luckiest line; the mean of the
    logarithm can be estimated. For a quadratic at its minimum ``r = sqrt(2 rise / uᵀHu)``.

    Args:
        point: where.
        generator: draws the directions.
        rise: what the loss may rise by; default ``0.1 |L(w)|`` (ours). To compare nets, give one number for all.
        lines: lines, each gone along both ways.
        normalise: as in `random_directions`; ``"none"`` is not scale-invariant.
        tol: relative width of the last interval for a radius.
        limit: largest radius tried; a line that stays below has ``converged=False`` and counts with it.

    Raises:
        SpecError: a number that is not above 0, fewer than 2 lines, or the default rise at a loss of 0.
    """
    before, theta, here = point.cost, point.theta, point.value()
    require_positive(lines=lines - 1, tol=tol, limit=limit)
    rise = allowed_rise(here, rise)
    first, logs, unbounded = min(0.1, limit), [], 0
    for direction in random_directions(point, generator, n=lines, normalise=normalise):
        total = 0.0
        for way in (direction, -direction):

            def above(r: float, way: Tensor = way) -> bool:
                return finite_or_inf(point.value(theta.add(way, alpha=r))) - here > rise

            low, high = crossing(above, first, limit, tol)
            unbounded += high == math.inf
            radius = math.sqrt(low * high) if 0 < low < high < math.inf else low or high
            total, first = total + math.log(radius), min(radius, limit)
        logs.append(total / 2)
    found = torch.tensor(logs, dtype=torch.float64)
    value = math.exp(float(found.mean()))
    error = value * float(found.std()) / math.sqrt(lines)
    note = f"{unbounded} of {2 * lines} ways end at {limit:g} without the rise" if unbounded else ""
    return Measurement(value, error, unbounded == 0, point.cost - before, note)


def barrier(point: Point, generator: torch.Generator, other: Tensor, resolution: int = 21) -> Measurement:
    """The linear-connectivity barrier between the point's weights a and other weights b.

    Frankle et al. 2020, arXiv:1912.05671, section 2, with the ends joined as in Entezari et al. 2022,
    arXiv:2110.06296, definition of the barrier ::

        max over t of  L((1 - t) a + t b) - ((1 - t) L(a) + t L(b))

    On a grid of t; 0 where the path never rises above its ends. It belongs to these two sets of weights: permuting or
    rescaling the units of one of them alone changes the path, not the function.

    Args:
        point: where a is.
        generator: not used.
        other: b, ``[dim]``, such as `Point.theta` of another seed.
        resolution: values of t, the two ends included.

    Raises:
        SpecError: `other` has another length, or `resolution` is below 3.
    """
    before, theta = point.cost, point.theta
    if other.shape != theta.shape or resolution < 3:
        raise SpecError(
            f"need other weights of shape [{point.dim}] and a resolution of 3 or more, got {list(other.shape)} and "
            f"{resolution}."
        )
    shares = [i / (resolution - 1) for i in range(resolution)]
    losses = [point.value(torch.lerp(theta, other.to(theta), t)) for t in shares]
    heights = [loss - ((1 - t) * losses[0] + t * losses[-1]) for t, loss in zip(shares, losses, strict=True)]
    highest = max(range(1, resolution - 1), key=heights.__getitem__)
    note = f"highest at t = {shares[highest]:.3g}" if heights[highest] > 0 else ""
    return Measurement(max(heights[highest], 0.0), math.nan, True, point.cost - before, note)

"""The loss under random weights around the trained ones: average-case sharpness and PAC-Bayes flatness."""

from __future__ import annotations

import math

import torch

from steppe.landscape.measures.common import (
    allowed_rise,
    crossing,
    finite_or_inf,
    normal,
    require_positive,
    scale_of,
)
from steppe.landscape.point import Measurement, Point
from steppe.landscape.spectrum import measured

__all__ = ["average_case_sharpness", "pac_bayes_flatness"]


def average_case_sharpness(
    point: Point,
    generator: torch.Generator,
    rho: float | None = None,
    adaptive: bool = False,
    stderr: float = 0.1,
    max_pairs: int = 50,
) -> Measurement:
    """Average-case sharpness.

    Andriushchenko et al. 2023, arXiv:2302.07011, average-case adaptive sharpness ::

        E L(w + d) - L(w),   d ~ N(0, rho² diag(T²)),   T = |w| or 1;   about rho²/2 · Σ T_i² H_ii

    Noise is drawn in pairs d and -d (ours): the gradient then cancels, which else hides the curvature.

    Args:
        point: where.
        generator: draws the noise.
        rho: standard deviation; default 0.1 if adaptive (the official code's), else 0.01 (ours: like a tenth of each
            weight where weights are of size 0.1).
        adaptive: noise relative to each weight, which makes it scale-invariant.
        stderr: wanted standard error over the value; at least 10 pairs are drawn.
        max_pairs: pairs at most, two forward passes each; what is known by then has ``converged=False``.

    Raises:
        SpecError: a number that is not above 0, or fewer than 2 pairs.
    """
    before, theta = point.cost, point.theta
    rho = (0.1 if adaptive else 0.01) if rho is None else rho
    require_positive(rho=rho)
    scale, here = rho * scale_of(theta, adaptive), point.value()

    def pair() -> float:
        noise = scale * normal(theta, generator)
        return (point.value(theta + noise) + point.value(theta - noise)) / 2 - here

    return measured(point, before, pair, stderr, max_pairs)


def pac_bayes_flatness(
    point: Point,
    generator: torch.Generator,
    rise: float | None = None,
    adaptive: bool = False,
    pairs: int = 5,
    tol: float = 0.01,
    limit: float = 1e3,
) -> Measurement:
    """``1 / sigma²``, sigma the noise that the weights stand.

    Jiang et al. 2020, arXiv:1912.02178, equations 53 (plain) and 61 (magnitude-aware) of appendix C ::

        sigma = max { s : E L(w + s T u) - L(w) <= rise },   u ~ N(0, 1),   T = 1 or |w|

    By bisection on the same noise for each s, drawn in pairs ±u, so that the mean is a smooth function of s. The paper
    takes the root over the number of samples, lets the accuracy fall by 0.1, and gives the noise of the second form the
    variance ``s² |w|² + 1e-6``, whose last term is left out here: without it the form is exactly scale-invariant.

    Args:
        point: where.
        generator: draws the seed of the noise.
        rise: what the loss may rise by; default ``0.1 |L(w)|`` (ours). To compare nets, give one number for all.
        adaptive: noise relative to each weight.
        pairs: draws of ±u; five make the ten draws that re-implementations take.
        tol: relative width of the last interval for sigma.
        limit: largest s tried; a net that stands it has ``converged=False``.

    Raises:
        SpecError: a number that is not above 0, fewer than 2 pairs, or the default rise at a loss of 0.
    """
    before, theta = point.cost, point.theta
    require_positive(tol=tol, limit=limit, pairs=pairs - 1)
    scale, here = scale_of(theta, adaptive), point.value()
    rise = allowed_rise(here, rise)
    seed = int(torch.randint(2**62, (), generator=generator))
    seen: dict[float, torch.Tensor] = {}

    def increases(sigma: float) -> torch.Tensor:
        if sigma not in seen:
            # drawn anew for each s, not kept: `pairs` copies of the weights would be
            stream, found = torch.Generator().manual_seed(seed), []
            for _ in range(pairs):
                noise = sigma * scale * normal(theta, stream)
                both = point.value(theta + noise) + point.value(theta - noise)
                found.append(finite_or_inf(both / 2 - here))
            seen[sigma] = torch.tensor(found, dtype=torch.float64)
        return seen[sigma]

    first = 0.1 if adaptive else 0.1 * float(theta.norm()) / math.sqrt(point.dim) or 0.1
    low, high = crossing(lambda sigma: float(increases(sigma).mean()) > rise, first, limit, tol)
    if low == 0 or high == math.inf:
        note = (
            f"no sigma up to {limit:g} raises the loss by {rise:.3g}" if low else "any noise raises the loss"
        )
        return Measurement(1 / low**2 if low else math.inf, math.nan, False, point.cost - before, note)
    sigma = math.sqrt(low * high)
    slope = float(increases(high).mean() - increases(low).mean()) / (high - low)
    error = float(increases(low).std()) / math.sqrt(pairs) / slope if slope > 0 else math.nan
    note = f"sigma {sigma:.4g} for a rise of {rise:.3g}"
    return Measurement(1 / sigma**2, 2 * error / sigma**3, True, point.cost - before, note)

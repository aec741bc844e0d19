"""Sharpness as sharpness-aware minimization sees it."""

from __future__ import annotations

import math

import torch

from steppe.landscape.measures.common import over, require_positive, scale_of
from steppe.landscape.point import Measurement, Point

__all__ = ["sam_sharpness"]


def sam_sharpness(
    point: Point,
    generator: torch.Generator,
    rho: float | None = None,
    adaptive: bool = False,
    per_batch: bool = True,
) -> Measurement:
    """m-sharpness after one ascent step, m the size of a batch.

    Foret et al. 2021, arXiv:2010.01412, equation 2 for the step and section 4.2 for m; adaptive: Kwon et al. 2021,
    arXiv:2102.11600, definition 2 with p = 2 and algorithm 1 ::

        mean over batches b of  L_b(w + e_b) - L_b(w),   e_b = rho · T² ∇L_b(w) / ‖T ∇L_b(w)‖,   T = |w| or 1

    It is a lower bound of the true maximum. One gradient and one forward pass over the data.

    Args:
        point: where; its batches are the m samples.
        generator: not used.
        rho: radius; default 0.05 (Foret et al.), adaptive 0.5 (Kwon et al.).
        adaptive: T = |w|, biases included and without Kwon et al.'s floor, which makes it exactly scale-invariant.
        per_batch: a perturbation for each batch; False: one for all data (n-sharpness).

    Raises:
        SpecError: `rho` is not above 0.
    """
    before, theta = point.cost, point.theta
    rho = (0.5 if adaptive else 0.05) if rho is None else rho
    require_positive(rho=rho)
    scale, value = scale_of(theta, adaptive), 0.0
    for share, batch in over(point, per_batch):
        here, gradient = point.gradient(batch=batch)
        scaled = scale * gradient
        if length := float(scaled.norm()):
            value += share * (point.value(theta + scale * scaled * (rho / length), batch) - here)
    return Measurement(value, math.nan, True, point.cost - before)

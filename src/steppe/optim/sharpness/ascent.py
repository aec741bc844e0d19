"""Where to look: perturbations e of the weights, as a direction and one length per bucket."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steppe.optim.sharpness.vectors import Bucket, Vector

__all__ = ["EPS", "Perturbation", "elementwise", "magnitudes", "steepest"]

EPS = 1e-12
"""Added to norms before a division, as in the reference implementations: a zero gradient gives e = 0."""


class Perturbation(NamedTuple):
    """e = length · direction, one length per bucket; kept apart so that w + e costs one fused kernel."""

    direction: Vector
    lengths: list[float]

    @property
    def norm(self) -> float:
        """‖e‖."""
        return math.hypot(*(a * n for a, n in zip(self.lengths, self.direction.norms, strict=True)))

    @property
    def norm_if_known(self) -> float:
        """‖e‖ if the direction has been measured before, else nan."""
        return self.norm if "norms" in vars(self.direction) else math.nan


def steepest(d: Vector, rho: Sequence[float], eps: float = EPS) -> Perturbation:
    """e = rho · d / (‖d‖ + eps): the norm is over all groups, rho is each group's own."""
    return Perturbation(d, [r / (d.norm + eps) for r in rho])


def elementwise(
    g: Vector, rho: Sequence[float], scales: Sequence[list[Tensor] | None], eps: float = EPS
) -> Perturbation:
    """e = rho · T²g / (‖Tg‖ + eps): the steepest ascent in the ball ‖e / T‖ ≤ rho.

    Args:
        g: the gradient.
        rho: radius, one per bucket.
        scales: T per bucket, non-negative and shaped like g; None for T = 1.
        eps: added to ‖Tg‖.
    """
    scaled = g.like([_product(gs, ts, g.disposable) for gs, ts in zip(g.tensors, scales, strict=True)])
    lengths = [r / (scaled.norm + eps) for r in rho]
    for ss, ts in zip(scaled.tensors, scales, strict=True):
        if ts is not None:
            torch._foreach_mul_(ss, ts)
    return Perturbation(g.like(scaled.tensors), lengths)


def magnitudes(bucket: Bucket, offset: float = 0.0) -> list[Tensor]:
    """|w| + offset per parameter (the modulus of a complex weight), good until the weights are perturbed."""
    if bucket.params[0].is_complex():
        sizes = list(torch._foreach_abs(bucket.params))
    else:
        sizes = bucket.copied()
        torch._foreach_abs_(sizes)
    if offset:
        torch._foreach_add_(sizes, offset)
    return sizes


def _product(xs: list[Tensor], ys: list[Tensor] | None, over_x: bool) -> list[Tensor]:
    if ys is None:
        return xs
    if over_x and not xs[0].is_complex():
        torch._foreach_mul_(xs, ys)
        return xs
    return list(torch._foreach_mul(xs, ys))

"""Penalising the gradient's norm."""

from __future__ import annotations

from typing import Any

import torch

from steppe.optim.sharpness.ascent import EPS
from steppe.optim.sharpness.base import Base, Interval
from steppe.optim.sharpness.composition import Composition, Descent, Hyper, Parts
from steppe.optim.sharpness.sam import SteepestAscent
from steppe.optim.sharpness.vectors import Vector, combine

__all__ = ["GNP", "PenalisedDescent"]


class PenalisedDescent(Descent):
    """alpha · p + (1 − alpha) · g, or where `normalise` with g / ‖g‖; without a radius, g."""

    hyper = {"alpha": Hyper(0.8, Interval(0)), "normalise": Hyper(True, (False, True))}  # noqa: RUF012
    keeps_gradient = True

    def combined(self, g: Vector, p: Vector) -> Vector:
        """See the class."""
        # alpha = lambda / rho: with rho = 0 there is no penalty, and p is g
        alpha = [
            a if r else 1.0 for a, r in zip(self.each("alpha"), self.optimizer.radius.rho(), strict=True)
        ]
        sizes = [g.norm + EPS if yes else 1.0 for yes in self.each("normalise")]
        return combine(p, alpha, g, [(1 - a) / size for a, size in zip(alpha, sizes, strict=True)])


class GNP(Composition):
    """GNP: the loss plus a penalty on the norm of its gradient.

    Zhao, Zhang, Hu 2022, arXiv:2202.03599, Algorithm 1: the gradient of L(w) + lambda · ‖∇L(w)‖, whose Hessian part
    is the difference of two gradients at a distance rho; alpha = lambda / rho. With g = ∇L(w) ::

        e = rho · g / ‖g‖
        base step with (1 − alpha) · g / ‖g‖ + alpha · ∇L(w + e)        normalise=False:  (1 − alpha) · g + ...

    Paper and code differ: the paper mixes g itself. The official code (zhaoyang-0204/gnp) mixes g / ‖g‖ unless its
    switch ``norm_perturbations`` is off; the default is the code's. Weight decay, which that code has within the
    loss and so in both passes, belongs to the base here. alpha = 1 is SAM, rho = 0 the base alone.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: the distance (code: r), >= 0; default that of the official recipe for WideResNet on CIFAR-10.
        alpha: lambda / rho, >= 0; default that of the same recipe.
        normalise: whether the clean gradient is divided by its norm.
        adaptive: scale the perturbation by |w|, see `SAM`.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=SteepestAscent, descent=PenalisedDescent)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.1,
        alpha: float = 0.8,
        normalise: bool = True,
        adaptive: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, alpha=alpha, normalise=normalise, adaptive=adaptive)

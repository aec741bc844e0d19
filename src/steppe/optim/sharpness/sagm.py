"""Sharpness-aware gradient matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steppe.optim.sharpness.ascent import Perturbation
from steppe.optim.sharpness.base import Base, Interval
from steppe.optim.sharpness.composition import Composition, Descent, Hyper, Parts
from steppe.optim.sharpness.sam import SteepestAscent
from steppe.optim.sharpness.vectors import Vector, combine

__all__ = ["SAGM", "LeaningAscent", "MeanDescent"]


class LeaningAscent(SteepestAscent):
    """`SteepestAscent` less alpha times its direction: e = (rho / ‖g‖ − alpha) · g."""

    hyper = {**SteepestAscent.hyper, "alpha": Hyper(0.001, Interval(0))}  # noqa: RUF012

    def perturbation(self, g: Vector, rho: Sequence[float]) -> Perturbation:
        """See the class."""
        e = super().perturbation(g, rho)
        lengths = [length - a for length, a in zip(e.lengths, self.each("alpha"), strict=True)]
        return e._replace(lengths=lengths)


class MeanDescent(Descent):
    """(g + p) / 2."""

    keeps_gradient = True

    def combined(self, g: Vector, p: Vector) -> Vector:
        """See the class."""
        half = [0.5] * len(g.buckets)
        return combine(p, half, g, half)


class SAGM(Composition):
    """SAGM: descend on L(w) and on L(w + e − alpha · g), which grow alike where the two gradients match.

    Wang, Zhang, Lei, Zhang 2023, arXiv:2303.10353, with g = ∇L(w) ::

        e = rho · g / ‖g‖ − alpha · g          adaptive:  e = (rho / ‖ |w| ⊙ g ‖ − alpha) · w² ⊙ g
        base step with (g + ∇L(w + e)) / 2

    The paper minimises L(w) + L(w + rho · g/‖g‖ − alpha · g), without the half; the official code
    (Wang-pengfei/SAGM), and so this, takes the mean. Its alpha is a hyper-parameter of its own, not the learning
    rate. Since e has a part that grows with g, a factor on the loss changes the algorithm.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default the official script's.
        alpha: how far the perturbed point leans back along the gradient, >= 0; default the official script's.
        adaptive: scale the perturbation by |w|, as in the official class.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=LeaningAscent, descent=MeanDescent)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        alpha: float = 0.001,
        adaptive: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, alpha=alpha, adaptive=adaptive)

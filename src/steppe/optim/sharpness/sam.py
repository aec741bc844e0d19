"""Sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steppe.optim.sharpness.ascent import Perturbation, elementwise, magnitudes, steepest
from steppe.optim.sharpness.base import Base
from steppe.optim.sharpness.composition import Ascent, Composition, Hyper, Parts
from steppe.optim.sharpness.vectors import Vector

__all__ = ["SAM", "SteepestAscent"]


class SteepestAscent(Ascent):
    """e = rho · g / ‖g‖, or where `adaptive` e = rho · w² ⊙ g / ‖ |w| ⊙ g ‖."""

    hyper = {"adaptive": Hyper(False, (False, True))}  # noqa: RUF012

    def perturbation(self, g: Vector, rho: Sequence[float]) -> Perturbation:
        """See the class."""
        adaptive = self.each("adaptive")
        if not any(adaptive):
            return steepest(g, rho)
        scales = [magnitudes(b) if yes else None for b, yes in zip(g.buckets, adaptive, strict=True)]
        return elementwise(g, rho, scales)


class SAM(Composition):
    """SAM: descend along the gradient at the worst point of a ball around the weights.

    Foret, Kleiner, Mobahi, Neyshabur 2021, arXiv:2010.01412, Algorithm 1, with g = ∇L(w) ::

        e = rho · g / ‖g‖          adaptive:  e = rho · w² ⊙ g / ‖ |w| ⊙ g ‖
        base step with ∇L(w + e)

    Paper and code: the official JAX code has weight decay inside the loss, hence in both passes. Here, as in the
    PyTorch implementation everybody uses (davda54/sam), it belongs to the base and acts at w alone. `adaptive` is
    that implementation's rule, on every parameter and without eta; the published ASAM is `steppe.optim.ASAM`.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default the paper's for CIFAR. With ``adaptive=True`` davda54 recommends 2.0.
        adaptive: scale the perturbation by |w|.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=SteepestAscent)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, adaptive=adaptive)

"""Adaptive sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steppe.optim.sharpness.ascent import Perturbation, elementwise, magnitudes
from steppe.optim.sharpness.base import Base, Interval
from steppe.optim.sharpness.composition import Ascent, Composition, Hyper, Parts
from steppe.optim.sharpness.vectors import Vector

__all__ = ["ASAM", "AdaptiveAscent"]


class AdaptiveAscent(Ascent):
    """e = rho · T²g / ‖Tg‖ with T = |w| + eta for weights, 1 for biases."""

    hyper = {"eta": Hyper(0.01, Interval(0))}  # noqa: RUF012

    def trait(self, index: int, name: str | None, param: Tensor) -> bool:
        """Whether the parameter is a weight."""
        return "weight" in name if name is not None else param.ndim >= 2

    def perturbation(self, g: Vector, rho: Sequence[float]) -> Perturbation:
        """See the class."""
        scales = [
            magnitudes(bucket, self.of(bucket.group, "eta")) if self.trait_of(bucket) else None
            for bucket in g.buckets
        ]
        return elementwise(g, rho, scales, eps=1e-16)


class ASAM(Composition):
    """ASAM: SAM in a ball that scales with the weights, so that rescaling a network does not change its sharpness.

    Kwon, Kim, Park, Choi 2021, arXiv:2102.11600, Algorithm 1, with g = ∇L(w) ::

        T = |w| + eta for weights, 1 for biases
        e = rho · T² ⊙ g / ‖T ⊙ g‖
        base step with ∇L(w + e)

    As in the official code (SamsungLabs/ASAM) a parameter is a weight when its *name* contains "weight", those of
    normalisation layers included: pass ``model.named_parameters()``. Without names, tensors of two and more
    dimensions count as weights, so weights of normalisation layers then keep T = 1. Paper and code agree.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius relative to the weights, >= 0; default the official class's and the paper's for CIFAR-10.
        eta: floor of T, >= 0; default the paper's and the official class's (its example script runs with 0).
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=AdaptiveAscent)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.5,
        eta: float = 0.01,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, eta=eta)

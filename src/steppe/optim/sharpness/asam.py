"""Adaptive sharpness-aware minimization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steppe.optim.sharpness.ascent import elementwise, magnitudes
from steppe.optim.sharpness.base import Algorithm, Base, Interval, SharpnessAware

__all__ = ["ASAM"]


class ASAM(SharpnessAware):
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
        base_hyper: hyper-parameters of the base.
    """

    allowed = {"rho": Interval(0), "eta": Interval(0)}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.5,
        eta: float = 0.01,
        **base_hyper: Any,
    ) -> None:
        super().__init__(params, base, base_hyper, rho=rho, eta=eta)

    def trait(self, index: int, name: str | None, param: Tensor) -> bool:
        """Whether the parameter is a weight."""
        return "weight" in name if name is not None else param.ndim >= 2

    def algorithm(self) -> Algorithm:
        """∇L(w), then ∇L(w + e)."""
        g = yield
        scales = [
            magnitudes(bucket, bucket.group["eta"]) if bucket.trait else None for bucket in self.buckets
        ]
        e = elementwise(g, self.hyper("rho"), scales, eps=1e-16)
        with self.perturbed(e):
            del g, scales, e
            yield

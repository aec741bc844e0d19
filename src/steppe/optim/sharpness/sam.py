"""Sharpness-aware minimization."""

from __future__ import annotations

from typing import Any

import torch

from steppe.optim.sharpness.ascent import elementwise, magnitudes, steepest
from steppe.optim.sharpness.base import Algorithm, Base, Interval, SharpnessAware

__all__ = ["SAM"]


class SAM(SharpnessAware):
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
        base_hyper: hyper-parameters of the base.
    """

    allowed = {"rho": Interval(0), "adaptive": (False, True)}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        **base_hyper: Any,
    ) -> None:
        super().__init__(params, base, base_hyper, rho=rho, adaptive=adaptive)

    def algorithm(self) -> Algorithm:
        """∇L(w), then ∇L(w + e)."""
        g = yield
        if any(self.hyper("adaptive")):
            scales = [magnitudes(bucket) if bucket.group["adaptive"] else None for bucket in self.buckets]
            e = elementwise(g, self.hyper("rho"), scales)
        else:
            e = steepest(g, self.hyper("rho"))
        with self.perturbed(e):
            del g, e
            yield

"""Friendly sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steppe.optim.sharpness.ascent import Perturbation, steepest
from steppe.optim.sharpness.base import Base, Interval
from steppe.optim.sharpness.composition import Ascent, Composition, Hyper, Parts
from steppe.optim.sharpness.vectors import Bucket, Vector

__all__ = ["FriendlyAscent", "FriendlySAM"]


class FriendlyAscent(Ascent):
    """e = rho · d / ‖d‖ with d = g − sigma · m, m the moving average of g."""

    hyper = {  # noqa: RUF012
        "sigma": Hyper(1.0, Interval(0)),
        "lmbda": Hyper(0.9, Interval(0, 1)),
        "form": Hyper("code", ("code", "paper")),
    }
    remembers = ("m",)
    keeps_gradient = True

    def trait(self, index: int, name: str | None, param: Tensor) -> bool:
        """Whether the parameter has an average yet."""
        return index in self.optimizer.memory["m"]

    def perturbation(self, g: Vector, rho: Sequence[float]) -> Perturbation:
        """The direction is d = a · g − b · m, with the paper's updated m written out."""
        directions = []
        for bucket, gs in zip(g.buckets, g.tensors, strict=True):
            paper = self.of(bucket.group, "form") == "paper"
            sigma, lmbda = self.of(bucket.group, "sigma"), self.of(bucket.group, "lmbda")
            if not self.trait_of(bucket):
                directions.append(list(torch._foreach_mul(gs, 1 - sigma)) if paper else gs)
                continue
            a, b = (1 - sigma * (1 - lmbda), sigma * lmbda) if paper else (1.0, sigma)
            ds = gs if g.disposable and not paper else list(torch._foreach_mul(gs, a))
            torch._foreach_add_(ds, self._averages(bucket), alpha=-b)
            directions.append(ds)
        g.taken = g.disposable
        return steepest(g.like(directions), rho)

    def update(self, g: Vector) -> None:
        """m ← lmbda · m + (1 − lmbda) · g, or g where there is no m yet."""
        for bucket, gs in zip(g.buckets, g.tensors, strict=True):
            sigma, weight = self.of(bucket.group, "sigma"), 1 - self.of(bucket.group, "lmbda")
            if g.taken and self.trait_of(bucket) and self.of(bucket.group, "form") == "code":
                ms = self._averages(bucket)  # and gs is d = g − sigma · m
                if sigma != 1:
                    torch._foreach_mul_(ms, 1 - weight * (1 - sigma))
                torch._foreach_add_(ms, gs, alpha=weight)
            else:
                self.average("m", Vector([bucket], [gs]), [weight])

    def _averages(self, bucket: Bucket) -> list[Tensor]:
        return [self.optimizer.memory["m"][i] for i in bucket.indices]


class FriendlySAM(Composition):
    """Friendly-SAM: perturb along the batch's noise only, the gradient minus its moving average.

    Li, Zhou, He, Cheng, Huang 2024, arXiv:2403.12350, Algorithm 1, with g = ∇L(w) and m = g at first ::

        d = g − sigma · m              m ← lmbda · m + (1 − lmbda) · g
        base step with ∇L(w + rho · d/‖d‖)

    Paper and code differ in the order: the official code (nblt/F-SAM) takes d from the m before its update, and
    d = g in the first step; the paper from the m after it, d = (1 − sigma) g in the first step. For sigma = 1 the
    directions agree from the second step on. The default is ``form="code"``, because the published numbers come from
    it and it perturbs the first step too.

    m is kept in float32 for half-precision weights, and belongs to ``memory["m"]``, not to ``state``. It changes only
    when the step completes, so a step that is skipped or interrupted leaves no trace.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default the official class's. The paper's CIFAR runs use 0.2 with lmbda 0.6.
        sigma: share of the average that is taken away, >= 0; default the official class's.
        lmbda: decay of the average, in [0, 1]; default the official class's.
        form: "code" or "paper", see above.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=FriendlyAscent)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        form: str = "code",
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, sigma=sigma, lmbda=lmbda, form=form)

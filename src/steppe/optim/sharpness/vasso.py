"""Sharpness-aware minimization with variance suppression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steppe.optim.sharpness.ascent import Perturbation, steepest
from steppe.optim.sharpness.base import Base, Interval
from steppe.optim.sharpness.composition import Ascent, Composition, Hyper, Parts
from steppe.optim.sharpness.vectors import Bucket, Vector, duplicate

__all__ = ["AveragedAscent", "VaSSO"]


class AveragedAscent(Ascent):
    """e = rho · d / ‖d‖ with d the moving average of g, this step's included."""

    hyper = {"theta": Hyper(0.9, Interval(0, 1))}  # noqa: RUF012
    remembers = ("d",)
    keeps_gradient = True

    def trait(self, index: int, name: str | None, param: Tensor) -> bool:
        """Whether the parameter has an average yet."""
        return index in self.optimizer.memory["d"]

    def perturbation(self, g: Vector, rho: Sequence[float]) -> Perturbation:
        """The new d is computed apart, the old one stays until the step is complete: in g's memory if it may."""
        directions = []
        for bucket, gs, theta in zip(g.buckets, g.tensors, self.each("theta"), strict=True):
            ds = gs
            if self.trait_of(bucket):
                ds = gs if g.disposable else duplicate(gs)
                torch._foreach_lerp_(ds, self._averages(bucket), 1 - theta)
            directions.append(ds)
        g.taken = g.disposable
        return steepest(g.like(directions), rho, eps=1e-7)

    def update(self, g: Vector) -> None:
        """d ← (1 − theta) · d + theta · g, or g where there is no d yet."""
        self.average("d", g, [1.0] * len(g.buckets) if g.taken else self.each("theta"))

    def _averages(self, bucket: Bucket) -> list[Tensor]:
        return [self.optimizer.memory["d"][i] for i in bucket.indices]


class VaSSO(Composition):
    """VaSSO: SAM along a moving average of gradients, which the noise of one batch cannot turn to where it is friendly.

    Li & Giannakis 2023, arXiv:2309.15639, with g = ∇L(w) and d = g at first ::

        d ← (1 − theta) · d + theta · g
        e = rho · d / ‖d‖
        base step with ∇L(w + e)

    This is the official code (BingcongLi/VaSSO), with 1e-7 added to ‖d‖; theta = 1 is SAM. The paper has the same
    recursion; that it starts from the first gradient, so that the first step is one of SAM, is the code's choice.

    d is kept in float32 for half-precision weights, and belongs to ``memory["d"]``, not to ``state``. It changes only
    when the step completes, so a step that is skipped or interrupted leaves no trace.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default the official script's. Its run for CIFAR-100 uses 0.2.
        theta: weight of the new gradient, in [0, 1]; default the official script's.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=AveragedAscent)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        theta: float = 0.9,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, theta=theta)

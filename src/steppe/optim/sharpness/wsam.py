"""Weighted sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from steppe.core.errors import SpecError
from steppe.optim.sharpness.ascent import Perturbation
from steppe.optim.sharpness.base import Base, Interval
from steppe.optim.sharpness.composition import Composition, Descent, Hyper, Parts
from steppe.optim.sharpness.sam import SteepestAscent
from steppe.optim.sharpness.vectors import Vector, combine

__all__ = ["WSAM", "WeightedDescent"]


class WeightedDescent(Descent):
    """g for the base and −lr · alpha · (p − g) beside it, or where not `decouple` alpha · p + (1 − alpha) · g.

    alpha = gamma / (1 − gamma).
    """

    hyper = {"gamma": Hyper(0.9, Interval(0, 1)), "decouple": Hyper(True, (False, True))}  # noqa: RUF012
    keeps_gradient = True

    def check(self, group: Mapping[str, Any]) -> None:
        """The weight is finite; the decoupled step has a learning rate and nobody who looks for it in p."""
        if self.of(group, "gamma") == 1:
            raise SpecError("gamma=1 gives sharpness the weight gamma / (1 - gamma) = inf: take one below 1.")
        if not self.of(group, "decouple"):
            return
        if "lr" not in group:
            raise SpecError("decouple=True steps by the base's learning rate, but this base has no lr.")
        if self.optimizer.parts.cadence.keeps_gradient:
            raise SpecError(
                "decouple=True gives the base the plain gradient and sharpness a step of its own, so this cadence "
                "finds nothing to use again in what the base gets: set decouple=False."
            )

    def combined(self, g: Vector, p: Vector) -> Vector:
        """See the class."""
        alpha = [gamma / (1 - gamma) for gamma in self.each("gamma")]
        if not self.one("decouple"):
            return combine(p, alpha, g, [1 - a for a in alpha])
        # apart from g and taken now: the base may edit what it gets
        sharpness = combine(p, [1.0] * len(alpha), g, [-1.0] * len(alpha))
        module = self.optimizer.module
        if module.by_rank:  # each rank's own, but the weights are everybody's
            for tensors in sharpness.tensors:
                module.mean(tensors)
        lr = [float(bucket.group["lr"]) for bucket in g.buckets]
        self.optimizer.correct(
            Perturbation(sharpness, [-each * a for each, a in zip(lr, alpha, strict=True)])
        )
        return g


class WSAM(Composition):
    """WSAM: sharpness as a regulariser of its own weight, beside the base's step or within it.

    Yue, Jiang, Ye, Gao, Liu, Zhang 2023, arXiv:2305.15817: the loss L(w) + alpha · (L(w + e) − L(w)) with
    alpha = gamma / (1 − gamma). With g = ∇L(w) and p = ∇L(w + e) ::

        e = rho · g / ‖g‖
        base step with g, then w ← w − lr · alpha · (p − g)
        decouple=False:  base step with alpha · p + (1 − alpha) · g

    gamma = 1/2 with ``decouple=False`` is SAM, gamma = 0 the base alone. Paper and official code
    (intelligent-machine-learning/atorch) agree; decoupled is the default of both. The sharpness step stays out of
    the base's momentum and scaling and uses the group's lr of the step. The code's `max_norm` clips both g and p;
    here clipping between the passes and ``step()`` clips what the base gets, which is g alone if decoupled.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`; if decoupled, one whose groups have an ``lr``.
        rho: radius, >= 0; default the official class's.
        gamma: weight of sharpness, in [0, 1); default the official class's.
        decouple: whether sharpness is stepped along beside the base; one for all groups.
        adaptive: scale the perturbation by |w|, see `SAM`.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=SteepestAscent, descent=WeightedDescent)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        gamma: float = 0.9,
        decouple: bool = True,
        adaptive: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, gamma=gamma, decouple=decouple, adaptive=adaptive)

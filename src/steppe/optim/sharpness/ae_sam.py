"""AE-SAM: sharpness-aware steps where the loss is steep."""

from __future__ import annotations

import math
from typing import Any

import torch

from steppe.optim.sharpness.base import Base, Interval
from steppe.optim.sharpness.composition import Cadence, Composition, Hyper, Parts
from steppe.optim.sharpness.sam import SteepestAscent
from steppe.optim.sharpness.vectors import Vector

__all__ = ["AESAM", "WhenSteep"]

_ANY = Interval(-math.inf)


class WhenSteep(Cadence):
    """A step is perturbed if ‖g‖² >= mu + c · sigma, the moving moments of ‖g‖² with this step's in them."""

    hyper = {  # noqa: RUF012
        "total_steps": Hyper(None, Interval(1, whole=True)),
        "delta": Hyper(0.9, Interval(0, 1)),
        "lambda1": Hyper(-1.0, _ANY),
        "lambda2": Hyper(1.0, _ANY),
    }
    _moments: dict[str, float]

    def perturbs(self, g: Vector) -> bool:
        """See the class."""
        delta, numbers, size = self.one("delta"), self.optimizer.numbers, self._agreed(g)
        mu = delta * numbers.get("mu", 0.0) + (1 - delta) * size
        sigma2 = delta * numbers.get("sigma2", 0.0) + (1 - delta) * (size - mu) * (size - mu)
        self._moments = {"mu": mu, "sigma2": sigma2}
        done = min(self.optimizer.steps / self.one("total_steps"), 1.0)
        c = done * self.one("lambda1") + (1 - done) * self.one("lambda2")
        return bool(size >= mu + c * math.sqrt(sigma2))

    def update(self, g: Vector, combined: Vector | None) -> None:
        """Remember the moments."""
        self.optimizer.numbers.update(self._moments)

    def _agreed(self, g: Vector) -> float:
        """‖g‖², the same on all ranks."""
        size = g.norm * g.norm
        return self.optimizer.module.agreed(size, g.buckets[0].params[0].device) if g.buckets else size


class AESAM(Composition):
    """AE-SAM: SAM in the steps whose gradient is large among the recent ones, the base alone in the others.

    Jiang, Yang, Zhang, Kwok 2023, arXiv:2304.14647, with g = ∇L(w), t = 0, 1, ... and mu = sigma² = 0 at first ::

        mu ← delta · mu + (1 − delta) · ‖g‖²
        sigma² ← delta · sigma² + (1 − delta) · (‖g‖² − mu)²
        c = t/T · lambda1 + (1 − t/T) · lambda2
        ‖g‖² >= mu + c · sigma:  base step with ∇L(w + rho · g / ‖g‖)        else:  base step with g

    There is no official code. The first step is perturbed unless c > 1/√(1 − delta). The defaults perturb rarely at the
    beginning and mostly at the end. The rule compares gradients of different steps: under a `GradScaler` give it to
    ``passes(scaler)``, which sees to their true sizes. With ``sync="last"`` ranks decide by the mean of their ‖g‖².

    mu and sigma² are in ``numbers`` and change only when the step completes.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        total_steps: T, steps of the whole training, >= 1; after them c stays at lambda1. Required.
        rho: radius, >= 0; default SAM's.
        delta: decay of the moments, in [0, 1]; default the paper's.
        lambda1: c at the end; default the paper's.
        lambda2: c at the beginning; default the paper's.
        adaptive: scale the perturbation by |w|, see `SAM`.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=SteepestAscent, cadence=WhenSteep)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        total_steps: int,
        rho: float = 0.05,
        delta: float = 0.9,
        lambda1: float = -1.0,
        lambda2: float = 1.0,
        adaptive: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(
            params,
            base,
            rest,
            rho=rho,
            total_steps=total_steps,
            delta=delta,
            lambda1=lambda1,
            lambda2=lambda2,
            adaptive=adaptive,
        )

"""Un-normalised and unified sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from steppe.optim.sharpness.ascent import EPS, Perturbation
from steppe.optim.sharpness.base import Base, Interval
from steppe.optim.sharpness.composition import Ascent, Composition, Hyper, Parts
from steppe.optim.sharpness.construction import Either
from steppe.optim.sharpness.vectors import Vector

__all__ = ["USAM", "UnifiedAscent"]


class UnifiedAscent(Ascent):
    """e = rho · (1 − lmbda + lmbda / ‖g‖) · g."""

    hyper = {"lmbda": Hyper(0.0, Either(("1/t", "1-1/t"), Interval(0, 1)))}  # noqa: RUF012

    def perturbation(self, g: Vector, rho: Sequence[float]) -> Perturbation:
        """See the class."""
        t = self.optimizer.steps + 1
        schedules = {"1/t": 1 / t, "1-1/t": 1 - 1 / t}
        lmbda = [schedules.get(each, each) for each in self.each("lmbda")]
        return Perturbation(
            g, [r * (1 - each + each / (g.norm + EPS)) for r, each in zip(rho, lmbda, strict=True)]
        )


class USAM(Composition):
    """USAM: SAM whose perturbation is as long as the gradient is, or anything between that and SAM.

    Andriushchenko & Flammarion 2022, arXiv:2206.06232 (USAM, lmbda = 0), and Oikonomou & Loizou 2025,
    arXiv:2503.02225 (unified SAM), with g = ∇L(w) ::

        e = rho · (1 − lmbda + lmbda / ‖g‖) · g          lmbda = 0: USAM,  lmbda = 1: SAM
        base step with ∇L(w + e)

    Paper and the authors' package (PyPI unifiedsam) agree. Below lmbda = 1 a factor on the loss changes the
    algorithm.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius for a gradient of norm 1, >= 0; the package has no default, this one is SAM's.
        lmbda: how far e is normalised: a number in [0, 1], or "1/t" (from SAM to USAM) or "1-1/t" (from USAM to
            SAM) with t = 1, 2, ... the step; default USAM.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=UnifiedAscent)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        lmbda: float | str = 0.0,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, lmbda=lmbda)

"""Sharpness-aware minimization in the last steps only."""

from __future__ import annotations

from typing import Any

import torch

from steppe.optim.sharpness.base import Base, Interval
from steppe.optim.sharpness.composition import Cadence, Composition, Hyper, Parts, Radius
from steppe.optim.sharpness.sam import SteepestAscent
from steppe.optim.sharpness.vectors import Vector

__all__ = ["Late", "LateSAM", "RampedRadius"]


class Late(Cadence):
    """The last share `tail_frac` of the steps is perturbed, and what comes after `total_steps`."""

    hyper = {  # noqa: RUF012
        "total_steps": Hyper(None, Interval(1, whole=True)),
        "tail_frac": Hyper(0.3, Interval(0, 1)),
    }

    @property
    def since(self) -> int:
        """The number of perturbed steps before this one; negative before the first."""
        total: int = self.one("total_steps")
        return self.optimizer.steps - round((1 - self.one("tail_frac")) * total)

    def perturbs(self, g: Vector) -> bool:
        """See the class."""
        return bool(self.one("tail_frac") > 0 and self.since >= 0)


class RampedRadius(Radius):
    """rho, reached linearly over the first `ramp` perturbed steps."""

    hyper = {**Radius.hyper, "ramp": Hyper(0, Interval(0, whole=True))}  # noqa: RUF012

    @classmethod
    def objection(cls, parts: Parts) -> str | None:
        """The ramp begins with the late phase."""
        if issubclass(parts.cadence, Late):
            return None
        return "its ramp begins where the late phase does; take cadence='late_sam', or radius='sam'."

    def rho(self) -> list[float]:
        """See the class."""
        late = self.optimizer.cadence
        assert isinstance(late, Late)  # see objection
        number = late.since + 1
        return [
            rho * min(1.0, number / ramp) if ramp else rho
            for rho, ramp in zip(self.each("rho"), self.each("ramp"), strict=True)
        ]


class LateSAM(Composition):
    """Late-phase SAM: the base alone, then SAM in the last steps.

    Zhou et al. 2025, arXiv:2410.10373: SAM in the last few epochs finds nearly what SAM throughout finds.
    The rule is that of the package temperon (arXiv:2609.17575), with t = 0, 1, ... and g = ∇L(w) ::

        tail_start = round((1 − tail_frac) · total_steps)
        t < tail_start:  base step with g
        else:            rho_t = rho · min(1, (t − tail_start + 1) / ramp)        base step with ∇L(w + rho_t · g / ‖g‖)

    1 + tail_frac passes per step. temperon can also hand over to a second optimizer at tail_start; this does not: the
    base and its state go on.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        total_steps: steps of the whole training, >= 1. Required.
        rho: radius, >= 0; default temperon's.
        tail_frac: share of the steps that are perturbed, in [0, 1]; default temperon's, who advise that it be the share
            in which the learning rate decays.
        ramp: perturbed steps until the radius is rho, a whole number; 0 (default, temperon's) for no ramp.
        adaptive: scale the perturbation by |w|, see `SAM`.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=SteepestAscent, radius=RampedRadius, cadence=Late)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        total_steps: int,
        rho: float = 0.05,
        tail_frac: float = 0.3,
        ramp: int = 0,
        adaptive: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(
            params,
            base,
            rest,
            total_steps=total_steps,
            rho=rho,
            tail_frac=tail_frac,
            ramp=ramp,
            adaptive=adaptive,
        )

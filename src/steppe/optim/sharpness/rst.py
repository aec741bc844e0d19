"""Randomized sharpness-aware training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steppe.core.errors import SpecError
from steppe.optim.sharpness.base import Base, Interval, Maybe
from steppe.optim.sharpness.composition import Cadence, Composition, Descent, Hyper, Parts
from steppe.optim.sharpness.sam import SteepestAscent
from steppe.optim.sharpness.vectors import Vector, combine

__all__ = ["GRST", "RST", "BlendedDescent", "Coin", "probability"]


class Coin(Cadence):
    """A step is perturbed with `probability`; the coin is a function of the optimizer's seed and the step."""

    hyper = {  # noqa: RUF012
        "p": Hyper(0.5, Interval(0, 1)),
        "p_end": Hyper(None, Maybe(Interval(0, 1))),
        "schedule": Hyper("constant", ("constant", "linear", "piecewise", "trigonometric")),
        "switch": Hyper(0.5, Interval(0, 1)),
        "total_steps": Hyper(None, Maybe(Interval(1, whole=True))),
    }

    def check(self, group: Mapping[str, Any]) -> None:
        """A schedule needs to know where it ends."""
        schedule = self.of(group, "schedule")
        if schedule != "constant" and self.of(group, "total_steps") is None:
            raise SpecError(
                f"schedule={schedule!r} needs total_steps, the number of steps of the whole training."
            )

    def perturbs(self, g: Vector) -> bool:
        """See the class."""
        total = self.one("total_steps")
        done = 0.0 if total is None else self.optimizer.steps / total
        p = probability(self.one("schedule"), done, self.one("p"), self.one("p_end"), self.one("switch"))
        return bool(torch.rand((), generator=self.optimizer.stream("coin"), dtype=torch.float64).item() < p)


class BlendedDescent(Descent):
    """(1 − gamma) · g + gamma · p."""

    hyper = {"gamma": Hyper(2.0, Interval(0))}  # noqa: RUF012
    keeps_gradient = True

    def combined(self, g: Vector, p: Vector) -> Vector:
        """See the class."""
        gamma: Sequence[float] = self.each("gamma")
        return combine(p, gamma, g, [1 - each for each in gamma])


class RST(Composition):
    """RST: in each step a coin decides between SAM and the base alone.

    Zhao, Zhang, Hu 2022, arXiv:2203.09962, with x = t/total_steps the share of the training that is done ::

        with probability p(x):  base step with ∇L(w + rho · g / ‖g‖)          else:  base step with g = ∇L(w)

        constant       p                             linear          p + (p_end − p) · x
        piecewise      p, from x = switch on p_end   trigonometric   p_end + (p − p_end) · (1 + cos πx)/2

    1 + p passes per step on average. The schedules are the paper's four kinds, written by their two ends; the official
    code (JAX) was not read. Every rank throws the same coin; a resumed training throws the coins that one without a
    stop throws.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default SAM's.
        p: probability, where it is scheduled the first one; in [0, 1]; default ours: half of SAM's extra cost, which
            is the paper's headline.
        p_end: the last probability; None (default) for 1 − p, so that half of all steps are perturbed.
        schedule: "constant", "linear", "piecewise" or "trigonometric".
        switch: where the piecewise schedule changes, as a share of the steps.
        total_steps: steps of the whole training, needed by all schedules but the constant one; p_end is kept after.
        adaptive: scale the perturbation by |w|, see `SAM`.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=SteepestAscent, cadence=Coin)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        p: float = 0.5,
        p_end: float | None = None,
        schedule: str = "constant",
        switch: float = 0.5,
        total_steps: int | None = None,
        adaptive: bool = False,
        **rest: Any,
    ) -> None:
        coin = {"p": p, "p_end": p_end, "schedule": schedule, "switch": switch, "total_steps": total_steps}
        super().__init__(params, base, rest, rho=rho, adaptive=adaptive, **coin)


class GRST(Composition):
    """G-RST: RST whose perturbed steps get a mixture, so that the degree of regularisation is free ::

        base step with (1 − gamma) · g + gamma · ∇L(w + rho · g / ‖g‖)        else:  base step with g

    Zhao, Zhang, Hu 2022, arXiv:2203.09962. On average over the coin the gradient is g + p · gamma · (∇L(w + e) − g):
    SAM's own where p · gamma = 1, so gamma may exceed 1.

    Args:
        gamma: weight of the gradient at w + e, >= 0 (paper: gamma′); default ours: with p = 0.5 SAM's degree. 1 is RST.
        params, base, rho, p, p_end, schedule, switch, total_steps, adaptive, rest: see `RST`.
    """

    parts = Parts(ascent=SteepestAscent, descent=BlendedDescent, cadence=Coin)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        gamma: float = 2.0,
        p: float = 0.5,
        p_end: float | None = None,
        schedule: str = "constant",
        switch: float = 0.5,
        total_steps: int | None = None,
        adaptive: bool = False,
        **rest: Any,
    ) -> None:
        coin = {"p": p, "p_end": p_end, "schedule": schedule, "switch": switch, "total_steps": total_steps}
        super().__init__(params, base, rest, rho=rho, gamma=gamma, adaptive=adaptive, **coin)


def probability(
    schedule: str, done: float, p: float, p_end: float | None = None, switch: float = 0.5
) -> float:
    """The probability of a perturbed step when the share `done` of the training is over; see `RST`."""
    if schedule == "constant":
        return p
    last, done = 1 - p if p_end is None else p_end, min(done, 1.0)
    if schedule == "piecewise":
        return p if done < switch else last
    return p + (last - p) * (done if schedule == "linear" else (1 - math.cos(math.pi * done)) / 2)

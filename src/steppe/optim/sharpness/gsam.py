"""Surrogate gap guided sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steppe.core.errors import SpecError
from steppe.optim.sharpness.ascent import Perturbation, magnitudes, steepest
from steppe.optim.sharpness.base import Base, Interval
from steppe.optim.sharpness.composition import Composition, Descent, Hyper, Parts, Radius
from steppe.optim.sharpness.construction import Maybe
from steppe.optim.sharpness.descent import surrogate_gap
from steppe.optim.sharpness.sam import SteepestAscent
from steppe.optim.sharpness.vectors import Vector

__all__ = ["GSAM", "RadiusOfLr", "ScaledAscent", "SurrogateGapDescent", "rho_of_lr"]


class ScaledAscent(SteepestAscent):
    """`SteepestAscent`; where `adaptive` with ``form="paper"`` e = rho · |w| ⊙ g / ‖g‖."""

    hyper = {**SteepestAscent.hyper, "form": Hyper("code", ("code", "paper"))}  # noqa: RUF012

    def perturbation(self, g: Vector, rho: Sequence[float]) -> Perturbation:
        """See the class."""
        if self.one("form") == "code":
            return super().perturbation(g, rho)
        scaled = [
            list(torch._foreach_mul(gs, magnitudes(bucket))) if self.of(bucket.group, "adaptive") else gs
            for bucket, gs in zip(g.buckets, g.tensors, strict=True)
        ]
        return Perturbation(g.like(scaled), steepest(g, rho).lengths)


class RadiusOfLr(Radius):
    """rho, or with `rho_min` the radius that goes with the present learning rate, see `rho_of_lr`."""

    hyper = {  # noqa: RUF012
        **Radius.hyper,
        "rho_min": Hyper(None, Maybe(Interval(0))),
        "lr_max": Hyper(None, Maybe(Interval(0))),
        "lr_min": Hyper(0.0, Interval(0)),
    }

    def check(self, group: Mapping[str, Any]) -> None:
        """The schedule is complete."""
        rho, rho_min, lr_max, lr_min = (
            self.of(group, name) for name in ("rho", "rho_min", "lr_max", "lr_min")
        )
        if rho_min is None:
            return
        if rho_min not in Interval(0, rho):
            raise SpecError(f"rho_min={rho_min!r}, but it must be a number in [0, rho={rho}].")
        if lr_max not in Interval(lr_min):
            raise SpecError(
                f"rho_min ties rho to the learning rate, so lr_max must be a number >= lr_min={lr_min} "
                f"(the schedule's highest learning rate), not {lr_max!r}."
            )

    def rho(self) -> list[float]:
        """See the class."""
        return [self._radius(bucket.group) for bucket in self.optimizer.buckets]

    def _radius(self, group: Mapping[str, Any]) -> float:
        rho, rho_min, lr_max, lr_min = (
            self.of(group, name) for name in ("rho", "rho_min", "lr_max", "lr_min")
        )
        return rho if rho_min is None else rho_of_lr(float(group["lr"]), rho, rho_min, lr_max, lr_min)


class SurrogateGapDescent(Descent):
    """p − alpha · g⊥p, or with ``minimize="clean"`` g + alpha · p⊥g."""

    hyper = {  # noqa: RUF012
        "alpha": Hyper(0.4, Interval(0)),
        "minimize": Hyper("perturbed", ("perturbed", "clean")),
    }
    keeps_gradient = True

    def combined(self, g: Vector, p: Vector) -> Vector:
        """See the class."""
        return surrogate_gap(g, p, self.each("alpha"), [each == "clean" for each in self.each("minimize")])


class GSAM(Composition):
    """GSAM: SAM that also closes the surrogate gap h = L(w + e) − L(w).

    Zhuang et al. 2022, arXiv:2203.08065, Algorithm 1, with g = ∇L(w), p = ∇L(w + e) and a⊥b the part of a that is
    orthogonal to b ::

        e = rho · g / ‖g‖
        base step with p − alpha · g⊥p        minimize="clean":  g + alpha · p⊥g

    Paper and code differ when `adaptive`: ``form="code"`` is the author's PyTorch repository (juntang-zhuang/GSAM),
    e = rho · w² ⊙ g / ‖ |w| ⊙ g ‖; ``form="paper"`` is the paper and big_vision, e = rho · |w| ⊙ g / ‖g‖. The default
    is "code": the published CIFAR settings (rho 2.0, adaptive) belong to it, and it is SAM's own adaptive rule.
    ``minimize="clean"`` is big_vision's variant ``minimize_fp=False``.

    The schedule of the paper ties rho to the learning rate: give `rho_min` and `lr_max` and the radius of a step is
    `rho_of_lr`. Without `rho_min` the radius is the group's `rho`, which may be set before each step.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, or its largest value under the schedule, >= 0; default SAM's.
        alpha: weight of the gap, >= 0; default the author's CIFAR example. The paper has 0.4 to 1.0 for ViT and
            0.01 (rho 0.04, rho_min 0.02) for ResNet on ImageNet.
        adaptive: scale the perturbation by |w|.
        form: "code" or "paper", see above; one for all groups.
        minimize: "perturbed" or "clean", the loss whose gradient is kept whole.
        rho_min: smallest radius of the schedule, <= rho; None for no schedule.
        lr_max: learning rate at which the radius is rho; needed with rho_min.
        lr_min: learning rate at which the radius is rho_min.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=ScaledAscent, radius=RadiusOfLr, descent=SurrogateGapDescent)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        alpha: float = 0.4,
        adaptive: bool = False,
        form: str = "code",
        minimize: str = "perturbed",
        rho_min: float | None = None,
        lr_max: float | None = None,
        lr_min: float = 0.0,
        **rest: Any,
    ) -> None:
        super().__init__(
            params,
            base,
            rest,
            rho=rho,
            alpha=alpha,
            adaptive=adaptive,
            form=form,
            minimize=minimize,
            rho_min=rho_min,
            lr_max=lr_max,
            lr_min=lr_min,
        )


def rho_of_lr(lr: float, rho: float, rho_min: float, lr_max: float, lr_min: float = 0.0) -> float:
    """The radius that goes with a learning rate: rho at lr_max, rho_min at lr_min, linear between.

    Clamped to [rho_min, rho]: a warm-up below lr_min would make it negative. With lr_max = lr_min it is rho.
    """
    if lr_max == lr_min:
        return rho
    return rho_min + (rho - rho_min) * min(max((lr - lr_min) / (lr_max - lr_min), 0.0), 1.0)

"""Surrogate gap guided sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from steppe.core.errors import SpecError
from steppe.optim.sharpness.ascent import Perturbation, elementwise, magnitudes, steepest
from steppe.optim.sharpness.base import Algorithm, Base, Interval, SharpnessAware
from steppe.optim.sharpness.descent import surrogate_gap
from steppe.optim.sharpness.vectors import Vector

__all__ = ["GSAM", "rho_of_lr"]


class GSAM(SharpnessAware):
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
        base_hyper: hyper-parameters of the base.
    """

    allowed = {  # noqa: RUF012
        "rho": Interval(0),
        "alpha": Interval(0),
        "adaptive": (False, True),
        "form": ("code", "paper"),
        "minimize": ("perturbed", "clean"),
        "lr_min": Interval(0),
    }

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
        **base_hyper: Any,
    ) -> None:
        super().__init__(
            params,
            base,
            base_hyper,
            rho=rho,
            alpha=alpha,
            adaptive=adaptive,
            form=form,
            minimize=minimize,
            rho_min=rho_min,
            lr_max=lr_max,
            lr_min=lr_min,
        )

    def check(self, group: Mapping[str, Any]) -> None:
        """Also: the schedule is complete."""
        super().check(group)
        if group["rho_min"] is None:
            return
        if group["rho_min"] not in Interval(0, group["rho"]):
            raise SpecError(
                f"GSAM: rho_min={group['rho_min']!r}, but it must be a number in [0, rho={group['rho']}]."
            )
        if group["lr_max"] not in Interval(group["lr_min"]):
            raise SpecError(
                f"GSAM: rho_min ties rho to the learning rate, so lr_max must be a number >= lr_min={group['lr_min']} "
                f"(the schedule's highest learning rate), not {group['lr_max']!r}."
            )

    def algorithm(self) -> Algorithm:
        """∇L(w), then ∇L(w + e), then their combination."""
        g = yield
        with self.perturbed(self.ascent(g)):
            p = yield
        clean = [minimize == "clean" for minimize in self.hyper("minimize")]
        self.descend(surrogate_gap(g, p, self.hyper("alpha"), clean))

    def ascent(self, g: Vector) -> Perturbation:
        """e, by the groups' `adaptive` and `form`."""
        rho = [_radius(bucket.group) for bucket in self.buckets]
        adaptive = self.hyper("adaptive")
        if not any(adaptive):
            return steepest(g, rho)
        sizes = [
            magnitudes(bucket) if yes else None for bucket, yes in zip(self.buckets, adaptive, strict=True)
        ]
        if "paper" not in self.hyper("form"):
            return elementwise(g, rho, sizes)
        e = steepest(g, rho)
        scaled = [
            gs if ss is None else list(torch._foreach_mul(gs, ss))
            for gs, ss in zip(g.tensors, sizes, strict=True)
        ]
        return Perturbation(Vector(scaled), e.lengths)


def rho_of_lr(lr: float, rho: float, rho_min: float, lr_max: float, lr_min: float = 0.0) -> float:
    """The radius that goes with a learning rate: rho at lr_max, rho_min at lr_min, linear between.

    Clamped to [rho_min, rho]: a warm-up below lr_min would make it negative. With lr_max = lr_min it is rho.
    """
    if lr_max == lr_min:
        return rho
    return rho_min + (rho - rho_min) * min(max((lr - lr_min) / (lr_max - lr_min), 0.0), 1.0)


def _radius(group: Mapping[str, Any]) -> float:
    rho: float = group["rho"]
    if group["rho_min"] is None:
        return rho
    return rho_of_lr(float(group["lr"]), rho, group["rho_min"], group["lr_max"], group["lr_min"])

"""Momentum sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steppe.core.errors import SpecError
from steppe.optim.sharpness.ascent import EPS, steepest
from steppe.optim.sharpness.base import Algorithm, Base, Interval, Pass, SharpnessAware
from steppe.optim.sharpness.rounding import HALF
from steppe.optim.sharpness.sharing import local
from steppe.optim.sharpness.vectors import Vector, duplicate

__all__ = ["MSAM"]

MOMENTA = ("momentum_buffer", "exp_avg")
"""What bases call the momentum in their state: torch's SGD and RMSprop; Adam and all like it."""


class MSAM(SharpnessAware):
    """Momentum-SAM: perturb along the momentum, which is known already, so that one pass per step is enough.

    Becker, Altrock, Risse 2024, arXiv:2401.12033, Algorithm 1, with v the momentum of the base ::

        e = −rho · v / ‖v‖          no perturbation in the first step
        base step with ∇L(w + e)

    v adds up gradients, so e points where the base is about to go: downhill, a look-ahead of length rho, and not uphill
    as in SAM. v is the base's own, as its state has it: ``momentum_buffer`` (SGD, with any dampening, and with
    ``nesterov`` too, whose own look-ahead stays in the base's step) or ``exp_avg`` (Adam, AdamW and their like;
    without Adam's scaling, and bias correction would not change the direction).

    The official optimizer keeps the perturbed weights and has to be told to take them back. Here the perturbation is
    there during the pass only: checkpoints and evaluation see the clean weights, and the trajectory is the same. With
    ``restore="subtract"`` nothing is copied. Running statistics are those of the perturbed weights, for want of a pass
    at others.

    Algorithm 1 has no weight decay. ``form="code"`` (MarlonBecker/MSAM) is exact with its two optimizers: over
    SGD the decay pulls back from the perturbed weights, g + weight_decay · (w + e), and over AdamW it comes after the
    update instead of before, w ← (1 − lr · weight_decay) · (w − update). ``form="paper"`` leaves it to the base, and
    so do both forms over other bases.

    Args:
        params: see `SharpnessAware`.
        base: an optimizer with momentum; else see `SharpnessAware`.
        rho: radius, >= 0; default the official class's for SGD. The published runs have 3.
        form: "code" or "paper", see above.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.

    Raises:
        SpecError: the base has no momentum: when it is built, or after the first step where that shows only then.
    """

    allowed = {"rho": Interval(0), "form": ("code", "paper")}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.3,
        form: str = "code",
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, form=form)

    def check(self, group: Mapping[str, Any]) -> None:
        """Also that the base has momentum."""
        super().check(group)
        if not group.get("momentum", any(name.startswith("beta") for name in group)):
            raise self._no_momentum()

    def algorithm(self) -> Algorithm:
        """∇L(w + e) alone."""
        buckets = self.bucketed(lambda index, param: self._momentum(param) is not None)
        v = Vector(buckets, [self._momenta(bucket.owners) for bucket in buckets])
        with self.perturbed(steepest(v, [-bucket.group[self.key("rho")] for bucket in buckets])):
            g = yield Pass(final=True)
        if isinstance(self.base, torch.optim.SGD):
            self._decay_where_perturbed(g, v.norm)

    def _decay_where_perturbed(self, g: Vector, norm: float) -> None:
        changed = False
        for bucket, gs, rho, form in zip(
            g.buckets, g.tensors, self.hyper("rho"), self.hyper("form"), strict=True
        ):
            decay = bucket.group["weight_decay"]
            moving = [n for n, owner in enumerate(bucket.owners) if self._momentum(owner) is not None]
            if decay and moving and form == "code":
                vs = self._momenta([bucket.owners[n] for n in moving])
                torch._foreach_add_([gs[n] for n in moving], vs, alpha=-decay * rho / (norm + EPS))
                changed = True
        if changed:
            self.descend(g)

    def _step_base_once(self) -> None:
        # AdamW decays by 1 − lr · weight_decay first: with both of them changed like this, that factor falls on the
        # update as well
        groups = self.param_groups if isinstance(self.base, torch.optim.AdamW) else []
        asked = [
            (group, group["lr"], group["weight_decay"])
            for group in groups
            if group[self.key("form")] == "code" and group["lr"] * group["weight_decay"] < 1
        ]
        try:
            for group, lr, decay in asked:
                left = 1 - lr * decay
                group.update(lr=lr * left, weight_decay=decay / left)
            super()._step_base_once()
        finally:
            for group, lr, decay in asked:
                group.update(lr=lr, weight_decay=decay)

    def _momenta(self, owners: Sequence[Tensor]) -> list[Tensor]:
        momenta = [local(momentum) for momentum in map(self._momentum, owners) if momentum is not None]
        momenta = [momentum.to_dense() if momentum.is_sparse else momentum for momentum in momenta]
        return duplicate(momenta, torch.float32) if momenta[0].dtype in HALF else momenta

    def _momentum(self, param: Tensor) -> Tensor | None:
        state = self.state.get(param)
        if not state:
            return None
        for name in MOMENTA:
            if name in state:
                momentum: Tensor | None = state[name]
                return momentum
        raise self._no_momentum()

    def _no_momentum(self) -> SpecError:
        return SpecError(
            f"MSAM perturbs along the momentum of its base, and {type(self.base).__name__} as it is set keeps none: "
            "take SGD with momentum > 0, Adam, AdamW or another base with 'momentum_buffer' or 'exp_avg' in its state."
        )

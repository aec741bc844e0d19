"""Sharpness-aware minimization, parallelised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steppe.optim.sharpness.ascent import Perturbation, steepest
from steppe.optim.sharpness.base import Algorithm, Base, Interval, SharpnessAware
from steppe.optim.sharpness.sharing import local
from steppe.optim.sharpness.vectors import Vector

__all__ = ["SAMPa"]


class SAMPa(SharpnessAware):
    """SAMPa: SAM whose two gradients do not wait for each other.

    Xie, Pethick, Cevher 2024, arXiv:2410.10683, Algorithm 1, with d the last step's gradient at y ::

        x~ = x + rho · d / ‖d‖         y = x − lr · d
        base step with (1 − lmbda) · ∇L(x~; last batch) + lmbda · ∇L(y; this batch)
        d ← ∇L(y; this batch)

    As in the official code (LIONS-EPFL/SAMPa) y is where the base would go with the gradient d, if the base is
    ``torch.optim.SGD`` with a momentum buffer: y = x − lr · (d + weight_decay · x + momentum · buffer). For SGD
    without a buffer, and for any other base, it is x − lr · d, as in the paper. The code starts with d = 0, so that its
    first step is the base's own, from one gradient; the paper starts with d = ∇L(x).

    ∇L(x~; last batch) needs nothing of this step, so it is taken at the end of the last one, when that batch is still
    at hand, and remembered: two passes per step, at y and at the next x~, and no batch to keep. On one device they run
    one after the other. A parameter that had no gradient in the last step starts afresh.

    The base is stepped between the passes, so what should happen to gradients before, clipping for instance, belongs
    into ``optimizer.base.register_step_pre_hook`` and not behind the loop. To be able to take an unfinished step back,
    copies of the weights and of the base's state are held during the second pass. The loss that `step` returns is that
    of y.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default the official script's.
        lmbda: weight of the gradient at y, in [0, 1]; default the paper's SAMPa-0.2, and the official script's (its
            ``og``). 0 is the paper's plain SAMPa.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    allowed = {"rho": Interval(0), "lmbda": Interval(0, 1)}  # noqa: RUF012
    remembers = ("d", "ahead")

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.1,
        lmbda: float = 0.2,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, lmbda=lmbda)

    def algorithm(self) -> Algorithm:
        """∇L(y), and after the base's step ∇L(x~) for the next one."""
        with self.perturbed(self._to_y()):
            d = yield
        with self.provisional():
            self.descend(self._combined(d))
            self.step_base()
            with self.perturbed(steepest(d, self.hyper("rho"))):
                g = yield
        ahead = g.copied()  # g itself is in .grad
        self.memory.update(d=_by_index(d), ahead=_by_index(ahead))

    def _to_y(self) -> Perturbation:
        """y − x: what SGD would do with the gradient d, but for the rule of the official code about its buffer."""
        known = self.memory["d"]
        plain = self.bucketed(lambda index, param: index in known and not self._has_buffer(param))
        buffered = self.bucketed(lambda index, param: index in known and self._has_buffer(param))
        buckets = [*plain, *buffered]
        directions = [[known[index] for index in bucket.indices] for bucket in buckets]
        for number, bucket in enumerate(buffered, start=len(plain)):
            buffers = [local(self.state[owner]["momentum_buffer"]) for owner in bucket.owners]
            total = list(torch._foreach_add(directions[number], buffers, alpha=bucket.group["momentum"]))
            torch._foreach_add_(total, bucket.params, alpha=bucket.group["weight_decay"])
            directions[number] = total
        return Perturbation(Vector(buckets, directions), [-float(bucket.group["lr"]) for bucket in buckets])

    def _combined(self, d: Vector) -> Vector:
        """(1 − lmbda) · ∇L(x~; last batch) + lmbda · d, or d where there is no last batch: x~ and y are x then."""
        ahead, tensors = self.memory["ahead"], []
        for bucket, ds, lmbda in zip(d.buckets, d.tensors, self.hyper("lmbda"), strict=True):
            last = [ahead.get(index, own) for index, own in zip(bucket.indices, ds, strict=True)]
            tensors.append(list(torch._foreach_lerp(last, ds, lmbda)))
        return d.like(tensors)

    def _has_buffer(self, param: Tensor) -> bool:
        state = self.state.get(param, {}) if isinstance(self.base, torch.optim.SGD) else {}
        return state.get("momentum_buffer") is not None


def _by_index(vector: Vector) -> dict[int, Tensor]:
    return {
        index: tensor
        for bucket, tensors in zip(vector.buckets, vector.tensors, strict=True)
        for index, tensor in zip(bucket.indices, tensors, strict=True)
    }

"""Lookbehind: several ascents behind every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from steppe.core.errors import SpecError
from steppe.optim.sharpness.ascent import steepest
from steppe.optim.sharpness.base import Algorithm, Base, Interval, Pass, SharpnessAware
from steppe.optim.sharpness.rounding import HALF
from steppe.optim.sharpness.vectors import Vector, difference, duplicate

__all__ = ["Lookbehind", "agreements"]

SHORT = 1e-8
"""As in ``torch.nn.CosineSimilarity``."""


class Lookbehind(SharpnessAware):
    """Lookbehind-SAM: k ascents and k descents on the same batch, and then only part of the way.

    Mordido, Malviya, Baratin, Chandar 2024, arXiv:2307.16704, Algorithm 1; 2 k passes per step ::

        fast = slow = perturbed = w
        k times:   perturbed ← perturbed + rho · g/‖g‖,   g = ∇L(perturbed)
                   fast ← base step of fast with ∇L(perturbed)
        w ← slow + alpha · (fast − slow)

    Perturbations add up over the k rounds; the base's state goes on from round to round and from step to step.
    ``alpha=-1`` finds alpha anew in each step, for each tensor by itself: `agreements` of its first and its whole
    way. Paper and code (chandar-lab/Lookbehind-SAM) agree; like it, this is plain SAM's ascent.

    The base is stepped k times within the passes, so what should happen to gradients before, clipping for instance,
    belongs into ``optimizer.base.register_step_pre_hook`` and not behind the loop. To be able to take an unfinished
    step back, a copy of the base's state is held during the passes.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius of each ascent, >= 0; default SAM's, with which the official example runs.
        k: number of rounds, >= 1, one for all groups; default the official example's (its class has 5).
        alpha: share of the way that is kept, in [0, 1], or -1 for `agreements`; default the official class's.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    allowed = {"rho": Interval(0), "k": Interval(1, whole=True)}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        k: int = 2,
        alpha: float = 0.5,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, k=k, alpha=alpha)

    def check(self, group: Mapping[str, Any]) -> None:
        """Also that alpha is a share or -1."""
        super().check(group)
        alpha = group[self.key("alpha")]
        if alpha != -1 and alpha not in Interval(0, 1):
            raise SpecError(f"Lookbehind: alpha={alpha!r}, but it must be {Interval(0, 1)}, or -1.")

    def algorithm(self) -> Algorithm:
        """∇L before and after each ascent; the base moves the weights beneath the perturbation."""
        g = yield
        buckets, rho, alpha = self.buckets, self.hyper("rho"), self.hyper("alpha")
        with self.provisional() as copies:
            slow, first = Vector(buckets, copies), None
            with self.perturbed(steepest(g, rho, eps=1e-16)):
                del g
                yield Pass(final=True)
                fast = self.step_base()
                if -1 in alpha:
                    first = difference(Vector(buckets, fast), slow)
                del fast
                for _ in range(int(self.common("k")) - 1):
                    self.shift(steepest((yield), rho, eps=1e-16))
                    yield Pass(final=True)
                    self.step_base()
            way = difference(Vector(buckets, [bucket.params for bucket in buckets]), slow)
            shares = [[a] * len(ways) for a, ways in zip(alpha, way.tensors, strict=True)]
            if first is not None:
                found = zip(alpha, shares, agreements(first, way), strict=True)
                shares = [agreed if a == -1 else given for a, given, agreed in found]
            for bucket, starts, ways, share in zip(buckets, copies, way.tensors, shares, strict=True):
                torch._foreach_mul_(ways, share)
                torch._foreach_copy_(bucket.params, starts)
                torch._foreach_add_(bucket.params, ways)


def agreements(first: Vector, whole: Vector) -> list[list[float]]:
    """(cos + 1) / 2 of the first round's way and the whole, for each tensor: 1 straight on, 1/2 for a right angle.

    Shorter ways than `SHORT` count as that long, so no way at all is a right angle.
    """
    first, whole = _wide(first), _wide(whole)
    lengths = list(zip(first.norms_by_tensor, whole.norms_by_tensor, strict=True))
    sums = []  # there is no foreach kernel for inner products, but |x + y|² = |x|² + |y|² + 2 ⟨x, y⟩
    for xs, ys, (of_x, of_y) in zip(first.tensors, whole.tensors, lengths, strict=True):
        units = list(torch._foreach_mul(xs, [1 / max(x, SHORT) for x in of_x]))
        torch._foreach_add_(units, torch._foreach_mul(ys, [1 / max(y, SHORT) for y in of_y]))
        sums.append(units)
    return [
        [
            (both**2 - min(x / SHORT, 1) ** 2 - min(y / SHORT, 1) ** 2) / 4 + 1 / 2
            for both, x, y in zip(of_both, of_x, of_y, strict=True)
        ]
        for of_both, (of_x, of_y) in zip(first.like(sums).norms_by_tensor, lengths, strict=True)
    ]


def _wide(x: Vector) -> Vector:
    return x.like([duplicate(xs, torch.float32) if xs[0].dtype in HALF else xs for xs in x.tensors])

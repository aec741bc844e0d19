"""Sharpness-aware minimization for imbalanced classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed as dist

from steppe.core.errors import SpecError
from steppe.optim.sharpness.ascent import steepest
from steppe.optim.sharpness.base import Algorithm, Base, Interval, Pass, SharpnessAware
from steppe.optim.sharpness.vectors import combine

__all__ = ["ImbSAM"]


class ImbSAM(SharpnessAware):
    """ImbSAM: sharpness-aware for the rare (tail) classes only, plain for the others (head).

    Zhou, Qu, Xu, Shen 2023, arXiv:2308.07815, with l_i the loss of sample i of n ::

        L_h = (1/n) Σ_head l_i          L_t = (tail_weight / n) Σ_tail l_i
        e = rho · g / ‖g‖,  g = ∇L_t(w)
        base step with ∇L_h(w) + ∇L_t(w + e)

    Before each step tell which samples of its batch are of tail classes ::

        optimizer.tail = is_tail[y]          # bool [n]; is_tail: bool per class

    The closure takes the pass: ``x[p.samples]``, ``p.mean(losses)``. Passes are L_t at w, L_t at w + e, L_h at w, so
    that one gradient at most is held. Without tail samples a step is a plain one of a single pass, without head
    samples it is SAM's; with several ranks, which must do the same, all passes are taken, and what is missing is zero.

    Paper and code (cool-xuan/Imbalanced_SAM) agree; the code adds 1e-16 to the norm, as here. It runs the whole batch
    through the model, so that batch normalisation sees all of it, and so does ``whole=True``, the default, at the
    price of three passes; running statistics are then those of the first pass, of the whole batch at clean weights.
    ``whole=False`` runs only the samples that count, for 1 + (share of tail samples) passes, and gives the same where
    samples do not see each other (no batch normalisation). Running statistics are then those of the head's pass.

    `step` returns the closure's first loss, L_t(w); all samples' losses are in ``p.losses``.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default the official script's.
        tail_weight: weight of tail samples, >= 0; default the official loop's; one for all groups.
        whole: whether every pass runs the whole batch, see above; one for all groups.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.

    Attributes:
        tail: which samples of the next step's batch are of tail classes; taken by the step.

    Raises:
        SpecError: in a step, if `tail` has not been set for it.
    """

    allowed = {"rho": Interval(0), "tail_weight": Interval(0), "whole": (False, True)}  # noqa: RUF012
    closure_takes_pass = True
    tail: Tensor | None

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        tail_weight: float = 2.0,
        whole: bool = True,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, tail_weight=tail_weight, whole=whole)
        self.tail = None

    def algorithm(self) -> Algorithm:
        """∇L_t(w), ∇L_t(w + e), ∇L_h(w)."""
        tail, weight, whole = self._told(), self.common("tail_weight"), self.common("whole")
        alone = not (dist.is_available() and dist.is_initialized())
        has_tail, has_head = bool(tail.any()) or not alone, not bool(tail.all()) or not alone
        first = None if whole or not has_head else False
        t = None
        if has_tail:
            g = yield _part(tail, weight, whole, first)
            with self.perturbed(steepest(g, self.hyper("rho"), eps=1e-16)):
                del g
                t = yield _part(tail, weight, whole)
        if has_head:
            h = yield _part(~tail, 1.0, whole, None if whole else True)
            if t is not None:
                ones = [1.0] * len(self.buckets)
                self.descend(combine(h, ones, t, ones))
        self.tail = None

    def _told(self) -> Tensor:
        tail = self.tail
        if tail is None:
            raise SpecError(
                "ImbSAM does not know which samples are of tail classes: before each step set optimizer.tail to a bool "
                "tensor with one entry per sample of its batch."
            )
        if tail.dtype != torch.bool or tail.ndim != 1:
            raise SpecError(
                f"optimizer.tail is {tail.dtype} of shape {tuple(tail.shape)}, but it must be bool [samples]."
            )
        return tail


@dataclass(eq=False)
class _Share(Pass):
    """The weighted sum of some losses."""

    counted: Tensor | slice = field(default_factory=lambda: slice(None))
    weight: float = 1.0
    expected: int = 0

    def scalar(self, losses: Tensor, outputs: Tensor | None) -> Tensor:
        if len(losses) != self.expected:
            raise ValueError(
                f"{len(losses)} losses, but by optimizer.tail {self.expected} samples belong to this pass: set it for "
                "this batch, and index with x[p.samples]."
            )
        return losses[self.counted].sum() * self.weight


def _part(mask: Tensor, weight: float, whole: bool, statistics: bool | None = None) -> _Share:
    where = mask.nonzero().squeeze(1)
    return _Share(
        samples=slice(None) if whole else where,
        counted=where if whole else slice(None),
        weight=weight / len(mask),
        expected=len(mask) if whole else len(where),
        statistics=statistics,
    )

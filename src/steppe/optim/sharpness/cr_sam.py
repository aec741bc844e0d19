"""Curvature regularized sharpness-aware minimization."""

from __future__ import annotations

from typing import Any

import torch

from steppe.optim.sharpness.ascent import Perturbation, steepest
from steppe.optim.sharpness.base import Algorithm, Base, Interval, SharpnessAware
from steppe.optim.sharpness.vectors import combine

__all__ = ["CRSAM"]


class CRSAM(SharpnessAware):
    """CR-SAM: SAM with a penalty on the curvature along the perturbation.

    Wu, Luo, Wunsch 2024, arXiv:2312.13555; three passes per step, with g = ∇L(w) ::

        e = rho · g / ‖g‖          worst = ∇L(w + e)          best = ∇L(w − e)
        base step with worst + gamma · (worst + best − 2 g) + beta · (worst − best)

    worst + best − 2 g and worst − best are the gradients of the loss's second and first difference along e. The paper
    measures curvature by the ratio of the two; the official code (TrustAIoT/CR-SAM), whose rule this is, adds both
    with constant weights.

    The last perturbed pass is at w − e, so that `Diagnostics.surrogate_gap` and `cosine` tell of that point.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default the official class's and script's.
        gamma: weight of the second difference, >= 0; default the official class's and script's.
        beta: weight of the first difference, >= 0; default the official script's (its class has 0.1).
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    allowed = {"rho": Interval(0), "gamma": Interval(0), "beta": Interval(0)}  # noqa: RUF012

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.1,
        gamma: float = 0.1,
        beta: float = 0.01,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, gamma=gamma, beta=beta)

    def algorithm(self) -> Algorithm:
        """∇L(w), ∇L(w + e), ∇L(w − e): a copy of g until the last pass, where the sum so far takes its place."""
        g = yield
        gamma, beta = self.hyper("gamma"), self.hyper("beta")
        e = steepest(g, self.hyper("rho"))
        with self.perturbed(e):
            worst = yield
        of_worst = [1 + c + b for c, b in zip(gamma, beta, strict=True)]
        total = combine(worst, of_worst, g, [-2 * c for c in gamma])
        e = Perturbation(e.direction, [-length for length in e.lengths])
        del g, worst
        with self.perturbed(e):
            del e
            best = yield
        ones = [1.0] * len(gamma)
        self.descend(combine(total, ones, best, [c - b for c, b in zip(gamma, beta, strict=True)]))

"""Gradient norm aware minimization."""

from __future__ import annotations

from typing import Any

import torch

from steppe.optim.sharpness.ascent import steepest
from steppe.optim.sharpness.base import Algorithm, Base, Interval, SharpnessAware
from steppe.optim.sharpness.descent import minus_orthogonal
from steppe.optim.sharpness.vectors import combine, difference

__all__ = ["GAM"]


class GAM(SharpnessAware):
    """GAM: also minimise first-order flatness, the largest gradient norm in a ball around the weights.

    Zhang, Xu, Yu, Zou, Cui 2023, arXiv:2303.03108, the accelerated Algorithm 2; four passes per step ::

        g0 = ∇L(w)                 g1 = ∇L(w + rho_prime · g0/‖g0‖)
        b  = w + rho · d/‖d‖       d  = g1 − g0, the direction in which the gradient norm grows
        g2 = ∇L(b)                 g3 = ∇L(b + rho_prime · g2/‖g2‖)
        h+ = alpha · g1 + (1 − alpha) · g3
        h− = beta · g0 + (1 − beta) · g2
        base step with h+ − gamma · (the part of h− orthogonal to h+)

    Paper and code differ in h−: the official code (xxgege/GAM) reads beta but gives g0 the weight 1,
    h− = g0 + (1 − beta) · g2. ``form="code"`` is the default, because the published settings were found with it;
    ``form="paper"`` is the algorithm as printed.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius of the ball of first-order flatness, >= 0 (code: grad_norm_rho). This and the other defaults are
            the official ones for ResNet on CIFAR-100.
        rho_prime: radius of the inner ascent, >= 0 (code: grad_rho).
        alpha: weight of g1 against g3, in [0, 1] (code: grad_beta_1).
        beta: weight of g0 against g2, in [0, 1] (code: grad_beta_0).
        gamma: weight of the orthogonal part, >= 0.
        form: "code" or "paper", see above.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    allowed = {  # noqa: RUF012
        "rho": Interval(0),
        "rho_prime": Interval(0),
        "alpha": Interval(0, 1),
        "beta": Interval(0, 1),
        "gamma": Interval(0),
        "form": ("code", "paper"),
    }

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.2,
        rho_prime: float = 0.02,
        alpha: float = 0.6,
        beta: float = 0.5,
        gamma: float = 0.03,
        form: str = "code",
        **rest: Any,
    ) -> None:
        super().__init__(
            params,
            base,
            rest,
            rho=rho,
            rho_prime=rho_prime,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            form=form,
        )

    def algorithm(self) -> Algorithm:
        """∇L at w, near w, at b and near b; then their combination."""
        g0 = yield
        rho_prime, alpha, beta = self.hyper("rho_prime"), self.hyper("alpha"), self.hyper("beta")
        with self.perturbed(steepest(g0, rho_prime)):
            g1 = yield
        with self.perturbed(steepest(difference(g1, g0), self.hyper("rho"))):
            g2 = yield
            self.shift(steepest(g2, rho_prime))
            of_g0 = [b if form == "paper" else 1.0 for b, form in zip(beta, self.hyper("form"), strict=True)]
            minus = combine(g0, of_g0, g2, [1 - b for b in beta])
            minus.disposable = True
            del g0, g2
            g3 = yield
        plus = combine(g1, alpha, g3, [1 - a for a in alpha])
        self.descend(minus_orthogonal(plus, minus, self.hyper("gamma")))

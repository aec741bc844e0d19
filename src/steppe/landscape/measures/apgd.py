"""The largest loss in a ball around the weights: adaptive worst-case sharpness and Keskar's epsilon-sharpness."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from steppe.core.errors import DataError, SpecError, unknown
from steppe.landscape.measures.common import normal, over, require_positive, scale_of
from steppe.landscape.point import Measurement, Point

__all__ = ["Norm", "epsilon_sharpness", "worst_case_sharpness"]

Norm = Literal["l2", "linf"]


def worst_case_sharpness(
    point: Point,
    generator: torch.Generator,
    rho: float | None = None,
    norm: Norm = "l2",
    adaptive: bool = True,
    per_batch: bool = True,
    steps: int = 20,
    starts: int = 1,
    tol: float = 0.05,
) -> Measurement:
    """Worst-case sharpness by Auto-PGD.

    Andriushchenko et al. 2023, arXiv:2302.07011, worst-case adaptive sharpness, after Kwon et al. 2021 ::

        mean over batches b of  max { L_b(w + d) - L_b(w) : ‖d / |w|‖_p <= rho },   p = 2 or infinity

    The maximiser is Auto-PGD (Croce & Hein 2020, arXiv:2003.01690, algorithm 1) in the coordinates z = d / |w|, in
    which the ball is round. The official code steps along ``|w| g / ‖g‖`` and projects in weight space, so that its
    result, other than its definition, changes when a net is rescaled; this one's does not.

    Args:
        point: where.
        generator: draws the random starts.
        rho: radius; default 0.5 for l2 (Kwon et al.'s for training), 0.002 for linf (ours: about the same length
            over 40 thousand weights).
        norm: of the ball.
        adaptive: radii relative to each weight; False: the plain ball.
        per_batch: a maximum for each batch, as in the paper; False: one over all data.
        steps: gradients per start; the official code's default.
        starts: the first is w itself, the others are random; the best counts.
        tol: converged when a step to the best corner of the ball would, to first order, add at most this share of the
            increase found (the Frank-Wolfe gap), in each batch.

    Raises:
        SpecError: an unknown norm, or a number that is not above 0.
    """
    if norm not in get_args(Norm):
        raise SpecError(unknown("norm", norm, get_args(Norm)))
    rho = (0.5 if norm == "l2" else 0.002) if rho is None else rho
    require_positive(rho=rho, steps=steps, starts=starts, tol=tol)
    before, value, worst_gap = point.cost, 0.0, 0.0
    for share, batch in over(point, per_batch):
        ball = _Ball(point, scale_of(point.theta, adaptive), rho, norm, batch)
        found = ball.maximum(generator, steps, starts)
        value += share * found.gain
        worst_gap = max(worst_gap, found.gap)
    note = f"first-order gap {worst_gap:.1%} of the increase"
    return Measurement(value, math.nan, worst_gap <= tol, point.cost - before, note)


def epsilon_sharpness(
    point: Point,
    generator: torch.Generator,
    epsilon: float = 1e-3,
    shape: Literal["box", "ball"] = "box",
    steps: int = 20,
    starts: int = 1,
    tol: float = 0.05,
) -> Measurement:
    """Epsilon-sharpness over all data.

    Keskar et al. 2017, arXiv:1609.04836, metric 2.1 in the full space (A = I) ::

        max { L(w + d) - L(w) : |d_i| <= epsilon (|w_i| + 1) } / (1 + L(w))

    The paper gives it times 100 and maximises by ten iterations of L-BFGS-B; here it is Auto-PGD, as in
    `worst_case_sharpness`. The +1 keeps it from being scale-invariant; its partner is the worst case in linf.

    Args:
        point: where.
        generator: draws the random starts.
        epsilon: half-width; the paper's larger one (the other is 5e-4).
        shape: ``"ball"`` bounds ``‖d / (|w| + 1)‖_2`` instead.
        steps, starts, tol: as in `worst_case_sharpness`.

    Raises:
        SpecError: an unknown shape, or a number that is not above 0.
        DataError: ``1 + L(w)`` is not above 0.
    """
    if shape not in ("box", "ball"):
        raise SpecError(unknown("shape", shape, ("box", "ball")))
    require_positive(epsilon=epsilon, steps=steps, starts=starts, tol=tol)
    before = point.cost
    ball = _Ball(point, point.theta.abs() + 1, epsilon, "linf" if shape == "box" else "l2", None)
    found = ball.maximum(generator, steps, starts)
    if not 1 + found.loss > 0:
        raise DataError(f"epsilon-sharpness divides by 1 + loss, and the loss is {found.loss}.")
    note = f"first-order gap {found.gap:.1%} of the increase"
    value = found.gain / (1 + found.loss)
    return Measurement(value, math.nan, found.gap <= tol, point.cost - before, note)


class _Maximum(NamedTuple):
    gain: float  # L(w + d) - L(w), never below 0
    gap: float  # first-order gain still to be had in the ball, as a share of `gain`
    loss: float  # L(w)


class _Seen(NamedTuple):
    z: Tensor
    value: float
    slope: Tensor


class _Ball:
    """The loss over ``‖z‖ <= rho`` with weights ``w + scale z``, of one batch or of all data (None)."""

    def __init__(self, point: Point, scale: Tensor, rho: float, norm: Norm, batch: int | None) -> None:
        self.point, self.scale, self.rho, self.norm, self.batch = point, scale, rho, norm, batch
        self.theta = point.theta

    def maximum(self, generator: torch.Generator, steps: int, starts: int) -> _Maximum:
        here = best = self._look(torch.zeros_like(self.theta))
        for number in range(starts):
            start = here if number == 0 else self._look(self._random(generator))
            best = max(best, self._climb(start, generator, steps), key=lambda seen: seen.value)
        gain = best.value - here.value
        dual = float(best.slope.norm() if self.norm == "l2" else best.slope.abs().sum())
        gap = max(self.rho * dual - float(best.slope @ best.z), 0.0)
        return _Maximum(gain, gap / gain if gain > 0 else math.inf, here.value)

    def _climb(self, start: _Seen, generator: torch.Generator, steps: int) -> _Seen:
        """Algorithm 1 of Croce & Hein: momentum, and a step size halved when too few steps rise."""
        now = best = start
        previous, eta, checks = start.z, 2 * self.rho, _checkpoints(steps)
        rises = last = 0
        eta_then, best_then = math.inf, -math.inf
        for k in range(1, steps + 1):
            z = self._project(now.z + eta * self._uphill(now.slope, generator))
            if k > 1:
                z = self._project(now.z + 0.75 * (z - now.z) + 0.25 * (now.z - previous))
            previous, old, now = now.z, now.value, self._look(z)
            rises += now.value > old
            best = now if now.value > best.value else best
            if k in checks:
                halve = rises < 0.75 * (k - last) or (eta == eta_then and best.value == best_then)
                eta_then, best_then, last, rises = eta, best.value, k, 0
                if halve:
                    eta, now, previous = eta / 2, best, best.z
        return best

    def _look(self, z: Tensor) -> _Seen:
        value, gradient = self.point.gradient(self.theta + self.scale * z, self.batch)
        return _Seen(z, value, self.scale * gradient)

    def _uphill(self, slope: Tensor, generator: torch.Generator) -> Tensor:
        if not slope.any():  # at an exact minimum every way leads up
            slope = normal(slope, generator)
        return slope / slope.norm() if self.norm == "l2" else slope.sign()

    def _project(self, z: Tensor) -> Tensor:
        if self.norm == "linf":
            return z.clamp(-self.rho, self.rho)
        return z * min(1.0, self.rho / (float(z.norm()) or 1.0))

    def _random(self, generator: torch.Generator) -> Tensor:
        if self.norm == "l2":
            z = normal(self.theta, generator)
            return z * (self.rho / float(z.norm()))
        drawn = torch.rand(self.theta.shape, generator=generator, dtype=torch.float64)
        return ((2 * drawn - 1) * self.rho).to(self.theta)


def _checkpoints(steps: int) -> set[int]:
    """Where the step size is judged: p = 0, 0.22, then wider apart by 0.03 less each time, at least 0.06."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(share * steps) for share in shares[1:]}

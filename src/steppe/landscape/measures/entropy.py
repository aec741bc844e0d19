"""Local entropy."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from steppe.landscape.hvp import hvp
from steppe.landscape.measures.common import normal, require_positive, scale_of
from steppe.landscape.point import Measurement, Point
from steppe.landscape.spectrum import lanczos

__all__ = ["local_entropy"]

_BLOCKS = 8


def local_entropy(
    point: Point,
    generator: torch.Generator,
    rho: float | None = None,
    beta: float = 100.0,
    adaptive: bool = False,
    nodes: int = 3,
    steps: int = 64,
    step: float = 0.2,
    tol: float = 0.1,
) -> Measurement:
    """Minus the local entropy, per beta and without its constant: how far the loss lies higher around w, softly.

    Chaudhari et al. 2017, arXiv:1611.01838, section 3, at inverse temperature beta, with ``gamma = 1 / (beta rho²)`` ::

        -1/beta · log E exp(-beta (L(w + d) - L(w))),   d ~ N(0, rho² diag(T²)),   T = 1 or |w|
        = 1/(2 beta) · log det(I + beta rho² T H T) for a quadratic at its minimum

    In units of the loss: for beta to 0 it is the average-case sharpness of the same rho, with larger beta directions in
    which the loss rises steeply count less. The logarithm is the integral over s in 0..1 of the mean of L(w + d) - L(w)
    under ``exp(-s beta L(w + d)) N(d)`` (thermodynamic integration, ours), at Gauss-Legendre nodes. The chains are
    stochastic gradient Langevin dynamics as in the paper, here with a Crank-Nicolson step for the Gaussian part, exact
    at s = 0, and one batch at a time, corrected by its gradient at w (Dubey et al. 2016, NeurIPS).

    Args:
        point: where.
        generator: draws noise and batches.
        rho: as in `average_case_sharpness`: default 0.1 if adaptive, else 0.01.
        beta: inverse temperature (ours: 100, so that a rise of 0.01 costs one nat; the number of samples would weigh
            as a posterior does).
        adaptive: noise relative to each weight, which makes it scale-invariant.
        nodes: of the integral.
        steps: of the chain at each node, after a quarter as many that are thrown away.
        step: the chain's, at most. It is cut to ``0.2 / k``, k the largest eigenvalue of ``s beta rho² T H T``: along
            it variances come out too large by ``step k / 2``, a tenth at most; with ``step k > 2`` a chain runs away.
        tol: converged when the standard error (of 8 block means per chain) is at most this share of the value, and
            each chain is two relaxation times of the normal part long (``steps · step >= 2``).

    Raises:
        SpecError: a number that is not above 0, or fewer than 8 steps.
    """
    before, theta = point.cost, point.theta
    rho = (0.1 if adaptive else 0.01) if rho is None else rho
    require_positive(rho=rho, beta=beta, nodes=nodes, steps=steps - _BLOCKS + 1, step=step, tol=tol)
    scale = rho * scale_of(theta, adaptive)
    loss = _CorrectedLoss(point, scale, generator)
    stiffest = lanczos(
        point, generator, tol=0.1, max_iter=10, operator=lambda v: scale * hvp(point, scale * v)
    )
    stiffness = beta * float(stiffest.values[0])
    at, weights = np.polynomial.legendre.leggauss(nodes)
    value, variance, shortest = 0.0, 0.0, step
    u = normal(theta, generator)
    for s, weight in zip((at + 1) / 2, weights / 2, strict=True):
        rises = []
        h = min(step, 0.2 / (s * stiffness)) if stiffness > 0 else step
        shortest = min(shortest, h)
        for k in range(steps // 4 + steps):
            rise, slope = loss(u)
            if k >= steps // 4:
                rises.append(rise)
            noise = math.sqrt(8 * h) * normal(theta, generator)
            u = ((2 - h) * u - (2 * h * s * beta) * slope + noise) / (2 + h)
        chain = np.array(rises)
        blocks = chain[: steps // _BLOCKS * _BLOCKS].reshape(_BLOCKS, -1).mean(axis=1)
        value += weight * chain.mean()
        variance += weight**2 * blocks.var(ddof=1) / _BLOCKS
    error = math.sqrt(variance)
    converged = error <= tol * abs(value) and steps * shortest >= 2
    note = f"stiffness {stiffness:.3g}, steps of {shortest:.3g} and more"
    return Measurement(float(value), error, converged, point.cost - before, note)


class _CorrectedLoss:
    """``u -> (L(w + scale u) - L(w), its gradient in u)``, without bias, from one random batch."""

    def __init__(self, point: Point, scale: Tensor, generator: torch.Generator) -> None:
        self.point, self.scale, self.generator = point, scale, generator
        self.theta, self.shares = point.theta, torch.tensor(point.shares, dtype=torch.float64)
        self.here, self.slope = point.gradient()

    def __call__(self, u: Tensor) -> tuple[float, Tensor]:
        moved = self.theta + self.scale * u
        if len(self.shares) == 1:
            value, gradient = self.point.gradient(moved)
            return value - self.here, self.scale * gradient
        batch = int(torch.multinomial(self.shares, 1, generator=self.generator))
        value, gradient = self.point.gradient(moved, batch)
        here, slope = self.point.gradient(batch=batch)
        excess = slope - self.slope  # of this batch over all, at w; its mean is 0
        rise = value - here - float(excess.double() @ (self.scale * u).double())
        return rise, self.scale * (gradient - excess)

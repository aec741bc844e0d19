"""Eigenvalues, trace and spectral density of the Hessian, or of any symmetric operator on a point's weights.

Each function takes an `operator` (`hessian` by default; `ggn` gives the Gauss-Newton matrix) and returns its own errors
and cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steppe.core.errors import SpecError, unknown
from steppe.core.flat import flatten
from steppe.landscape.hvp import Operator, hessian
from steppe.landscape.point import Cost, Measurement, Point

__all__ = [
    "Density",
    "Eigen",
    "density",
    "fisher_trace",
    "lambda_max",
    "lanczos",
    "measured",
    "signs",
    "trace",
]

MIN_PROBES = 10


@dataclass(frozen=True)
class Eigen:
    """The largest eigenvalues.

    Attributes:
        values: ``[k]`` float64, descending.
        vectors: ``[k, dim]``, of length 1.
        residuals: ``[k]``: an eigenvalue lies within this distance of each value (``|H v - value v|``).
        converged: whether all residuals are at most `tol` times their value.
        hvps: products that it took.
        cost: what it took.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    hvps: int
    cost: Cost


@dataclass(frozen=True)
class Density:
    """The spectral density, smoothed by a normal curve.

    Attributes:
        grid: ``[points]`` float64, eigenvalues.
        density: ``[points]``, share of the eigenvalues per unit; integrates to 1.
        stderr: ``[points]``, over the probes; NaN for one probe.
        nodes, weights: ``[n]`` of the quadrature before smoothing; the weights sum to 1.
        width: standard deviation of the normal curve.
        converged: whether the ends of each probe's spectrum are known to within `width`.
        cost: what it took.
    """

    grid: Tensor
    density: Tensor
    stderr: Tensor
    nodes: Tensor
    weights: Tensor
    width: float
    converged: bool
    cost: Cost


def lanczos(
    point: Point,
    generator: torch.Generator,
    k: int = 1,
    tol: float = 1e-3,
    max_iter: int = 100,
    operator: Operator | None = None,
) -> Eigen:
    """The `k` largest eigenvalues (by value, not magnitude) and their vectors.

    Lanczos from a random vector, fully re-orthogonalised, twice; stops as soon as ``beta_j |s_j| <= tol |value|`` for
    all `k`. An eigenvalue that occurs several times may be found once. Makes room for `max_iter` vectors.

    Args:
        point: where.
        generator: draws the first vector.
        k: how many.
        tol: relative residual. The value's own error is of the order of the residual's square over the gap.
        max_iter: products at most; what is known by then is returned with ``converged=False``.
        operator: symmetric; default the Hessian (`hessian`).

    Raises:
        SpecError: `k` is not in ``1..min(dim, max_iter)``.
    """
    limit = min(max_iter, point.dim)
    if not 1 <= k <= limit:
        raise SpecError(f"k must be from 1 to min(dim, max_iter) = {limit}, got {k}.")
    before = point.cost
    krylov = _Krylov(operator or hessian(point), point, generator, limit)
    while True:
        krylov.extend()
        values, vectors, residuals = krylov.ritz()
        top, worst = values[:k], residuals[:k]
        converged = len(values) >= k and bool((worst <= tol * top.abs()).all())
        if converged or krylov.size == limit:
            break
    found = vectors[:, :k].T.to(krylov.basis.dtype) @ krylov.basis[: krylov.size]
    found /= found.norm(dim=1, keepdim=True)
    return Eigen(top, found, worst, converged, krylov.size, point.cost - before)


def lambda_max(
    point: Point,
    generator: torch.Generator,
    tol: float = 1e-3,
    max_iter: int = 100,
    operator: Operator | None = None,
) -> Measurement:
    """The largest eigenvalue as a measurement; arguments as `lanczos`."""
    eigen = lanczos(point, generator, 1, tol, max_iter, operator)
    note = f"residual {float(eigen.residuals[0]):.1e} after {eigen.hvps} products"
    return Measurement(float(eigen.values[0]), math.nan, eigen.converged, eigen.cost, note)


def trace(
    point: Point,
    generator: torch.Generator,
    stderr: float = 0.1,
    method: Literal["hutchinson", "hutch++"] = "hutchinson",
    max_probes: int = 400,
    rank: int = 10,
    operator: Operator | None = None,
) -> Measurement:
    """The trace, to a relative standard error.

    ``"hutchinson"``: the mean of ``vᵀHv`` over random signs v (Hutchinson 1989). ``"hutch++"``: exact on the span of
    ``H S`` for `rank` random directions S, Hutchinson on the rest (Meyer, Musco, Musco & Woodruff 2021, algorithm 1,
    with the sizes of the two parts set apart); pays where few eigenvalues hold most of the trace.

    Args:
        point: where.
        generator: draws the probes.
        stderr: wanted standard error over ``|trace|``; at least 10 probes are drawn.
        method: see above.
        max_probes: probes at most; what is known by then is returned with ``converged=False``.
        rank: of the exact part of Hutch++, which costs twice as many products.
        operator: symmetric; default the Hessian (`hessian`).

    Raises:
        SpecError: an unknown method, or `stderr` is not above 0.
    """
    if method not in ("hutchinson", "hutch++"):
        raise SpecError(unknown("method", method, ("hutchinson", "hutch++")))
    before, product, theta = point.cost, operator or hessian(point), point.theta
    exact, basis = 0.0, theta.new_zeros(point.dim, 0)
    if method == "hutch++":
        sketch = [product(signs(theta, generator)) for _ in range(min(rank, point.dim))]
        basis = torch.linalg.qr(torch.stack(sketch, dim=1)).Q
        exact = sum(_dot(q, product(q)) for q in basis.T.contiguous())

    def probe() -> float:
        v = signs(theta, generator)
        v = v - basis @ (basis.T @ v)
        return _dot(v, product(v))

    return measured(point, before, probe, stderr, max_probes, exact)


def fisher_trace(
    point: Point,
    generator: torch.Generator,
    losses: Callable[[nn.Module, Any], Tensor],
    stderr: float = 0.1,
    max_probes: int = 400,
) -> Measurement:
    """Trace of the empirical Fisher matrix: the mean over samples of the squared norm of each one's gradient.

    No gradient of a single sample is taken: with random signs s, ``E |∇ Σ s_i l_i|² = Σ |∇ l_i|²``, so a probe costs
    one gradient. (The Fisher matrix under the model's own predictions is `ggn`: ``trace(..., operator=ggn(...))``.)

    Args:
        point: where; its batches and their shares are used, not its loss.
        generator: draws the signs.
        losses: ``losses(model, batch) -> [n]``, one negative log-likelihood per sample.
        stderr, max_probes: as in `trace`.
    """
    before = point.cost

    def probe() -> float:
        total = 0.0
        with point.evaluating(), torch.enable_grad():
            for share, batch in point.chosen(None):
                each = losses(point.model, batch)
                gradient = torch.autograd.grad(
                    signs(each, generator) @ each, point.params, materialize_grads=True
                )
                total += share / len(each) * float(flatten(gradient).square().sum())
        point.charge(gradient=1.0)
        return total

    return measured(point, before, probe, stderr, max_probes)


def density(
    point: Point,
    generator: torch.Generator,
    probes: int = 4,
    steps: int = 60,
    points: int = 512,
    width: float | None = None,
    operator: Operator | None = None,
) -> Density:
    """The density of all eigenvalues by stochastic Lanczos quadrature (Ghorbani, Krishnan & Xiao 2019, algorithm 1).

    Args:
        point: where.
        generator: draws the probes.
        probes: random first vectors.
        steps: Lanczos steps of each; costs ``probes * steps`` products.
        points: of the grid.
        width: standard deviation of the normal curve; default a hundredth of the spectrum's spread.
        operator: symmetric; default the Hessian (`hessian`).

    Raises:
        SpecError: fewer than one probe, step or point, or a width that is not above 0.
    """
    if min(probes, steps, points) < 1 or (width is not None and width <= 0):
        raise SpecError(
            f"probes, steps, points and width must be above 0, got {probes}, {steps}, {points} and {width}."
        )
    before, product, limit = point.cost, operator or hessian(point), min(steps, point.dim)
    rules, ends = [], []
    for _ in range(probes):
        krylov = _Krylov(product, point, generator, limit)
        while krylov.size < limit and not krylov.exhausted:
            krylov.extend()
        values, vectors, residuals = krylov.ritz()
        rules.append((values, vectors[0] ** 2))
        ends.append(max(float(residuals[0]), float(residuals[-1])))
    nodes, weights = (torch.cat(parts) for parts in zip(*rules, strict=True))
    low, high = float(nodes.min()), float(nodes.max())
    if width is None:
        width = (high - low or abs(high) or 1.0) / 100
    grid = torch.linspace(low - 5 * width, high + 5 * width, points, dtype=torch.float64)
    each = torch.stack([_smooth(grid, *rule, width) for rule in rules])
    spread = each.std(dim=0) / math.sqrt(probes) if probes > 1 else torch.full_like(grid, math.nan)
    return Density(
        grid,
        each.mean(dim=0),
        spread,
        nodes,
        weights / probes,
        width,
        max(ends) <= width,
        point.cost - before,
    )


class _Krylov:
    """Orthonormal vectors ``basis [size, dim]`` in which the operator is tridiagonal."""

    def __init__(self, product: Operator, point: Point, generator: torch.Generator, limit: int) -> None:
        self.product, self.generator = product, generator
        self.basis = point.theta.new_empty(limit, point.dim)
        self.alphas: list[float] = []
        self.betas: list[float] = []
        self.basis[0] = self._fresh(0)

    @property
    def size(self) -> int:
        return len(self.alphas)

    @property
    def exhausted(self) -> bool:
        """Whether the operator does not lead out of the span of the basis."""
        return bool(self.betas) and self.betas[-1] == 0

    def extend(self) -> None:
        """One product; where it does not lead out of the span, a random vector goes on."""
        q = self.basis[self.size]
        image = self.product(q)
        self.alphas.append(_dot(q, image))
        rest = self._outside(image, self.size)
        beta = float(rest.norm())
        rounding = torch.finfo(q.dtype).eps * math.sqrt(len(q)) * float(image.norm())
        self.betas.append(beta if beta > rounding and self.size < len(q) else 0.0)
        if self.size < len(self.basis):
            self.basis[self.size] = rest / beta if self.betas[-1] else self._fresh(self.size)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values ``[size]`` descending, their vectors in the basis (columns) and residuals, in float64."""
        off = torch.tensor(self.betas[:-1], dtype=torch.float64)
        matrix = torch.diag(torch.tensor(self.alphas, dtype=torch.float64)) + off.diag(1) + off.diag(-1)
        values, vectors = torch.linalg.eigh(matrix)
        return values.flip(0), vectors.flip(1), (self.betas[-1] * vectors[-1]).abs().flip(0)

    def _outside(self, vector: Tensor, size: int) -> Tensor:
        # twice is enough (Parlett 1998, section 6.9): once leaves rounding errors of the size of the operator
        for _ in range(2):
            vector = vector - self.basis[:size].T @ (self.basis[:size] @ vector)
        return vector

    def _fresh(self, size: int) -> Tensor:
        drawn = torch.randn(self.basis.shape[1], generator=self.generator, dtype=torch.float64)
        vector = self._outside(drawn.to(self.basis), size)
        return vector / vector.norm()


def measured(
    point: Point, before: Cost, probe: Callable[[], float], stderr: float, limit: int, exact: float = 0.0
) -> Measurement:
    """`exact` plus the mean of as many probes as bring its standard error to ``stderr |value|``."""
    if not stderr > 0 or limit < 2:
        raise SpecError(f"stderr must be above 0 and max_probes 2 or more, got {stderr} and {limit}.")
    draws: list[float] = []
    while True:
        draws.append(probe())
        if len(draws) < min(MIN_PROBES, limit):
            continue
        found = torch.tensor(draws, dtype=torch.float64)
        value, error = exact + float(found.mean()), float(found.std()) / math.sqrt(len(draws))
        converged = error <= stderr * abs(value)
        if converged or len(draws) == limit:
            return Measurement(value, error, converged, point.cost - before, f"{len(draws)} probes")


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent ±1 of the shape, dtype and device of `like`, drawn on the CPU."""
    return (2.0 * torch.randint(2, like.shape, generator=generator) - 1).to(like)


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double())


def _smooth(grid: Tensor, nodes: Tensor, weights: Tensor, width: float) -> Tensor:
    z = (grid.unsqueeze(1) - nodes) / width
    return torch.exp(-0.5 * z**2) @ weights / (width * math.sqrt(2 * math.pi))

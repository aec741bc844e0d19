"""CMA-ES: a normal distribution that learns, from the ranks of its samples, where to look next and how far.

Hansen 2016/2023, "The CMA Evolution Strategy: A Tutorial", arXiv:1604.00772; the separable form is Ros & Hansen 2008,
"A Simple Modification in CMA-ES Achieving Linear Time and Space Complexity", with the step size of Hansen 2008,
"CMA-ES with Two-Point Step-Size Adaptation", arXiv:0805.0231, by ranks.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steppe.core.errors import SpecError, unknown
from steppe.core.seeding import generator
from steppe.optim.gradient_free import restarts as runs
from steppe.optim.gradient_free.base import Bounds, GradientFree
from steppe.optim.gradient_free.populations import reflect
from steppe.optim.gradient_free.restarts import Run
from steppe.optim.gradient_free.strategy import default_population, strategy

__all__ = ["CMAES", "LARGEST_FULL"]

Array: TypeAlias = NDArray[np.float64]

LARGEST_FULL = 2000
"""Most weights for a full covariance: its decomposition takes seconds there, and its memory grows with the square."""

_WORST_AXES = 1e7  # longest axis over shortest: a condition of 1e14
_DIVERGED = 1e4  # times the first standard deviation


class CMAES(GradientFree):
    """Covariance matrix adaptation, with the tutorial's defaults: negative weights, and a population of 4 + 3 ln n.

    One generation, with the candidates numbered from the best to the worst (equations 39 to 47)::

        z_k ~ N(0, I)      y_k = C^(1/2) z_k      x_k = m + sigma y_k             k = 1 .. lambda
        <y> = sum_{k <= mu} w_k y_k               m <- m + sigma <y>
        p_s <- (1 - cs) p_s + sqrt(cs (2 - cs) mu_eff) C^(-1/2) <y>
        p_c <- (1 - cc) p_c + h sqrt(cc (2 - cc) mu_eff) <y>
        sigma <- sigma exp(cs / ds (|p_s| / E|N(0, I)| - 1))
        C <- (1 + c1 (1 - h) cc (2 - cc) - c1 - cmu sum w) C + c1 p_c p_c^T + cmu sum_k w'_k y_k y_k^T

    with w'_k = w_k, for negative weights n w_k / |C^(-1/2) y_k|^2, and h = 0 while p_s is long. The root of C is the
    symmetric one, so that C^(-1/2) y_k is z_k. When the best and the 0.7 lambda-th loss are equal, sigma grows by
    exp(0.2 + cs / ds).

    The separable form, meant for many weights, takes its step size from two points instead: the path p_s of length
    sqrt(n) needs about n generations to learn anything. Two of the candidates go along the last step of the mean,
    forth and back, as long as random ones, and sigma grows when the one that goes on ranks better::

        z_1 = -z_2 = |z_1| C^(-1/2) (m - m_last) / |C^(-1/2) (m - m_last)|
        q = (rank(x_2) - rank(x_1)) / (lambda - 1)        s <- 0.7 s + 0.3 sign(q) |q|^(1/2)
        sigma <- sigma exp(s / d)                         d = 0.7 + 2 ln n

    The constants are pycma's (version 4.5), which does so from 300 weights on.

    Only ranks count, so a strictly increasing transform of the loss changes nothing but where `tolfun` stops.

    Bounds: the loss is continued by mirroring at the bounds (`reflect`; "Darwinian reflection" in Biedrzycki 2020,
    "Handling bound constraints in CMA-ES"). Candidates are always inside; the distribution knows nothing of bounds and
    stays normal, and no penalty makes values count.

    A run ends (`finished` says why) when the losses are equal within `tolfun`, the distribution is smaller than
    `tolx`, lost in rounding, ill-conditioned (1e14) or 1e4 times
    as wide as at first, or when the losses stagnate.

    Args:
        params: what torch optimizers take.
        sigma: first standard deviation of each weight. None takes 0.3 of the distance between finite bounds, and 0.5
            for weights without.
        population: candidates per generation (of the first run); None takes 4 + floor(3 ln n).
        covariance: ``"full"`` (memory of 16 n^2 bytes, up to 2,000 weights) or ``"separable"`` (a diagonal: linear).
        restarts: ``"none"``; ``"ipop"`` begins again with twice the population, ``"bipop"`` also with small ones in
            between, nine doublings at most. A restart begins anywhere between finite bounds, without them near the
            first start (one first standard deviation).
        tolfun: in units of the loss; as pycma.
        tolx: in units of the first standard deviation.
        bounds, seed: see `GradientFree`.

    Raises:
        SpecError: a value out of its range, or a full covariance over more than 2,000 weights.
    """

    def __init__(
        self,
        params: Any,
        *,
        sigma: float | None = None,
        population: int | None = None,
        covariance: str = "full",
        restarts: str = "none",
        tolfun: float = 1e-11,
        tolx: float = 1e-12,
        bounds: Bounds | None = None,
        seed: int = 0,
    ) -> None:
        if sigma is not None and not 0 < sigma < math.inf:
            raise SpecError(f"sigma must be positive and finite, got {sigma}.")
        if population is not None and population < 3:
            raise SpecError(f"population must be at least 3, got {population}.")
        for name, given, known in (
            ("covariance", covariance, ("full", "separable")),
            ("restarts", restarts, ("none", "ipop", "bipop")),
        ):
            if given not in known:
                raise SpecError(unknown(name, given, known))
        defaults = {
            "sigma": sigma,
            "population": population,
            "covariance": covariance,
            "restarts": restarts,
            "tolfun": tolfun,
            "tolx": tolx,
        }
        self._drawn: tuple[dict[str, Any], Tensor] | None = None
        super().__init__(params, defaults, bounds=bounds, seed=seed)
        self._guard()

    @property
    def separable(self) -> bool:
        """Whether the covariance is a diagonal."""
        return bool(self.hyper("covariance") == "separable")

    @property
    def _arrays(self) -> tuple[str, ...]:
        always = ("mean", "cov", "root", "path_s", "path_c")
        return (*always, "shift") if self.separable else always

    @property
    def finished(self) -> str:
        """Why the last run ended, when no restart follows; empty before."""
        return str(self.memory.get("stop", ""))

    def begin(self, start: Tensor) -> dict[str, Any]:
        """The first run, around ``start [dim]``."""
        self._guard()
        first = Run(self.hyper("population") or default_population(self.dim))
        spent = {"large": 0, "small": 0, "last": 0}
        return {
            "start": start,
            "restart": 0,
            "spent": spent,
            "stop": "",
            **self._fresh(start, first),
        }

    def draw(self) -> Tensor:
        """The candidates in units of the distribution, standard normal but for the separable form's two points
        ``[population, dim]``."""
        m = self.memory
        if self._drawn is None or self._drawn[0] is not m:
            stream = generator(self.seed, "cma_es", m["restart"], self.generation)
            # single precision is plenty for a random number, and drawn four times as fast
            z = torch.randn(m["run"]["population"], self.dim, generator=stream).double()
            if self.separable and (forth := m["shift"] / m["root"]).any():
                z[0] = forth * (z[0].norm() / forth.norm())
                z[1] = -z[0]
            self._drawn = m, z
        return self._drawn[1]

    def candidates(self) -> Tensor:
        """m + sigma C^(1/2) z, mirrored at the bounds ``[population, dim]``."""
        m = self.memory
        return self._mirrored(torch.add(m["mean"], _times(self.draw(), m["root"]), alpha=m["sigma"]))

    def update(self, theta: Tensor, values: Tensor) -> dict[str, Any]:
        """Equations 39 to 47 of the tutorial, from the ranks of ``values [population]``; then the end of the run."""
        # in NumPy, whose calls cost half of torch's where there are few weights
        m = {**self.memory, **{name: self.memory[name].numpy() for name in self._arrays}}
        n, population = len(m["mean"]), len(values)
        s = strategy(n, population, self.separable)
        losses = values.numpy()
        order = losses.argsort(kind="stable")
        z = self.draw().numpy()[order]
        y = _times(z, m["root"])

        parents = s.weights[: s.parents]
        mean_z, mean_y = parents @ z[: s.parents], parents @ y[: s.parents]
        mean = m["mean"] + m["sigma"] * mean_y

        age = m["age"] + 1
        path_s = (1 - s.cs) * m["path_s"] + math.sqrt(s.cs * (2 - s.cs) * s.mass) * mean_z
        length = math.sqrt(path_s @ path_s)
        unbiased = length / math.sqrt(1 - (1 - s.cs) ** (2 * age))
        short = unbiased < (1.4 + 2 / (n + 1)) * s.length
        gain = math.sqrt(s.cc * (2 - s.cc) * s.mass) if short else 0.0
        path_c = (1 - s.cc) * m["path_c"] + gain * mean_y
        growth = s.cs / s.ds * (length / s.length - 1)
        points: dict[str, Any] = {}
        if self.separable:
            trend = _trend(m["trend"], losses) if m["shift"].any() else 0.0
            growth, points = trend / (0.7 + 2 * math.log(n)), {"trend": trend, "shift": mean - m["mean"]}
        sigma = m["sigma"] * math.exp(growth)

        worse = s.weights[s.parents :] * n / (z[s.parents :] ** 2).sum(axis=1)
        weights = np.concatenate([parents, worse])
        lost = 0.0 if short else s.cc * (2 - s.cc)
        kept = 1 + s.c1 * lost - s.c1 - s.cmu * s.total
        cov = _updated(m["cov"], kept, s.c1, path_c, s.cmu, weights, y)

        ranked = losses[order].tolist()
        best, middle, near = ranked[0], ranked[population // 2], ranked[(7 * population - 1) // 10]
        if best == near < math.inf:
            sigma *= math.exp(0.2 + s.cs / s.ds)
        keep = runs.window(age, n, population) - 1
        bests, medians = [*m["bests"][-keep:], best], [*m["medians"][-keep:], middle]

        m |= {"mean": mean, "sigma": sigma, "cov": cov, "path_s": path_s, "path_c": path_c, "age": age}
        m |= {"bests": bests, "medians": medians, **points}
        stop = ""
        if runs.still(bests, ranked[-1], n, population, self.hyper("tolfun")):
            stop = "losses equal within tolfun"
        elif age % 10 == 0 and len(bests) > keep and runs.stagnates(bests, medians):
            stop = "losses stagnate"
        elif age >= m["run"]["generations"]:
            stop = "longest run"
        elif age % s.gap == 0:
            m["root"], stop = self._decomposed(m)
        following = {**m, **{name: torch.from_numpy(m[name]) for name in self._arrays}}
        return self._ended(following, stop) if stop else following

    def _decomposed(self, m: dict[str, Any]) -> tuple[Array, str]:
        """The root of the covariance, and why the run should end."""
        cov, sigma, axes = m["cov"], m["sigma"], None
        if cov.ndim == 1:
            root = lengths = np.sqrt(cov.clip(min=0))
            deviations = sigma * root
        else:
            # torch's: it keeps to the number of threads that was set
            spectrum, vectors = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy(cov)))
            lengths = np.sqrt(spectrum.clip(min=0))
            scaled = vectors * lengths
            root, axes, deviations = scaled @ vectors.T, sigma * scaled.T, sigma * np.sqrt(cov.diagonal())
        shortest, longest = float(lengths.min()), float(lengths.max())
        if not longest < _WORST_AXES * shortest:
            return root, "covariance ill-conditioned"
        if sigma * longest > _DIVERGED * m["first_sigma"]:
            return root, "distribution diverges"
        small = self.hyper("tolx") * m["first_sigma"]
        if sigma * longest < small and sigma * np.abs(m["path_c"]).max() < small:
            return root, "distribution smaller than tolx"
        return root, runs.without_effect(m["mean"], deviations, axes)

    def _ended(self, m: dict[str, Any], stop: str) -> dict[str, Any]:
        """The first memory of the next run, or the last one of the search."""
        run, restart = Run(**m["run"]), m["restart"] + 1
        used, kind = m["age"] * run.population, "large" if run.large else "small"
        spent = {**m["spent"], kind: m["spent"][kind] + used}
        if run.large:
            spent["last"] = used
        stream = generator(self.seed, "cma_es", "restart", restart)
        default = self.hyper("population") or default_population(self.dim)
        draws = torch.rand(2, generator=stream, dtype=torch.float64)
        following = runs.after(run, self.hyper("restarts"), default, self.dim, spent, draws)
        if following is None:
            return {**m, "spent": spent, "stop": stop}
        fresh = self._fresh(self._elsewhere(m["start"], stream), following)
        return {**m, **fresh, "restart": restart, "spent": spent}

    def _fresh(self, mean: Tensor, run: Run) -> dict[str, Any]:
        """What a run starts with."""
        deviations = run.spread * self._deviations()
        sigma = float(deviations.max())
        root = deviations / sigma
        points = {"trend": 0.0, "shift": torch.zeros_like(mean)} if self.separable else {}
        return {
            "run": asdict(run),
            "mean": mean,
            "sigma": sigma,
            "first_sigma": sigma,
            "cov": root.square() if self.separable else root.square().diag(),
            "root": root if self.separable else root.diag(),
            "path_s": torch.zeros_like(mean),
            "path_c": torch.zeros_like(mean),
            "age": 0,
            "bests": [],
            "medians": [],
            **points,
        }

    def _deviations(self) -> Tensor:
        """First standard deviations of the weights ``[dim]``."""
        if (sigma := self.hyper("sigma")) is not None:
            return torch.full((self.dim,), float(sigma), dtype=torch.float64)
        width = torch.full((self.dim,), math.inf, dtype=torch.float64)
        if self.bounds is not None:
            width = self.bounds[1] - self.bounds[0]
        return torch.where(width.isinf(), 0.5, 0.3 * width)

    def _elsewhere(self, start: Tensor, stream: torch.Generator) -> Tensor:
        """Where a restart begins ``[dim]``."""
        near = start + self._deviations() * torch.randn(self.dim, generator=stream, dtype=torch.float64)
        if self.bounds is None:
            return near
        low, high = self.bounds
        width = high - low
        anywhere = low + width * torch.rand(self.dim, generator=stream, dtype=torch.float64)
        return self.inside(torch.where(width.isinf(), near, anywhere))

    def _mirrored(self, theta: Tensor) -> Tensor:
        return theta if self.bounds is None else reflect(theta, *self.bounds)

    def _guard(self) -> None:
        if not self.separable and self.dim > LARGEST_FULL:
            full, separable = 16 * self.dim**2, 8 * self.dim * (8 + 3 * default_population(self.dim))
            raise SpecError(
                f"a full covariance over {self.dim:,} weights takes {_bytes(full)} and time as their cube; "
                f"the most is {LARGEST_FULL:,}. Use covariance='separable', which takes about {_bytes(separable)}."
            )


def _times(z: Any, root: Any) -> Any:
    return z * root if root.ndim == 1 else z @ root


def _trend(trend: float, losses: Array) -> float:
    """Whether going on was better than going back, lately: from -1 to 1."""
    ahead = (int((losses < losses[1]).sum()) - int((losses < losses[0]).sum())) / (len(losses) - 1)
    return 0.7 * trend + 0.3 * math.copysign(math.sqrt(abs(ahead)), ahead)


def _updated(cov: Array, kept: float, c1: float, path: Array, cmu: float, weights: Array, y: Array) -> Array:
    """kept cov + c1 path path^T + cmu sum_k weights_k y_k y_k^T, or the diagonal of it."""
    if cov.ndim == 1:
        return kept * cov + c1 * path**2 + cmu * (weights @ y**2)
    return kept * cov + c1 * np.outer(path, path) + cmu * ((weights[:, None] * y).T @ y)


def _bytes(number: float) -> str:
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"

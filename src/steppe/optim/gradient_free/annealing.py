"""Simulated annealing: the classical one on many chains, and SciPy's dual annealing."""

from __future__ import annotations

import inspect
import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steppe.core.errors import SpecError, unknown
from steppe.core.seeding import derive, generator
from steppe.optim.gradient_free.base import Bounds, GradientFree
from steppe.optim.gradient_free.driven import (
    Array,
    Driven,
    Ending,
    Evaluate,
    Solver,
    differences,
    require_scipy,
)

__all__ = ["Annealing", "DualAnnealing"]

_EPS = 1e-8  # SciPy's for L-BFGS-B
_SETTINGS = ("initial_temp", "restart_temp_ratio", "visit", "accept", "maxiter")
_FROZEN = 1e-12  # of the first temperature
_ACCEPTED = 0.8  # of the first moves uphill


class Annealing(GradientFree):
    """Classical simulated annealing, on chains that do not know of each other and are evaluated together.

    Kirkpatrick, Gelatt & Vecchi 1983, Science 220:671, at temperature T_k of move k = 0, 1, ... ::

        w' = w + scale · (upper - lower) · sqrt(T_k / T_0) · z        z ~ normal    moves="gaussian"
        w' = w + scale · (upper - lower) ·      (T_k / T_0) · z        z ~ Cauchy    moves="cauchy"
        w  = w'  with probability  min(1, exp(-(L(w') - L(w)) / T_k))
        T_k = T_0 · rate^k                                              cooling="geometric"
        T_k = T_0 · log(2) / log(2 + k)                                 cooling="logarithmic"

    The paper moves spins, and cools to 0.9 of the temperature after many moves; the moves in continuous space are
    those of Boltzmann annealing (Geman & Geman 1984, whose cooling is the logarithmic one) and of fast annealing
    (Szu & Hartley 1987). A move that leaves the bounds is reflected at them. The first step evaluates the chains'
    starting points: the first chain's is the parameters, the others' are uniform inside the bounds.

    Args:
        params: see `GradientFree`.
        bounds: see `GradientFree`; required and finite: moves are measured by them.
        chains: evaluations of a step, >= 1.
        initial_temp: T_0 > 0, in units of the loss. None: such that the first moves uphill would be accepted with
            probability 0.8 if all rose by their mean.
        cooling: "geometric" (the search ends when T_k is below 1e-12 T_0) or "logarithmic" (it never ends).
        rate: of geometric cooling, in (0, 1).
        moves: "gaussian" or "cauchy".
        scale: length of the first moves, as a part of the bounds' width, > 0.
        seed: see `GradientFree`.

    Raises:
        SpecError: bounds are missing or infinite, or a hyper-parameter is out of its range.
    """

    def __init__(
        self,
        params: Any,
        bounds: Bounds | None = None,
        *,
        chains: int = 10,
        initial_temp: float | None = None,
        cooling: str = "geometric",
        rate: float = 0.99,
        moves: str = "gaussian",
        scale: float = 0.1,
        seed: int = 0,
    ) -> None:
        for kind, given, known in (
            ("cooling", cooling, ("geometric", "logarithmic")),
            ("moves", moves, ("gaussian", "cauchy")),
        ):
            if given not in known:
                raise SpecError(unknown(kind, given, known))
        if not (chains >= 1 and 0 < rate < 1 and scale > 0 and (initial_temp is None or initial_temp > 0)):
            raise SpecError(
                f"need chains >= 1, rate in (0, 1), scale > 0 and initial_temp > 0, got chains={chains}, "
                f"rate={rate}, scale={scale}, initial_temp={initial_temp}."
            )
        hyper = {
            "chains": chains,
            "initial_temp": initial_temp,
            "cooling": cooling,
            "rate": rate,
            "moves": moves,
            "scale": scale,
        }
        super().__init__(params, hyper, bounds=bounds, seed=seed)
        finite_bounds(self)

    def begin(self, start: Tensor) -> dict[str, Any]:
        """See `GradientFree`."""
        stream = generator(self.seed, "annealing", "start")
        low, high = finite_bounds(self)
        drawn = torch.rand(self.hyper("chains") - 1, self.dim, generator=stream, dtype=start.dtype)
        points = torch.cat([start[None], low + (high - low) * drawn])
        return {
            "points": self.inside(points),
            "values": None,
            "moves": 0,
            "initial_temp": self.hyper("initial_temp"),
        }

    def candidates(self) -> Tensor:
        """See `GradientFree`."""
        points: Tensor = self.memory["points"]
        if self.memory["values"] is None:
            return points.clone()
        stream = generator(self.seed, "annealing", "moves", self.generation)
        first, second = torch.randn(2, *points.shape, generator=stream, dtype=points.dtype)
        cold = self.coldness()
        moves = math.sqrt(cold) * first if self.hyper("moves") == "gaussian" else cold * first / second
        low, high = finite_bounds(self)
        width = high - low
        moved = torch.remainder(points + self.hyper("scale") * width * moves - low, 2 * width)
        reflected = low + torch.minimum(moved, 2 * width - moved)
        # a Cauchy move may be infinite: that chain stays for this step
        return self.inside(torch.where(reflected.isfinite(), reflected, points))

    def update(self, theta: Tensor, values: Tensor) -> dict[str, Any]:
        """See `GradientFree`: Metropolis' rule in each chain."""
        before: Tensor | None = self.memory["values"]
        if before is None:
            return {**self.memory, "values": values}
        rise = values - before
        uphill = rise[(rise > 0) & rise.isfinite()]
        temp = self.memory["initial_temp"]
        if temp is None and len(uphill):
            temp = float(uphill.mean()) / math.log(1 / _ACCEPTED)
        drawn = torch.rand(
            len(values),
            generator=generator(self.seed, "annealing", "acceptance", self.generation),
            dtype=rise.dtype,
        )
        # before there is a temperature nothing has gone uphill
        accepted = (values <= before) | (drawn < torch.exp(-rise / ((temp or 1.0) * self.coldness())))
        return {
            "points": torch.where(accepted[:, None], theta, self.memory["points"]),
            "values": torch.where(accepted, values, before),
            "moves": self.memory["moves"] + 1,
            "initial_temp": temp,
        }

    @property
    def finished(self) -> str:
        """Why there is nothing more to do; empty while there is."""
        return f"the temperature is below {_FROZEN:g} of the first" if self.coldness() < _FROZEN else ""

    def coldness(self) -> float:
        """T_k / T_0."""
        moves = self.memory.get("moves", 0)
        if self.hyper("cooling") == "geometric":
            return float(self.hyper("rate") ** moves)
        return math.log(2) / math.log(2 + moves)


class DualAnnealing(Driven):
    """Dual annealing: generalized simulated annealing, with a local search from what it finds.

    Xiang, Sun, Fan & Gong 1997, Phys. Lett. A 233:216 (generalized annealing, after Tsallis); Xiang, Gubian, Suomela
    & Hoeng 2013, R Journal 5(1) (with local search). The solver is SciPy's: in an iteration each of 2 · dim moves,
    dim of all weights and dim of single ones, is one evaluation.

    The local search is named because it does much of the work: on smooth losses most of what is called "annealing"
    is L-BFGS-B by forward differences. ``local_search="none"`` is the annealing alone.

    Args:
        params: see `GradientFree`.
        bounds: see `GradientFree`; required and finite.
        local_search: "l-bfgs-b" (differences of length 1e-8 are evaluated together) or "none".
        initial_temp: in (0.01, 5e4].
        restart_temp_ratio: annealing starts anew below this part of the first temperature; in (0, 1).
        visit: q_v, the tail of the moves: higher goes farther; in (1, 3).
        accept: q_a, the lower the fewer moves uphill; in (-1e4, -5].
        maxiter: iterations at most.
        seed: see `GradientFree`.

    Raises:
        SpecError: SciPy is missing, bounds are missing or infinite, or a hyper-parameter is out of its range.
    """

    def __init__(
        self,
        params: Any,
        bounds: Bounds | None = None,
        *,
        local_search: str = "l-bfgs-b",
        initial_temp: float = 5230.0,
        restart_temp_ratio: float = 2e-5,
        visit: float = 2.62,
        accept: float = -5.0,
        maxiter: int = 1000,
        seed: int = 0,
    ) -> None:
        require_scipy("DualAnnealing")
        if local_search not in ("l-bfgs-b", "none"):
            raise SpecError(unknown("local_search", local_search, ("l-bfgs-b", "none")))
        if not (
            0.01 < initial_temp <= 5e4
            and 0 < restart_temp_ratio < 1
            and 1 < visit < 3
            and -1e4 < accept <= -5
            and maxiter >= 1
        ):
            raise SpecError(
                "need initial_temp in (0.01, 5e4], restart_temp_ratio in (0, 1), visit in (1, 3), accept in "
                f"(-1e4, -5], maxiter >= 1; got {initial_temp}, {restart_temp_ratio}, {visit}, {accept}, {maxiter}."
            )
        hyper = {
            "local_search": local_search,
            "initial_temp": initial_temp,
            "restart_temp_ratio": restart_temp_ratio,
            "visit": visit,
            "accept": accept,
            "maxiter": maxiter,
        }
        super().__init__(params, hyper, bounds=bounds, seed=seed)
        finite_bounds(self)

    def solver(self, start: Array) -> Solver:
        """See `Driven`."""
        low, high = finite_bounds(self)
        settings = {name: self.hyper(name) for name in _SETTINGS}
        return partial(
            _anneal,
            start=start,
            low=low.numpy(),
            high=high.numpy(),
            search=self.hyper("local_search") != "none",
            seed=derive(self.seed, "dual_annealing"),
            settings=settings,
        )


def finite_bounds(search: GradientFree) -> tuple[Tensor, Tensor]:
    """The bounds ``[dim]`` of a search that cannot do without.

    Raises:
        SpecError: there are none, or one is infinite.
    """
    if search.bounds is None or not all(bound.isfinite().all() for bound in search.bounds):
        raise SpecError(
            f"{type(search).__name__} searches between bounds: give bounds=(lower, upper), both finite."
        )
    return search.bounds


def _anneal(
    evaluate: Evaluate,
    *,
    start: Array,
    low: Array,
    high: Array,
    search: bool,
    seed: int,
    settings: dict[str, Any],
) -> Ending:
    from scipy.optimize import dual_annealing

    known: tuple[Array, float] | None = None

    def value(x: Array) -> float:
        nonlocal known
        known = x.copy(), float(evaluate(np.clip(x, low, high)[None])[0][0])
        return known[1]

    def slopes(x: Array) -> Array:
        fx = known[1] if known is not None and np.array_equal(known[0], x) else value(x)
        return differences(evaluate, x, fx, _EPS, low, high)

    box = list(zip(low, high, strict=True))
    local = {
        "method": "L-BFGS-B",
        "jac": slopes,
        "bounds": box,
        "options": {"maxiter": min(max(6 * len(start), 100), 1000)},  # as SciPy's own choice
    }
    # SciPy renamed `seed`; both take a Generator, and PCG64's stream is the same in all versions
    name = "rng" if "rng" in inspect.signature(dual_annealing).parameters else "seed"
    result = dual_annealing(
        value,
        box,
        x0=start,
        minimizer_kwargs=local,
        no_local_search=not search,
        **settings,
        **{name: np.random.Generator(np.random.PCG64(seed))},
    )
    message = result.message if isinstance(result.message, str) else "; ".join(result.message)
    return Ending(message, np.asarray(result.x), float(result.fun))

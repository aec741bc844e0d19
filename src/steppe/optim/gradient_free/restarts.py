"""When a run of CMA-ES has ended, and how large the next one is.

IPOP (Auger & Hansen 2005, "A restart CMA evolution strategy with increasing population size") doubles the population
at each restart. BIPOP (Hansen 2009, "Benchmarking a BI-population CMA-ES on the BBOB-2009 function testbed") puts
small, more local runs between, so that both kinds spend about as many evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["MOST_DOUBLINGS", "Run", "after", "stagnates", "still", "without_effect"]

Array: TypeAlias = NDArray[np.float64]

MOST_DOUBLINGS = 9
"""Restarts with a doubled population, in both papers; the search is finished after the last one."""


@dataclass(frozen=True)
class Run:
    """One run between restarts.

    Attributes:
        population: candidates per generation, lambda.
        spread: its first standard deviations as a fraction of the first run's.
        generations: its longest duration.
        doublings: how often the population of the large runs has been doubled so far.
        large: whether its evaluations count as those of the large runs.
    """

    population: int
    spread: float = 1.0
    generations: float = math.inf
    doublings: int = 0
    large: bool = False


def after(
    run: Run, scheme: str, default: int, dim: int, spent: Mapping[str, int], draws: Tensor
) -> Run | None:
    """The run that follows `run`; None when there is none.

    Args:
        run: the one that ended.
        scheme: ``"none"``, ``"ipop"`` or ``"bipop"``.
        default: population of the first run.
        dim: number of weights.
        spent: evaluations of ``"large"`` and of ``"small"`` runs (the first one is small), and of the ``"last"`` large.
        draws: two uniform numbers ``[2]``, for the small runs.
    """
    if scheme == "bipop" and spent["small"] < spent["large"]:
        # lambda_small = default (lambda_large / 2 default)^(U^2), sigma = sigma_0 10^(-2 U'), half the last large run's
        # evaluations
        of_population, of_spread = draws.tolist()
        population = int(default * (2.0**run.doublings / 2) ** (of_population**2))
        longest = min(_longest(dim, population), max(1, spent["last"] // (2 * population)))
        return Run(population, 10 ** (-2 * of_spread), longest, run.doublings)
    if scheme == "none" or run.doublings == MOST_DOUBLINGS:
        return None
    doublings = run.doublings + 1
    population = default * 2**doublings
    longest = _longest(dim, population) if scheme == "bipop" else math.inf
    return Run(population, 1.0, longest, doublings, large=True)


def _longest(dim: int, population: int) -> float:
    """Generations of a run in BIPOP: 100 + 50 (n + 3)^2 / sqrt(lambda)."""
    return 100 + math.floor(50 * (dim + 3) ** 2 / math.sqrt(population))


def window(age: int, dim: int, population: int) -> int:
    """Generations that `stagnates` looks at: a fifth of all, from 120 + 30 n / lambda to 20,000."""
    return min(max(age // 5, 120 + math.ceil(30 * dim / population)), 20_000)


def stagnates(bests: Sequence[float], medians: Sequence[float]) -> bool:
    """Neither a generation's best nor its median got better: last 30 % of the window against its first 30 %."""
    part = max(1, 3 * len(bests) // 10)
    return all(median(history[-part:]) >= median(history[:part]) for history in (bests, medians))


def still(bests: Sequence[float], worst: float, dim: int, population: int, tolfun: float) -> bool:
    """All losses of this generation and the best ones of the last 10 + 30 n / lambda lie within `tolfun`."""
    recent = bests[-(10 + math.ceil(30 * dim / population)) :]
    if len(recent) < 10 + math.ceil(30 * dim / population):
        return False
    return max(max(recent), worst) - min(recent) <= tolfun


def without_effect(mean: Array, deviations: Array, axes: Array | None) -> str:
    """Why a step would be lost in rounding; empty if it would not.

    Args:
        mean: ``[dim]``.
        deviations: standard deviations of the weights ``[dim]``.
        axes: principal axes of the distribution, one per row ``[dim, dim]``, as long as their standard deviations.
    """
    if (mean + 0.2 * deviations == mean).any():
        return "no effect in a coordinate"
    if axes is not None and (mean + 0.1 * axes == mean).all(axis=1).any():
        return "no effect along an axis"
    return ""

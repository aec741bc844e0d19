"""The constants of CMA-ES as functions of dimension and population (Hansen 2016/2023, arXiv:1604.00772, table 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["Strategy", "default_population", "strategy"]


def default_population(dim: int) -> int:
    """lambda = 4 + floor(3 ln n), equation 48."""
    return 4 + int(3 * math.log(dim))


@dataclass(frozen=True)
class Strategy:
    """What the tutorial's table 1 sets from dimension and population.

    Attributes:
        weights: of the candidates from best to worst ``[population]``; those of the worse half are negative.
        total: their sum.
        mass: effective number of parents, mu_eff.
        cs, ds: rate and damping of the step size.
        cc, c1, cmu: rates of the evolution path, of the rank-one and of the rank-mu update.
        length: expected length of a standard normal vector.
        gap: generations between two decompositions of the covariance.
    """

    weights: NDArray[np.float64]
    total: float
    mass: float
    cs: float
    ds: float
    cc: float
    c1: float
    cmu: float
    length: float
    gap: int

    @property
    def parents(self) -> int:
        """Number of candidates with a positive weight, mu."""
        return len(self.weights) // 2


@lru_cache(maxsize=64)
def strategy(dim: int, population: int, separable: bool = False) -> Strategy:
    """Table 1 of the tutorial (equations 49 to 58).

    The separable form learns (n + 2) / 3 times faster. The covariance is decomposed every 1 / (2 n (c1 + cmu))
    generations, as pycma does; the tutorial says 10 in place of 2.
    """
    n = dim
    raw = math.log((population + 1) / 2) - np.log(np.arange(1, population + 1))
    parents = population // 2
    better, worse = raw[:parents], raw[parents:]
    mass, mass_worse = (float(part.sum() ** 2 / (part**2).sum()) for part in (better, worse))

    cs = (mass + 2) / (n + mass + 5)
    ds = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (n + 1)) - 1) + cs
    cc = (4 + mass / n) / (n + 4 + 2 * mass / n)
    faster = (n + 2) / 3 if separable else 1.0
    c1 = min(1.0, faster * 2 / ((n + 1.3) ** 2 + mass))
    cmu = min(1 - c1, faster * 2 * (1 / 4 + mass + 1 / mass - 2) / ((n + 2) ** 2 + mass))

    negative = min(1 + c1 / cmu, 1 + 2 * mass_worse / (mass + 2), (1 - c1 - cmu) / (n * cmu))
    weights = np.where(raw >= 0, raw / better.sum(), negative * raw / -raw.clip(max=0).sum())
    return Strategy(
        weights=weights,
        total=float(weights.sum()),
        mass=mass,
        cs=cs,
        ds=ds,
        cc=cc,
        c1=c1,
        cmu=cmu,
        length=math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2)),
        gap=max(1, int(1 / (2 * n * (c1 + cmu)))),
    )

"""Particle swarm optimization: every particle is drawn to the best place it saw and to the best its neighbours saw."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from steppe.core.errors import SpecError, unknown
from steppe.core.seeding import generator
from steppe.optim.gradient_free.base import Bounds, GradientFree
from steppe.optim.gradient_free.populations import reflect, scattered

__all__ = ["PSO", "neighbourhood_best"]

_TOPOLOGIES = ("global", "ring")
_WALLS = ("reflect", "absorb")


def neighbourhood_best(best: Tensor, values: Tensor, topology: str) -> Tensor:
    """The best place that each particle knows of ``[population, dim]``.

    Args:
        best: best place of each particle ``[population, dim]``.
        values: the losses there ``[population]``.
        topology: ``"global"``: the best of all; ``"ring"``: the best of a particle and the two beside it.
    """
    if topology == "global":
        return best[values.argmin()].expand_as(best)
    count = len(values)
    around = torch.arange(count).add(torch.tensor([[0], [-1], [1]])) % count
    return best[around.gather(0, values[around].argmin(0, keepdim=True))[0]]


class PSO(GradientFree):
    """Particle swarm optimization (Kennedy & Eberhart 1995), with the constriction of Clerc & Kennedy 2002.

    One step evaluates the swarm at x once and moves it, weight by weight (Bratton & Kennedy 2007, eq. 3 and 4)::

        v <- inertia * v + cognitive * r1 * (own best - x) + social * r2 * (neighbours' best - x)
        x <- x + v                                   r1, r2 uniform in [0, 1)

    The defaults are Clerc & Kennedy's: with phi = 4.1, chi = 2 / |2 - phi - sqrt(phi² - 4 phi)| = 0.7298 is the
    inertia and chi * phi / 2 = 1.49618 either attraction; the swarm then contracts without a limit on velocity.
    Particles start at rest (Engelbrecht 2012), the first one at the given weights.

    Only comparisons of losses are used, so a monotone transform of the loss changes nothing.

    Args:
        params: what torch optimizers take; all groups are searched together.
        population: particles, and so evaluations per step.
        inertia, cognitive, social: see above.
        topology: ``"global"``: all particles know the best place of all; fast. ``"ring"``: each knows those of itself
            and the two beside it; slower and harder to trap (Bratton & Kennedy 2007).
        walls: what a bound does to a particle that crosses it (Robinson & Rahmat-Samii 2004): ``"reflect"`` mirrors it
            and turns its velocity around, ``"absorb"`` puts it on the bound and stops it, in that weight.
        velocity_limit: largest step in a weight, in widths of its bounds (half a width: Eberhart & Shi 2000); there is
            no limit for a weight without both bounds.
        spread: None starts the swarm uniformly between the bounds, and within 1 of the given weights where a weight
            has not both bounds; a number starts it within that distance of the given weights.
        bounds: lowest and highest weights; None for none. No particle is ever evaluated outside.
        seed: of everything that is drawn.

    Raises:
        SpecError: a hyper-parameter out of its range.
    """

    def __init__(
        self,
        params: Any,
        population: int = 40,
        inertia: float = 0.7298,
        cognitive: float = 1.49618,
        social: float = 1.49618,
        topology: str = "global",
        walls: str = "reflect",
        velocity_limit: float = 0.5,
        spread: float | None = None,
        *,
        bounds: Bounds | None = None,
        seed: int = 0,
    ) -> None:
        if population < 2:
            raise SpecError(f"PSO needs a population of at least 2, got {population}.")
        if topology not in _TOPOLOGIES:
            raise SpecError(unknown("topology", topology, _TOPOLOGIES))
        if walls not in _WALLS:
            raise SpecError(unknown("walls", walls, _WALLS))
        for name, value in (("inertia", inertia), ("cognitive", cognitive), ("social", social)):
            if not 0 <= value < math.inf:
                raise SpecError(f"{name} must be a finite number that is not negative, got {value}.")
        if not velocity_limit > 0:
            raise SpecError(f"velocity_limit must be above 0, got {velocity_limit}.")
        if spread is not None and not 0 < spread < math.inf:
            raise SpecError(f"spread must be a finite number above 0, or None, got {spread}.")
        defaults = {
            "population": population,
            "inertia": inertia,
            "cognitive": cognitive,
            "social": social,
            "topology": topology,
            "walls": walls,
            "velocity_limit": velocity_limit,
            "spread": spread,
        }
        super().__init__(params, defaults, bounds=bounds, seed=seed)

    def begin(self, start: Tensor) -> dict[str, Any]:
        """A scattered swarm at rest that has seen nothing."""
        draws = generator(self.seed, "pso", "start")
        x = scattered(start, self.hyper("population"), self.bounds, self.hyper("spread"), draws)
        nothing = torch.full((len(x),), math.inf, dtype=torch.float64)
        return {"x": x, "v": torch.zeros_like(x), "best": x, "best_values": nothing}

    def candidates(self) -> Tensor:
        """Where the particles are."""
        return self.memory["x"]

    def update(self, theta: Tensor, values: Tensor) -> dict[str, Any]:
        """Remember what was seen and move."""
        better = values < self.memory["best_values"]
        best_values = torch.where(better, values, self.memory["best_values"])
        best = torch.where(better[:, None], theta, self.memory["best"])
        known = neighbourhood_best(best, best_values, self.hyper("topology"))

        draws = generator(self.seed, "pso", self.generation)
        r1, r2 = torch.rand(2, *theta.shape, generator=draws, dtype=torch.float64)
        v = self.hyper("inertia") * self.memory["v"]
        v = v.addcmul(r1, best - theta, value=self.hyper("cognitive"))
        v = v.addcmul(r2, known - theta, value=self.hyper("social"))
        x, v = self._moved(theta, v)
        return {"x": x, "v": v, "best": best, "best_values": best_values}

    def _moved(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The next positions, inside the bounds, and the velocities there."""
        if self.bounds is None:
            return x + v, v
        low, high = self.bounds
        limit = self.hyper("velocity_limit") * (high - low)
        v = v.clamp(-limit, limit)
        x = x + v
        crossed = (x < low) | (x > high)
        if self.hyper("walls") == "absorb":
            return x.clamp(low, high), v.masked_fill(crossed, 0.0)
        return reflect(x, low, high), torch.where(crossed, -v, v)

"""Differential evolution: differences between members of a population are the steps that its members try."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steppe.core.errors import SpecError, unknown
from steppe.core.seeding import generator
from steppe.optim.gradient_free.base import Bounds, GradientFree
from steppe.optim.gradient_free.populations import reflect, scattered

__all__ = ["DifferentialEvolution", "others"]

_STRATEGIES = ("best1bin", "rand1bin")


def others(population: int, count: int, generator: torch.Generator) -> Tensor:
    """For each member `count` members ``[count, population]``, all different and none of them itself, drawn uniformly.

    Each is drawn from the members that are left and moved past those taken before.
    """
    shifts = torch.zeros(1, population, dtype=torch.int64)
    for taken in range(1, count + 1):
        shift = torch.randint(population - taken, (population,), generator=generator)
        for before in shifts.sort(0).values:
            shift = shift + (shift >= before)
        shifts = torch.cat([shifts, shift[None]])
    return (torch.arange(population) + shifts[1:]) % population


class DifferentialEvolution(GradientFree):
    """Differential evolution (Storn & Price 1997): rand/1/bin and best/1/bin.

    One step is one generation: each member x_i gets a trial, evaluated with all others', that takes its place if it is
    no worse (Storn & Price, eq. 2 to 6)::

        v = x_r1 + F (x_r2 - x_r3)        "rand1bin": r1, r2, r3 differ from each other and from i
        v = x_best + F (x_r1 - x_r2)      "best1bin"
        trial_j = v_j  if u_j < CR or j = j_i, else x_ij        u_j uniform in [0, 1), j_i drawn from the weights

    A trial outside a bound is mirrored there. Strategy and F default to SciPy's, CR to the paper's advice for weights
    that depend on each other (0.1 for others; SciPy has 0.7). Unlike SciPy's no member is replaced before the
    generation is complete, the best of the first population is not polished, and the first member is the given weights.

    Only comparisons of losses are used, so a monotone transform of the loss changes nothing.

    Args:
        params: what torch optimizers take; all groups are searched together.
        population: members, and so evaluations per step; the paper advises 5 to 10 per weight. At least 4.
        strategy: ``"best1bin"`` (faster) or ``"rand1bin"`` (harder to trap).
        mutation: F, or the two ends of a range from which one F is drawn per generation (dither).
        crossover: CR, the share of a trial's weights that are mutated.
        spread: None starts the population uniformly between the bounds, and within 1 of the given weights where a
            weight has not both bounds; a number starts it within that distance of the given weights.
        bounds: lowest and highest weights; None for none. No trial is ever evaluated outside.
        seed: of everything that is drawn.

    Raises:
        SpecError: a hyper-parameter out of its range.
    """

    def __init__(
        self,
        params: Any,
        population: int = 40,
        strategy: str = "best1bin",
        mutation: float | Sequence[float] = (0.5, 1.0),
        crossover: float = 0.9,
        spread: float | None = None,
        *,
        bounds: Bounds | None = None,
        seed: int = 0,
    ) -> None:
        if population < 4:
            raise SpecError(f"differential evolution needs a population of at least 4, got {population}.")
        if strategy not in _STRATEGIES:
            raise SpecError(unknown("strategy", strategy, _STRATEGIES))
        ends = (mutation, mutation) if isinstance(mutation, int | float) else tuple(mutation)
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 2:
            raise SpecError(
                f"mutation must be a number in [0, 2], or a range (least, most) in it, got {mutation}."
            )
        if not 0 <= crossover <= 1:
            raise SpecError(f"crossover must be in [0, 1], got {crossover}.")
        if spread is not None and not 0 < spread < float("inf"):
            raise SpecError(f"spread must be a finite number above 0, or None, got {spread}.")
        defaults = {
            "population": population,
            "strategy": strategy,
            "mutation": ends,
            "crossover": crossover,
            "spread": spread,
        }
        super().__init__(params, defaults, bounds=bounds, seed=seed)

    def begin(self, start: Tensor) -> dict[str, Any]:
        """A scattered population, not yet evaluated."""
        draws = generator(self.seed, "differential_evolution", "start")
        members = scattered(start, self.hyper("population"), self.bounds, self.hyper("spread"), draws)
        return {"members": members, "values": None}

    def candidates(self) -> Tensor:
        """The first population, later a trial for each member."""
        members, values = self.memory["members"], self.memory["values"]
        if values is None:
            return members
        count, dim = members.shape
        draws = generator(self.seed, "differential_evolution", self.generation)
        if self.hyper("strategy") == "best1bin":
            base, (plus, minus) = members[values.argmin()], others(count, 2, draws)
        else:
            first, plus, minus = others(count, 3, draws)
            base = members[first]
        least, most = self.hyper("mutation")
        factor = least + (most - least) * torch.rand(1, generator=draws, dtype=torch.float64)
        mutant = base + factor * (members[plus] - members[minus])
        taken = torch.rand(count, dim, generator=draws, dtype=torch.float64) < self.hyper("crossover")
        taken.scatter_(1, torch.randint(dim, (count, 1), generator=draws), True)
        if self.bounds is not None:
            mutant = reflect(mutant, *self.bounds)
        return torch.where(taken, mutant, members)

    def update(self, theta: Tensor, values: Tensor) -> dict[str, Any]:
        """Each trial that is no worse than its member takes its place."""
        if self.memory["values"] is None:
            return {"members": theta, "values": values}
        kept = values <= self.memory["values"]
        return {
            "members": torch.where(kept[:, None], theta, self.memory["members"]),
            "values": torch.where(kept, values, self.memory["values"]),
        }

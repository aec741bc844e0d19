"""What every gradient-free optimizer shares: the flat vector, ask and tell, and the state that resumes."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe.core.errors import DataError, SpecError
from steppe.core.flat import assign, flatten

__all__ = ["Bounds", "GradientFree", "ValuesClosure", "population_values"]

Bounds: TypeAlias = tuple[float | Sequence[float] | Tensor, float | Sequence[float] | Tensor]
"""Lowest and highest value of the weights: numbers, or one per weight of the flat vector."""

_SEARCH = "search"


class ValuesClosure(Protocol):
    """A closure that evaluates many weight vectors together, as `steppe.core.Objective` does."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The tensors that make up the flat vector, in its order."""
        ...

    def values(self, theta: Tensor) -> Tensor:
        """The losses ``[population]`` at the rows of ``theta [population, dim]``."""
        ...


def population_values(closure: Callable[[], Any], params: Sequence[Tensor], theta: Tensor) -> Tensor:
    """The losses ``[population]`` (float64, CPU) at the rows of ``theta [population, dim]``.

    A closure with ``values`` over these parameters evaluates them together; any other one is called once per row with
    that row in the parameters, which are put back. What is not finite counts as plus infinity.
    """
    together = cast(ValuesClosure, closure)
    # not isinstance: for a protocol that takes as long as the rest of a small step
    if hasattr(closure, "values") and _same(getattr(closure, "parameters", ()), params):
        found = together.values(theta).detach().to("cpu", torch.float64)
    else:
        before = flatten(params)
        rows = []
        try:
            for row in theta:
                assign(params, row)
                with torch.enable_grad():
                    rows.append(float(torch.as_tensor(closure()).detach()))
        finally:
            assign(params, before)
        found = torch.tensor(rows, dtype=torch.float64)
    return torch.where(found.isfinite(), found, math.inf)


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


class GradientFree(Optimizer, ABC):
    """Minimises by values of the loss alone, on the flat vector ``[dim]`` of all parameters (float64, CPU).

    A subclass writes `begin`, `candidates` and `update`. Between steps everything that it remembers stands in
    `memory` (tensors, numbers, strings; lists and dicts of them); what it draws is a function of `seed` and
    `generation`. So `ask` gives the same candidates until they are told, an interrupted step leaves no trace, and a
    search that is saved and loaded goes on to the same bits.

    Args:
        params: what torch optimizers take. There is one search over all groups; its settings are those of the first.
        defaults: the hyper-parameters: numbers and strings.
        bounds: lowest and highest weights, kept by every candidate; None for none. The start is moved inside.
        seed: of everything that is drawn.

    Attributes:
        generation: times that `tell` was called.
        best, best_value: the best candidate so far ``[dim]`` and its loss; None and infinity before the first.
    """

    def __init__(
        self, params: Any, defaults: dict[str, Any], *, bounds: Bounds | None = None, seed: int = 0
    ) -> None:
        self.bounds: tuple[Tensor, Tensor] | None = None
        super().__init__(params, defaults)
        self.seed = seed
        self.generation = 0
        self.best: Tensor | None = None
        self.best_value = math.inf
        self.memory: dict[str, Any] = {}
        self._given = bounds
        self.bounds = self._checked(bounds)

    @abstractmethod
    def begin(self, start: Tensor) -> dict[str, Any]:
        """The memory of a search that starts at ``start [dim]``, which lies inside the bounds."""

    @abstractmethod
    def candidates(self) -> Tensor:
        """The weights to evaluate next ``[population, dim]``: a function of seed, generation and memory."""

    @abstractmethod
    def update(self, theta: Tensor, values: Tensor) -> dict[str, Any]:
        """The next memory, from the candidates ``[population, dim]`` and their losses ``[population]``."""

    @property
    def finished(self) -> str:
        """Why there is nothing more to do; empty while there is. A step of a finished search changes nothing."""
        return ""

    @property
    def params(self) -> list[Tensor]:
        """The parameters of all groups, in their order."""
        return [param for group in self.param_groups for param in group["params"]]

    @property
    def dim(self) -> int:
        """Number of weights."""
        return sum(param.numel() for param in self.params)

    def hyper(self, name: str) -> Any:
        """A hyper-parameter of the search."""
        return self.param_groups[0][name]

    def ask(self) -> Tensor:
        """The weights to evaluate next ``[population, dim]``; the same ones until `tell`."""
        if not self.memory:
            start = flatten(self.params).to("cpu", torch.float64)
            if not start.isfinite().all():
                raise DataError("a starting weight is not finite: gradient-free search needs a finite start.")
            self.memory = self.begin(self.inside(start))
        return self.candidates()

    def tell(self, values: Tensor) -> None:
        """Take the losses ``[population]`` of what `ask` gave; infinity where there is none.

        Raises:
            ValueError: as many losses are needed as there were candidates.
        """
        values = values.detach().to("cpu", torch.float64)
        self._take(self.ask(), torch.where(values.isfinite(), values, math.inf))

    def _take(self, theta: Tensor, values: Tensor) -> None:
        if values.shape != theta.shape[:1]:
            raise ValueError(f"need {len(theta)} losses, one per candidate, got shape {list(values.shape)}")
        losses = values.tolist()
        least = min(losses)
        memory = self.update(theta, values)
        if least < self.best_value:
            self.best, self.best_value = theta[losses.index(least)].clone(), least
        self.memory, self.generation = memory, self.generation + 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """Evaluate one population and leave the best weights so far in the parameters.

        Returns the smallest loss of the population.

        Args:
            closure: gives the loss at the present weights; its gradients are not used. `steppe.core.Objective`
                evaluates the population together.
        """
        if closure is None:
            raise SpecError(f"{type(self).__name__} needs a closure: step(closure).")
        if self.finished:
            return torch.tensor(self.best_value, dtype=torch.float64)
        theta = self.ask()
        values = population_values(closure, self.params, theta)
        self._take(theta, values)
        if (weights := self.incumbent()) is not None:
            assign(self.params, weights)
        return values.min()

    def incumbent(self) -> Tensor | None:
        """The weights ``[dim]`` that a step leaves in the parameters: the best so far; None leaves them as they are."""
        return self.best

    def inside(self, theta: Tensor) -> Tensor:
        """``theta [..., dim]`` with every weight moved to the nearest one inside the bounds."""
        return theta if self.bounds is None else theta.clamp(*self.bounds)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, before the first step only: a search cannot change its dimension."""
        if getattr(self, "memory", None):
            raise SpecError(
                f"{type(self).__name__} has begun its search: add parameter groups before the first step."
            )
        super().add_param_group(param_group)
        try:
            if any(param.is_complex() for param in self.params):
                raise SpecError(
                    f"{type(self).__name__} searches over real weights: give torch.view_as_real of complex ones."
                )
            self.bounds = self._checked(getattr(self, "_given", None))
        except SpecError:
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Groups, and the search under a name of its own: plain data."""
        search = {
            name: copy.deepcopy(getattr(self, name))
            for name in ("seed", "generation", "best", "best_value", "memory")
        }
        return {**super().state_dict(), _SEARCH: search}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            SpecError: it holds no search, or one over another number of weights.
        """
        search = state_dict.get(_SEARCH)
        if search is None:
            raise SpecError(f"this state holds no search: it is not one of {type(self).__name__}.")
        if search["best"] is not None and search["best"].shape != (self.dim,):
            raise SpecError(
                f"this search is over {len(search['best'])} weights, the parameters have {self.dim}."
            )
        super().load_state_dict({name: value for name, value in state_dict.items() if name != _SEARCH})
        for name, value in search.items():
            setattr(self, name, copy.deepcopy(value))

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps groups, state and defaults only
        return dict(vars(self))

    def _checked(self, bounds: Bounds | None) -> tuple[Tensor, Tensor] | None:
        """Both as ``[dim]``."""
        if bounds is None:
            return None
        sides = []
        for side, given in zip(("lower", "upper"), bounds, strict=True):
            bound = torch.as_tensor(given, dtype=torch.float64).cpu().reshape(-1)
            if bound.numel() not in (1, self.dim) or bound.isnan().any():
                raise SpecError(
                    f"the {side} bound must be a number or one per weight ({self.dim}), not NaN; got {bound.numel()}."
                )
            sides.append(bound.expand(self.dim).clone())
        low, high = sides
        if (low >= high).any():
            at = int((low >= high).nonzero()[0])
            raise SpecError(
                f"bounds of weight {at}: the lower one, {low[at]:g}, is not below the upper one, {high[at]:g}."
            )
        return low, high

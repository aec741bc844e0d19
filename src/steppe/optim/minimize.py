"""The shortest way to an optimizer: minimise a plain function of a vector."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.core.errors import DataError, SpecError
from steppe.core.objective import Objective
from steppe.core.spec import Spec
from steppe.optim.gradient_free.base import Bounds, GradientFree
from steppe.optim.registry import create, optimizer_class, reject_unknown

__all__ = ["Minimum", "Trace", "minimize"]

OptimizerLike: TypeAlias = str | Spec | type[Optimizer] | Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True, eq=False)
class Trace:
    """How a search went, one entry per step.

    Attributes:
        evaluations: ``[steps]`` int64, forward passes so far, a gradient counted as three.
        value: ``[steps]`` float64, what the step found: the value before it, or the best of its population.
    """

    evaluations: NDArray[np.int64]
    value: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Minimum:
    """What `minimize` found.

    Attributes:
        x: ``[dim]`` float64, the best of all points that were evaluated.
        value: the function there; infinity if it was finite nowhere.
        evaluations: forward passes that were used, a gradient counted as three.
        trace: value against evaluations.
        finished: why the search ended.
    """

    x: NDArray[np.float64]
    value: float
    evaluations: int
    trace: Trace = field(repr=False)
    finished: str


def minimize(
    fn: Callable[[Tensor], Any],
    x0: ArrayLike | Tensor,
    optimizer: OptimizerLike,
    *,
    evaluations: int = 10_000,
    steps: int | None = None,
    bounds: Bounds | None = None,
    seed: int = 0,
    tolerance: float = 1e-8,
    **hyper: Any,
) -> Minimum:
    """Minimise ``fn(x)`` over ``x [dim]``, from `x0`.

    >>> from steppe import minimize
    >>> minimize(lambda x: (x - 3).square().sum(), [0.0, 0.0], "adam", lr=0.1).x
    array([3., 3.])

    Args:
        fn: of a float64 tensor ``[dim]``; for first-order optimizers in torch operations that return a scalar, for
            gradient-free ones any number, so that NumPy functions serve too (``x`` is then without a gradient).
        x0: the start, ``[dim]``.
        optimizer: a registry key, ``"package.module:Class"``, an optimizer class, or a function of the parameters that
            returns a ready optimizer.
        evaluations: the budget in forward passes, a gradient counted as three; the step that reaches it is the last.
        steps: most steps of the optimizer; None for no limit.
        bounds: lowest and highest x, for optimizers that keep bounds.
        seed: of what the optimizer draws, if it draws.
        tolerance: a search that takes gradients stops where their norm is below; 0 for never.
        hyper: hyper-parameters of the optimizer.

    Raises:
        DataError: `x0` is not a finite vector.
        SpecError: an unknown optimizer or hyper-parameter, bounds for an optimizer that keeps none, or a first-order
            optimizer for a function that torch cannot differentiate.
    """
    model = _Vector(x0)
    search = _build(optimizer, [model.x], {"bounds": bounds} if bounds is not None else {}, seed, hyper)
    objective = _Watched(model, fn)
    told: list[tuple[int, float]] = []
    finished = ""
    while not finished:
        objective.slope = math.inf
        loss = search.step(cast(Any, objective))
        told.append((objective.cost.evaluations, float(cast(Any, loss))))
        finished = getattr(search, "finished", "") or _ended(
            objective, model, told, evaluations, steps, tolerance
        )
    if not isinstance(search, GradientFree) and bool(model.x.isfinite().all()):
        objective.value()  # where the last step led
    spent, values = zip(*told, strict=True)
    return Minimum(
        objective.best_x.numpy(),
        objective.best,
        objective.cost.evaluations,
        Trace(np.array(spent, dtype=np.int64), np.array(values, dtype=np.float64)),
        finished,
    )


def _ended(
    objective: _Watched,
    model: _Vector,
    told: list[tuple[int, float]],
    evaluations: int,
    steps: int | None,
    tolerance: float,
) -> str:
    if objective.slope < tolerance:
        return f"the gradient's norm is below {tolerance:g}"
    if not bool(model.x.isfinite().all()):
        return "diverged: x is not finite; take a smaller learning rate"
    if objective.cost.evaluations >= evaluations:
        return f"the budget of {evaluations} evaluations is spent"
    if len(told) >= (math.inf if steps is None else steps):
        return f"{steps} steps are done"
    if len(told) >= IDLE and told[-IDLE][0] == told[-1][0]:
        return f"the optimizer evaluated nothing in {IDLE} steps"
    return ""


IDLE = 100
"""Steps without an evaluation after which an optimizer is taken to have nothing more to do."""


class _Vector(nn.Module):
    def __init__(self, x0: ArrayLike | Tensor) -> None:
        super().__init__()
        start = torch.as_tensor(np.asarray(x0) if not isinstance(x0, Tensor) else x0).detach()
        if start.dim() != 1 or not len(start) or not bool(start.isfinite().all()):
            raise DataError(f"x0 must be a vector of finite numbers, got {x0!r}.")
        self.x = nn.Parameter(start.to("cpu", torch.float64, copy=True))


class _Watched(Objective):
    """The function as a closure that remembers the best point it was asked for, and the first slope of a step."""

    def __init__(self, model: _Vector, fn: Callable[[Tensor], Any]) -> None:
        super().__init__(model, _loss, fn)
        self.x = model.x
        self.best, self.best_x = math.inf, model.x.detach().clone()
        self.slope = math.inf

    def __call__(self) -> Tensor:
        loss = super().__call__()
        self._note(loss, self.x)
        if self.slope == math.inf and self.x.grad is not None:
            self.slope = float(self.x.grad.norm())
        return loss

    def value(self) -> Tensor:
        value = super().value()
        self._note(value, self.x)
        return value

    def values(self, theta: Tensor) -> Tensor:
        values = super().values(theta)
        finite = torch.where(values.isfinite(), values, math.inf)
        least = int(finite.argmin())
        self._note(finite[least], theta[least])
        return values

    def _note(self, value: Tensor, x: Tensor) -> None:
        if float(value) < self.best:
            self.best, self.best_x = float(value), x.detach().clone()


def _loss(model: nn.Module, fn: Callable[[Tensor], Any]) -> Tensor:
    x = cast(_Vector, model).x
    if not torch.is_grad_enabled():
        return torch.as_tensor(fn(x.detach()), dtype=torch.float64)
    try:
        value = fn(x)
    except RuntimeError as error:
        if "requires grad" not in str(error):
            raise
        value = None  # NumPy met a tensor with a gradient
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise SpecError(
            "this optimizer takes gradients, and the function's value has none: write it in torch operations, or take "
            "a gradient-free optimizer."
        )
    return value


def _build(
    optimizer: OptimizerLike,
    params: list[nn.Parameter],
    bounds: dict[str, Any],
    seed: int,
    hyper: dict[str, Any],
) -> Optimizer:
    if not isinstance(optimizer, str | Spec | type):
        if bounds or hyper:
            raise SpecError(
                f"a ready-made optimizer has its settings already: leave out {', '.join([*bounds, *hyper])}."
            )
        return optimizer(params)
    cls = optimizer if isinstance(optimizer, type) else optimizer_class(optimizer)
    takes = inspect.signature(cls).parameters
    if bounds and "bounds" not in takes:
        raise SpecError(f"{cls.__name__} keeps no bounds: leave them out, or take a gradient-free optimizer.")
    settings = bounds | ({"seed": seed} if "seed" in takes else {}) | hyper
    if not isinstance(optimizer, type):
        return create(optimizer, params, **settings)
    reject_unknown(cls.__name__, settings, [cls])
    return cls(params, **settings)

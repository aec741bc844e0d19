"""Sequential least squares programming, with bounds and constraints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from steppe.core.errors import SpecError, unknown
from steppe.core.flat import assign, flatten
from steppe.optim.gradient_free.base import Bounds
from steppe.optim.gradient_free.driven import (
    Array,
    Driven,
    Ending,
    Evaluate,
    Solver,
    differences,
    require_scipy,
)

__all__ = ["SLSQP", "Constraint"]

Constraint: TypeAlias = Callable[[Tensor], Tensor]
"""A function of the flat vector ``[dim]`` (float64, CPU) to a number or a vector, written in torch operations."""


class SLSQP(Driven):
    """SLSQP: quadratic models of the Lagrangian, linear models of the constraints, and a line search.

    Kraft 1988, DFVLR-FB 88-28; the solver is SciPy's. Minimise L(w) such that ::

        c(w) >= 0  for c in inequalities,   c(w) = 0  for c in equalities,   lower <= w <= upper

    The constraints' Jacobians come from autograd and cost no evaluation of the loss.

    A line search compares losses, so the loss has to be the same function at every step: give it all the data, or one
    batch. What is left in the parameters is the best *feasible* point evaluated, its violations adding up to at most
    `tolerance`; before there is one, the parameters stay as they are and `finished` says so at the end. Bounds hold
    at every point that is evaluated, constraints at the end.

    Args:
        params: see `GradientFree`.
        bounds: see `GradientFree`.
        inequalities: functions that have to be >= 0.
        equalities: functions that have to be 0.
        gradient: "closure": `step` takes the gradient from the closure, which runs backward, at the points where the
            solver needs one; where it needs the loss alone and the closure has `value` (as `steppe.core.Objective`),
            that is called. "difference": forward differences, one evaluation per weight, for a loss that has no
            gradient.
        eps: length of a difference, > 0; default SciPy's.
        ftol: the solver's precision, > 0: of the loss, the step, and the sum of the violations; default SciPy's.
        maxiter: iterations at most, each a gradient and a line search; default SciPy's.
        tolerance: what violations may add up to in a feasible point; default 10 · ftol, the largest with which the
            solver itself calls a point solved.

    Raises:
        SpecError: SciPy is missing, a hyper-parameter is out of its range, a constraint is not differentiable, or a
            closure gives no gradient.
    """

    def __init__(
        self,
        params: Any,
        bounds: Bounds | None = None,
        *,
        inequalities: Sequence[Constraint] = (),
        equalities: Sequence[Constraint] = (),
        gradient: str = "closure",
        eps: float = 2.0**-26,
        ftol: float = 1e-6,
        maxiter: int = 100,
        tolerance: float | None = None,
    ) -> None:
        require_scipy("SLSQP")
        if gradient not in ("closure", "difference"):
            raise SpecError(unknown("gradient", gradient, ("closure", "difference")))
        if not (eps > 0 and ftol > 0 and maxiter >= 1 and (tolerance is None or tolerance >= 0)):
            raise SpecError(
                f"need eps > 0, ftol > 0, maxiter >= 1 and tolerance >= 0, got eps={eps}, ftol={ftol}, "
                f"maxiter={maxiter}, tolerance={tolerance}."
            )
        super().__init__(
            params,
            {"gradient": gradient, "eps": eps, "ftol": ftol, "maxiter": maxiter, "tolerance": tolerance},
            bounds=bounds,
        )
        self.inequalities, self.equalities = tuple(inequalities), tuple(equalities)

    def solver(self, start: Array) -> Solver:
        """See `Driven`."""
        low, high = self.bounds or (torch.full((self.dim,), -math.inf), torch.full((self.dim,), math.inf))
        return partial(
            _minimize,
            start=start,
            low=low.double().numpy(),
            high=high.double().numpy(),
            constraints=[
                {"type": kind, "fun": partial(_value, fn), "jac": partial(_jacobian, fn)}
                for kind, functions in (("eq", self.equalities), ("ineq", self.inequalities))
                for fn in functions
            ],
            exact=self.hyper("gradient") == "closure",
            eps=self.hyper("eps"),
            options={"ftol": self.hyper("ftol"), "maxiter": self.hyper("maxiter")},
        )

    def _take(self, theta: Tensor, values: Tensor) -> None:
        best, least = self.best, self.best_value
        super()._take(theta, values)
        if not (self.inequalities or self.equalities):
            return
        for row, value in zip(theta, values.tolist(), strict=True):  # infeasible points are never the best
            if value < least and self._feasible(self.violation(row)):
                best, least = row.clone(), value
        self.best, self.best_value = best, least

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """See `GradientFree`; with ``gradient="closure"`` the closure has to run backward."""
        if closure is None or self.hyper("gradient") == "difference" or self.finished:
            return super().step(closure)
        theta = self.ask()
        value_alone = getattr(closure, "value", None)
        before = flatten(self.params)
        try:
            assign(self.params, theta[0])
            if value_alone is not None and not self.wants_gradient:
                value, slope = torch.as_tensor(value_alone()), None
            else:
                value, slope = self._with_gradient(closure)
        finally:
            assign(self.params, before)
        value = value.detach().to("cpu", torch.float64).reshape(1)
        self.tell(value, slope)
        if (weights := self.incumbent()) is not None:
            assign(self.params, weights)
        return value[0]

    @property
    def finished(self) -> str:
        """The solver's own message, and whether nothing feasible was found."""
        message = super().finished
        if message and self.best is None and (solution := self.solution):
            message += (
                "; no point that was evaluated is feasible: the parameters are as they were (where the solver ended, "
                f"the violations add up to {self.violation(solution[0]):.3g})."
            )
        return message

    def violation(self, theta: Tensor) -> float:
        """By how much ``theta [dim]`` violates the constraints: the sum over all of them."""
        with torch.no_grad():
            theta = theta.detach().to("cpu", torch.float64)
            short = [torch.as_tensor(fn(theta)).reshape(-1).neg().clamp(min=0) for fn in self.inequalities]
            off = [torch.as_tensor(fn(theta)).reshape(-1).abs() for fn in self.equalities]
            total = sum(float(part.sum()) for part in short + off)
        return total if math.isfinite(total) else math.inf

    def _feasible(self, violation: float) -> bool:
        tolerance = self.hyper("tolerance")
        return violation <= (10 * self.hyper("ftol") if tolerance is None else tolerance)

    def _with_gradient(self, closure: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        for param in self.params:
            param.grad = None
        with torch.enable_grad():
            value = torch.as_tensor(closure())
        if all(param.grad is None for param in self.params):
            raise SpecError(
                'the closure left no gradient: call backward() in it, or use SLSQP(gradient="difference").'
            )
        slope = flatten(torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in self.params)
        return value, slope


def _minimize(
    evaluate: Evaluate,
    *,
    start: Array,
    low: Array,
    high: Array,
    constraints: Sequence[dict[str, Any]],
    exact: bool,
    eps: float,
    options: dict[str, Any],
) -> Ending:
    from scipy.optimize import minimize

    known: tuple[Array, float, Array | None] | None = (
        None  # the last point, its value and perhaps its gradient
    )

    def value(x: Array) -> float:
        nonlocal known
        x = np.clip(x, low, high)  # the solver may leave them by a rounding
        # at the start it needs both
        values, slope = evaluate(x[None], gradient=exact and known is None)
        known = (x, float(values[0]), slope)
        return known[1]

    def gradient(x: Array) -> Array:
        nonlocal known
        x = np.clip(x, low, high)
        if known is None or not np.array_equal(known[0], x):
            value(x)
        assert known is not None
        if known[2] is None:
            slope = (
                evaluate(x[None], gradient=True)[1]
                if exact
                else differences(evaluate, x, known[1], eps, low, high)
            )
            known = (x, known[1], slope)
        assert known[2] is not None
        return known[2]

    boxed = np.isfinite(low).any() or np.isfinite(high).any()
    result = minimize(
        value,
        start,
        method="SLSQP",
        jac=gradient,
        bounds=list(zip(low, high, strict=True)) if boxed else None,
        constraints=constraints,
        options=options,
    )
    return Ending(str(result.message), np.asarray(result.x), float(result.fun))


def _value(fn: Constraint, x: Array) -> Array:
    with torch.no_grad():
        return torch.as_tensor(fn(torch.from_numpy(x.copy()))).reshape(-1).double().numpy()


def _jacobian(fn: Constraint, x: Array) -> Array:
    """``[values, dim]``."""
    theta = torch.from_numpy(x.copy()).requires_grad_()
    with torch.enable_grad():
        values = torch.as_tensor(fn(theta)).reshape(-1)
    if not values.requires_grad:
        raise SpecError(
            f"the constraint {fn!r} is not differentiable: write it in torch operations on its argument."
        )
    rows = [torch.autograd.grad(value, theta, retain_graph=True)[0] for value in values]
    return torch.stack(rows).numpy()

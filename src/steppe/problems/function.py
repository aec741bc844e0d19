"""What is known of a function to minimise, and the check that it is true."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steppe.core.errors import DataError
from steppe.core.seeding import generator

__all__ = ["FUNCTIONS", "Function", "check", "register"]

RTOL, ATOL = 1e-7, 1e-9


@dataclass(frozen=True, eq=False)
class Function:
    """A function to minimise and what is known of it.

    Attributes:
        name: letters, digits and ``_ - .``.
        fn: ``x [..., dim] float64 -> [...]``, in torch operations.
        dim: number of variables.
        start: where searches begin, ``[dim]``.
        minima: all its global minima ``[M, dim]``.
        minimum: the value there.
        bounds: (lowest, highest) value of every variable: the region that is searched and drawn.
        gradient: ``x [dim] -> [dim]``, if it is stated; checked by `register`.
        hessian: ``x [dim] -> [dim, dim]``, likewise.
        noise: standard deviation of a shift of `x` that each training step draws anew: the step sees
            ``fn(x - noise * n)`` and its gradient, the scores see `fn`. 0 for none.
        title, formula, source: for the report.
        errors: sentences: what is wrong in the publication that the function is from.
        printed: figures of that publication by what they are.
    """

    name: str
    fn: Callable[[Tensor], Tensor]
    dim: int
    start: Sequence[float]
    minima: Sequence[Sequence[float]]
    minimum: float
    bounds: tuple[float, float]
    gradient: Callable[[Tensor], Tensor] | None = None
    hessian: Callable[[Tensor], Tensor] | None = None
    noise: float = 0.0
    title: str = ""
    formula: str = ""
    source: str = ""
    errors: tuple[str, ...] = ()
    printed: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor) -> Tensor:
        """The values ``[...]`` at ``x [..., dim]``."""
        return self.fn(x)


FUNCTIONS: dict[str, Function] = {}
"""The registered functions by name; `steppe.problems.functions` fills it."""


def register(function: Function) -> Function:
    """Enter `function` in `FUNCTIONS`, once `check` has passed.

    Raises:
        DataError: what `check` found, or another function of this name is there.
    """
    if function.name in FUNCTIONS:
        raise DataError(f"a function named {function.name!r} is registered already.")
    check(function)
    FUNCTIONS[function.name] = function
    return function


def check(function: Function) -> None:
    """Compare what a function states about itself with what autograd says, at random points and at its minima.

    Raises:
        DataError: a gradient or Hessian that does not match, with the coordinate; a stated minimum whose value or
            slope is wrong; a start or minimum of another dimension.
    """
    dim, name = function.dim, function.name
    for what, point in (("start", function.start), *(("minimum", point) for point in function.minima)):
        if len(point) != dim:
            raise DataError(f"function {name!r}: a {what} of {len(point)} numbers, but dim is {dim}.")
    low, high = function.bounds
    drawn = torch.rand(5, dim, dtype=torch.float64, generator=generator(0, "function check", name))
    for x in low + (high - low) * drawn:
        _compare(name, "gradient", x, function.gradient, torch.func.grad(function.fn))
        _compare(name, "Hessian", x, function.hessian, torch.func.jacrev(torch.func.grad(function.fn)))
    for point in function.minima:
        x = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        value = function.fn(x)
        (slope,) = torch.autograd.grad(value, x)
        if not math.isclose(value.item(), function.minimum, rel_tol=RTOL, abs_tol=ATOL):
            raise DataError(
                f"function {name!r} is {value.item():.9g} at {_at(x)}, not its minimum {function.minimum}."
            )
        # a kink at the minimum has no gradient to speak of
        if bool(slope.isfinite().all()) and float(slope.norm()) > 1e-5 * max(1.0, float(x.detach().norm())):
            raise DataError(
                f"function {name!r} has the gradient {_at(slope)} at its stated minimum {_at(x)}, not 0."
            )


def _compare(
    name: str,
    what: str,
    x: Tensor,
    stated: Callable[[Tensor], Tensor] | None,
    derived: Callable[[Tensor], Tensor],
) -> None:
    if stated is None:
        return
    given, true = stated(x), derived(x)
    if given.shape != true.shape:
        raise DataError(f"the {what} of {name!r} has shape {list(given.shape)}, not {list(true.shape)}.")
    off = ~torch.isclose(given, true, rtol=RTOL, atol=ATOL)
    if bool(off.any()):
        where = off.nonzero()[0].tolist()
        place = where[0] if len(where) == 1 else tuple(where)
        raise DataError(
            f"the stated {what} of {name!r} is wrong in coordinate {place}: {float(given[tuple(where)]):.6g} at "
            f"x = {_at(x)}, where differentiating the function gives {float(true[tuple(where)]):.6g}."
        )


def _at(x: Tensor) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in x.tolist()) + ")"

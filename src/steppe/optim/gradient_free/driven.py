"""Ask and tell over a solver that wants to call a function, with exact resume."""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from abc import abstractmethod
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steppe.core.errors import SpecError
from steppe.optim.gradient_free.base import GradientFree

__all__ = ["Array", "Driven", "Ending", "Evaluate", "Solver", "differences", "require_scipy"]

Array: TypeAlias = NDArray[np.float64]

Evaluate: TypeAlias = Callable[..., tuple[Array, Array | None]]
"""``evaluate(points [P, dim], gradient=False) -> (values [P], gradient [dim] or None)``.

With ``gradient=True`` there is one point and its gradient is returned; it may also be returned unasked.
"""

_CHUNK = 256


@dataclass(frozen=True)
class Ending:
    """How a solver ended: in words, at which point ``[dim]``, with which loss."""

    message: str
    point: Array
    value: float


Solver: TypeAlias = Callable[[Evaluate], Ending]
"""Minimises by calling `evaluate`."""


class Driven(GradientFree):
    """Turns a solver that calls its objective into ask and tell.

    The solver runs in a greenlet, a function call that is left and gone back to, and waits at each evaluation: `ask`
    gives the points that it waits for, ``[1, dim]``, or ``[dim, dim]`` where it takes differences; `tell` answers.

    A running solver cannot be saved, so what is remembered is every answer. A search that is copied, unpickled, loaded
    or handed to another thread runs the solver again over its record, evaluating nothing, and goes on to the same bits:
    the solver has to be a function of its settings and the answers alone. The record is one vector: per `tell` a digest
    of the points, whether there is a gradient, the losses, the gradient.

    The greenlet ends with the solver or with the optimizer, which it does not keep alive.
    """

    _run: _Run | None = None
    _gradient: Tensor | None = None

    @abstractmethod
    def solver(self, start: Array) -> Solver:
        """The solver from ``start [dim]``. It must not refer to this optimizer, or that is never collected."""

    def begin(self, start: Tensor) -> dict[str, Any]:
        """See `GradientFree`."""
        return {"start": start, "record": torch.zeros(64, dtype=torch.float64), "recorded": 0}

    def candidates(self) -> Tensor:
        """See `GradientFree`.

        Raises:
            SpecError: the search has finished; or a resumed solver asks for other points than those on record.
            Exception: what the solver raises.
        """
        request = self._advance()
        if isinstance(request, Ending):
            raise SpecError(
                f"{type(self).__name__} has finished ({request.message}): there is nothing to ask for."
            )
        return torch.from_numpy(request.points.copy())

    def tell(self, values: Tensor, gradient: Tensor | None = None) -> None:
        """Take the losses ``[population]`` of what `ask` gave and, where `wants_gradient`, the gradient ``[dim]``.

        Raises:
            ValueError: the losses or the gradient are missing or have another shape.
        """
        self._gradient = None if gradient is None else gradient.detach().to("cpu", torch.float64)
        try:
            super().tell(values)
        finally:
            self._gradient = None

    def _take(self, theta: Tensor, values: Tensor) -> None:
        if self._gradient is None and self.wants_gradient:
            raise ValueError("the gradient at this point is needed: tell(values, gradient).")
        if self._gradient is not None and (self._gradient.shape != (self.dim,) or len(theta) != 1):
            raise ValueError(
                f"need the gradient [{self.dim}] of one candidate, got shape {list(self._gradient.shape)}"
            )
        super()._take(theta, values)

    def update(self, theta: Tensor, values: Tensor) -> dict[str, Any]:
        """See `GradientFree`: the answer is appended to the record."""
        given = 0 if self._gradient is None else self.dim
        used, middle = self.memory["recorded"], self.memory["recorded"] + 2 + len(values)
        record: Tensor = self.memory["record"]
        if middle + given > len(record):
            record = torch.cat([record, torch.zeros(middle + given, dtype=record.dtype)])
        # all of it behind `recorded`, so no trace is left if it is interrupted here
        entry = record.numpy()
        entry[used], entry[used + 1] = _digest(theta.numpy()), given > 0
        entry[used + 2 : middle] = values.numpy()
        if self._gradient is not None:
            entry[middle : middle + given] = self._gradient.numpy()
        return {**self.memory, "record": record, "recorded": middle + given}

    @property
    def wants_gradient(self) -> bool:
        """Whether what `ask` gives needs the gradient as well."""
        if not self.memory:
            self.ask()
        request = self._advance()
        return isinstance(request, _Request) and request.gradient

    @property
    def finished(self) -> str:
        """The solver's own message, once it has ended."""
        ending = self._ending()
        return ending.message if ending else ""

    @property
    def solution(self) -> tuple[Tensor, float] | None:
        """Where the solver itself ended, ``[dim]``, and the loss there; None before. `best` may be another point that
        it evaluated on its way, such as one of a difference."""
        ending = self._ending()
        return (torch.from_numpy(ending.point.copy()), ending.value) if ending else None

    def _ending(self) -> Ending | None:
        request = self._advance() if self.memory else None
        return request if isinstance(request, Ending) else None

    def _advance(self) -> _Request | Ending:
        """Hand over what was told, wait, and return the solver's next request or its end."""
        start, record, used = (self.memory[name] for name in ("start", "record", "recorded"))
        run = self._run
        if run is not None and run.fed == used and run.request is not None and run.serves(start):
            return run.request
        self._run = None  # an interrupt or an error leaves none, and the next call makes a fresh one
        if run is None or not run.serves(start):
            run = _Run(self.solver(start.numpy().copy()), start, record[:used].numpy().copy())
        request = run.advance(record.numpy(), used)
        self._run = run
        return request

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_run": None}


def differences(evaluate: Evaluate, x: Array, value: float, eps: float, low: Array, high: Array) -> Array:
    """The gradient ``[dim]`` by forward differences of length `eps`, all evaluated together.

    As SciPy's "2-point" rule with an absolute step: a step that would leave the bounds goes backwards, and one for
    which there is no room either way goes to the farther bound.

    Args:
        evaluate: the solver's.
        x: the point ``[dim]``, inside the bounds.
        value: its loss.
        eps: the step. Where adding it does not change the weight, the step is sqrt(2⁻⁵²) · max(1, |x|).
        low, high: the bounds ``[dim]``, infinite where there are none.
    """
    step = np.full_like(x, eps)
    lost = (x + step) - x == 0
    sign = np.where(x >= 0, 1.0, -1.0)
    step = np.where(lost, np.finfo(np.float64).eps ** 0.5 * sign * np.maximum(1.0, np.abs(x)), step)
    below, above = x - low, high - x
    outside = (x + step < low) | (x + step > high)
    room = np.abs(step) <= np.maximum(below, above)
    step = np.where(outside & room, -step, step)
    step = np.where(~room, np.where(above >= below, above, -below), step)
    slopes = np.empty_like(x)
    for first in range(0, len(x), _CHUNK):  # bounds the memory of many weights
        at = np.arange(first, min(first + _CHUNK, len(x)))
        moved = x[at] + step[at]
        points = np.repeat(x[None], len(at), axis=0)
        points[np.arange(len(at)), at] = moved
        slopes[at] = (evaluate(points)[0] - value) / (moved - x[at])
    return slopes


def require_scipy(owner: str) -> None:
    """Raise a `SpecError` that says how to install SciPy and greenlet where one is missing."""
    if not all(importlib.util.find_spec(name) for name in ("scipy", "greenlet")):
        raise SpecError(f"{owner} needs SciPy and greenlet: pip install 'steppe[gradient-free]'.")


@dataclass(frozen=True)
class _Request:
    points: Array
    gradient: bool


class _Run:
    """One greenlet with one solver, and how far it has been answered."""

    def __init__(self, solver: Solver, start: Tensor, record: Array) -> None:
        from greenlet import greenlet

        self.start, self.thread, self.fed = start, threading.current_thread(), len(record)
        self.request: _Request | Ending | None = None
        self._solver = greenlet(partial(_solve, solver, record))
        with np.errstate(all="ignore"):  # infinite losses are ordinary here
            self._solver.gr_context = copy_context()

    def serves(self, start: Tensor) -> bool:
        """Whether it is the run of the memory with this start, in this thread: a greenlet cannot leave its own."""
        return self.start is start and self.thread is threading.current_thread()

    def advance(self, record: Array, used: int) -> _Request | Ending:
        """Answer the present request with what the record has beyond the last one; go to the next."""
        from greenlet import getcurrent

        answer: tuple[Any, ...] = ()
        if isinstance(self.request, _Request):
            if self.fed == used:
                return self.request
            _, values, gradient, self.fed = _entry(record, self.fed, self.request.points)
            answer = ((values, gradient),)
        if not isinstance(self.request, Ending):
            self._solver.parent = getcurrent()  # where it comes back to
            with np.errstate(all="ignore"), torch.enable_grad():  # constraints are differentiated
                self.request = self._solver.switch(*answer)
        return self.request


def _solve(solver: Solver, record: Array) -> Ending:
    """In the greenlet: `solver` over the record, then over what is answered. It knows nothing of the optimizer."""
    from greenlet import getcurrent

    replayed = 0

    def evaluate(points: Array, gradient: bool = False) -> tuple[Array, Array | None]:
        nonlocal replayed
        if replayed < len(record):
            digest, values, slope, replayed = _entry(record, replayed, points)
            if digest != _digest(points) or (gradient and slope is None):
                raise SpecError(
                    "this search cannot be resumed: the solver asks for another point than the one on record. "
                    "Its settings, its constraints or the version of its library have changed."
                )
            return values, slope
        answer: tuple[Array, Array | None] = getcurrent().parent.switch(_Request(points.copy(), gradient))
        return answer

    return solver(evaluate)


def _entry(record: Array, at: int, points: Array) -> tuple[float, Array, Array | None, int]:
    """The record's entry at `at` for these points: digest, values, gradient, where the next entry is."""
    count, dim = points.shape
    digest, given = record[at], bool(record[at + 1])
    middle = at + 2 + count
    end = middle + dim * given
    if end > len(record):
        digest = np.nan  # cut short: equals no digest
    return float(digest), record[at + 2 : middle].copy(), record[middle:end].copy() if given else None, end


def _digest(points: Array) -> float:
    """48 bits of the points, as a number that float64 holds exactly."""
    points = points + 0.0  # contiguous, and -0 is 0
    return float(int.from_bytes(hashlib.blake2b(points.tobytes(), digest_size=6).digest(), "little"))

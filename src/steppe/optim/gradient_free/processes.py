"""Expensive objectives in several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing.reduction import ForkingPickler
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steppe.core.errors import SolverError, SpecError
from steppe.core.flat import flatten
from steppe.core.objective import Cost
from steppe.core.processes import pool

__all__ = ["Processes"]

Make = Callable[[], Callable[[Tensor], Any]]
"""Builds, in the process that will use it, a function ``theta [dim] (float64) -> loss``."""


class Processes:
    """A closure that evaluates a population in several processes: for losses of a second, not of a millisecond.

    ::

        with Processes(make, model.parameters(), workers=4) as closure:
            for _ in range(100):
                optimizer.step(closure)

    Each process calls ``make()`` once, when it gets its first weights, and computes with one thread. Losses come back
    in the order of the weights, with the bits of a single process if the function depends on the weights alone.

    Args:
        make: builds the function ``theta [dim] -> loss`` (a number or a tensor of one). It travels to new
            processes: a function of a module, or `functools.partial` of one, not a lambda. A script that is run
            needs its ``if __name__ == "__main__":``.
        parameters: the tensors that make up the flat vector: those of the optimizer.
        workers: processes.
        cost: the counter to add to; a fresh one if omitted.

    Raises:
        SpecError: `make` cannot travel, or fewer than one worker.
    """

    def __init__(
        self, make: Make, parameters: Iterable[Tensor], workers: int = 2, cost: Cost | None = None
    ) -> None:
        if workers < 1:
            raise SpecError(f"need at least one worker process, got {workers}.")
        try:
            ForkingPickler.dumps(make)  # as it will be sent
        except Exception as error:
            raise SpecError(
                f"{make!r} cannot be sent to another process ({error}): give a function at the top of a module, "
                "or functools.partial of one."
            ) from error
        self.parameters = list(parameters)
        self.cost = Cost() if cost is None else cost
        self._make, self._workers = make, workers
        self._open = ExitStack()
        self._pool: Any = None

    def values(self, theta: Tensor) -> Tensor:
        """The losses ``[population]`` (float64) at the rows of ``theta [population, dim]``.

        An exception in the function is raised here as it is.

        Raises:
            SpecError: outside of ``with``.
            SolverError: a process died.
        """
        if self._pool is None:
            raise SpecError("the processes are not running: write `with Processes(...) as closure:`.")
        rows = theta.detach().to("cpu", torch.float64).numpy()
        try:
            losses = list(self._pool.map(_evaluate, rows))
        except BrokenProcessPool as error:
            raise SolverError(
                "a worker process died before it returned its loss: killed for its memory, crashed, or its script "
                'lacks `if __name__ == "__main__":`. What it wrote to stderr says more; nothing was counted, and '
                "the optimizer's state is that before the step."
            ) from error
        self.cost.forward += len(rows)
        return torch.tensor(losses, dtype=torch.float64)

    def __call__(self) -> Tensor:
        """The loss at the present weights, without a gradient."""
        return self.values(flatten(self.parameters)[None])[0]

    def __enter__(self) -> Processes:
        self._pool = self._open.enter_context(pool(self._workers, _receive, (self._make,)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool = None
        self._open.close()


# in the worker process: what builds the function, then the function
_make: Make | None = None
_function: Callable[[Tensor], Any] | None = None


def _receive(make: Make) -> None:
    global _make
    _make = make


def _evaluate(row: NDArray[np.float64]) -> float:
    global _function
    if _function is None:  # not while the process starts: there, an exception would only break the pool
        assert _make is not None
        _function = _make()
    return float(_function(torch.from_numpy(row)))

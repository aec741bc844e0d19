"""The losses of `gradient_free.py`, counted and timed."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steppe.core.flat import assign
from steppe.core.objective import Objective
from steppe.core.seeding import generator
from steppe.problems.function_parts import Point
from steppe.problems.functions import find_function
from steppe.problems.small import autoencoder

BUDGET = 10_000
POPULATION = 40

Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """A loss of one flat vector: `values` of a population, `value` of one candidate, as a user would call it."""

    name: str
    objective: Objective
    values: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], float]
    floor: float
    box: tuple[float, float]
    start: Callable[[torch.Generator], Tensor]
    sigma: float
    lr: float
    is_module: bool

    @property
    def dim(self) -> int:
        return sum(parameter.numel() for parameter in self.objective.parameters)


def module_problem(
    name: str,
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    floor: float,
    start: Callable[[torch.Generator], Tensor],
    sigma: float,
    lr: float,
) -> Problem:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    def value(x: Tensor) -> float:
        with torch.no_grad():
            assign(parameters, x)
            return loss(model, batch).item()

    objective = Objective(model, loss, batch)
    parameters = objective.parameters
    return Problem(name, objective, objective.values, value, floor, (-1.0, 1.0), start, sigma, lr, True)


def function_problem(name: str) -> Problem:
    function = find_function(name)
    low, high = function.bounds

    def start(draw: torch.Generator) -> Tensor:
        return low + (high - low) * torch.rand(function.dim, generator=draw, dtype=torch.float64)

    point = Point(torch.zeros(function.dim, dtype=torch.float64))
    objective = Objective(point, lambda model, batch: function(model()), None)
    return Problem(
        name,
        objective,
        function,
        lambda x: function(x).item(),
        function.minimum,
        (low, high),
        start,
        sigma=0.3 * (high - low),
        lr=1.0,
        is_module=False,
    )


def mlp() -> Problem:
    """10-24-24-6 with tanh learns the outputs of another one from 128 samples; the start is torch's own."""
    widths = (10, 24, 24, 6)

    def net(draw: torch.Generator, gain: float = 1.0) -> nn.Sequential:
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            linear = nn.utils.skip_init(nn.Linear, a, b, dtype=torch.float64)
            for parameter in linear.parameters():
                nn.init.uniform_(parameter, -gain / math.sqrt(a), gain / math.sqrt(a), generator=draw)
            layers += [linear, nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def start(draw: torch.Generator) -> Tensor:
        return nn.utils.parameters_to_vector(net(draw).parameters()).detach()

    draw = generator(0, "mlp")
    x = torch.randn(128, widths[0], generator=draw, dtype=torch.float64)
    with torch.no_grad():
        y = net(draw, gain=3.0)(x)
    return module_problem("mlp", net(draw), (x, y), 0.0, start, sigma=0.1, lr=0.03)


def article() -> Problem:
    small = autoencoder()
    assert small.floor is not None

    def start(draw: torch.Generator) -> Tensor:
        return 0.1 * torch.randn(small.dim, generator=draw, dtype=torch.float64)

    return module_problem(
        "autoencoder", small.model(), (small.x, small.y), small.floor, start, sigma=0.6, lr=1.0
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "autoencoder": article,
    "rastrigin-10": partial(function_problem, "rastrigin-10"),
    "rosenbrock-10": partial(function_problem, "rosenbrock-10"),
    "mlp": mlp,
}


class Spent(Exception):
    """Ends a search that cannot be told how many evaluations it has."""


class Counted:
    """An objective that counts its evaluations and keeps the smallest loss within the budget."""

    def __init__(self, problem: Problem, start: Tensor, seed: int, budget: int = BUDGET) -> None:
        self.problem, self.seed, self.budget = problem, seed, budget
        self.parameters = problem.objective.parameters
        assign(self.parameters, start)
        self.start = start.numpy()
        self.evaluations, self.best, self.seconds = 0, math.inf, 0.0

    @property
    def over(self) -> bool:
        return self.evaluations >= self.budget

    def _took(self, losses: Array, cost: int, began: float) -> None:
        losses = losses[: self.budget - self.evaluations]
        if len(losses):
            self.best = min(self.best, float(np.where(np.isfinite(losses), losses, np.inf).min()))
        self.evaluations += cost
        self.seconds += time.process_time() - began

    # what steppe's optimizers call
    def values(self, theta: Tensor) -> Tensor:
        began = time.process_time()
        losses = self.problem.values(theta)
        self._took(losses.numpy(), len(theta), began)
        return losses

    def value(self) -> Tensor:
        began = time.process_time()
        loss = self.problem.objective.value()
        self._took(np.array([loss.item()]), 1, began)
        return loss

    def __call__(self) -> Tensor:
        began = time.process_time()
        loss = self.problem.objective()
        self._took(np.array([loss.item()]), 3, began)
        return loss

    # what the peers call
    def many(self, x: Any) -> Array:
        """``[population, dim] -> [population]``."""
        if self.over:
            raise Spent
        return self.values(torch.from_numpy(np.array(x, dtype=np.float64))).numpy()

    def one(self, x: Array) -> float:
        if self.over:
            raise Spent
        began = time.process_time()
        loss = self.problem.value(torch.tensor(x))
        self._took(np.array([loss]), 1, began)
        return loss

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def scattered(self, population: int = POPULATION) -> Array:
        """The start and a population drawn in the box."""
        low, high = self.problem.box
        x = self.rng.uniform(low, high, (population, self.problem.dim))
        x[0] = self.start.clip(low, high)
        return x

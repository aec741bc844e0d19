"""The base of gradient-free search: bounds, groups, closures and what it says when something is wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from steppe.core.errors import DataError, SpecError
from steppe.core.objective import Objective
from steppe.optim import CMAES
from steppe.optim.gradient_free.base import population_values


def weights(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in sizes]


def test_an_objective_is_evaluated_together_and_counted() -> None:
    model = nn.Linear(3, 1).double()
    inputs = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    objective = Objective(model, lambda model, batch: (model(batch) - 1).square().mean(), inputs)
    optimizer = CMAES(model.parameters(), population=10)
    first = float(objective.value())
    for _ in range(40):
        optimizer.step(objective)
    assert (objective.cost.forward, objective.cost.gradient) == (401, 0)
    assert optimizer.best_value < first / 100
    torch.testing.assert_close(float(objective.value()), optimizer.best_value)


def test_an_objective_over_other_weights_is_called_row_by_row() -> None:
    model = nn.Linear(2, 1).double()
    objective = Objective(model, lambda model, batch: model(batch).square().mean(), torch.ones(1, 2).double())
    only = [model.bias]
    theta = torch.tensor([[0.0], [5.0]], dtype=torch.float64)
    before = model.bias.detach().clone()
    found = population_values(objective, only, theta)
    assert found[1] != found[0]
    assert objective.cost.gradient == 2
    assert model.bias.equal(before)


def test_what_is_not_finite_is_infinite() -> None:
    (x,) = weights(1)
    theta = torch.tensor([[1.0], [-1.0], [0.0]], dtype=torch.float64)
    found = population_values(lambda: x.detach().log().sum(), [x], theta)
    assert found.tolist() == [0.0, math.inf, math.inf]


def test_bounds_follow_the_groups() -> None:
    first, second = weights(2, 3)
    optimizer = CMAES([first], bounds=(-1.0, 1.0))
    optimizer.add_param_group({"params": [second]})
    assert optimizer.ask().shape[1] == 5
    each = CMAES([first], bounds=([-1.0, 0.0], 1.0))
    with pytest.raises(SpecError, match=r"one per weight \(5\)"):
        each.add_param_group({"params": [second]})
    assert each.ask().shape[1] == 2


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((1.0, [2.0, 1.0]), "bounds of weight 1: the lower one, 1, is not below"),
        ((-1.0, [1.0, 1.0, 1.0]), "the upper bound must be a number or one per weight"),
        ((math.nan, 1.0), "the lower bound"),
    ],
)
def test_says_which_bound_is_wrong(bounds: tuple[float, list[float]], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        CMAES(weights(2), bounds=bounds)


def test_says_what_is_missing() -> None:
    (x,) = weights(2)
    optimizer = CMAES([x])
    with pytest.raises(SpecError, match="needs a closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="one per candidate"):
        optimizer.tell(torch.zeros(3))
    with pytest.raises(SpecError, match="holds no search"):
        optimizer.load_state_dict(torch.optim.SGD([x]).state_dict())
    optimizer.tell(torch.arange(6.0))
    with pytest.raises(SpecError, match="over 2 weights, the parameters have 4"):
        CMAES(weights(4)).load_state_dict(optimizer.state_dict())
    with pytest.raises(DataError, match="not finite"):
        CMAES([nn.Parameter(torch.tensor([1.0, math.nan]))]).ask()


def test_a_step_leaves_the_best_of_all_generations() -> None:
    (x,) = weights(3)
    optimizer = CMAES([x], sigma=1.0)
    seen: list[float] = []

    def closure() -> Tensor:
        seen.append(float((x.detach() - 1).square().sum()))
        return torch.tensor(seen[-1], dtype=torch.float64)

    for _ in range(20):
        optimizer.step(closure)
    assert optimizer.best_value == min(seen) == float((x.detach() - 1).square().sum())

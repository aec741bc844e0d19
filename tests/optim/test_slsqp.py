"""SLSQP: SciPy's numbers, solved problems with constraints, honest costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.core.flat import assign, flatten
from steppe.core.objective import Objective
from steppe.optim.gradient_free.slsqp import SLSQP

optimize = pytest.importorskip("scipy.optimize")

FLOOR = 0.7830541615008594


def autoencoder() -> tuple[nn.Module, Tensor, Tensor]:
    """The article's net and data, and its start ``[10]``."""
    with torch.random.fork_rng():
        torch.manual_seed(42)
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2)).double()
        data = torch.randn(32, 2).double()
    data[:, 1] *= 1e3
    x0 = torch.from_numpy(0.1 * np.random.RandomState(42).randn(10))
    assign(list(model.parameters()), x0)
    return model, data, x0


def article() -> Objective:
    model, data, _ = autoencoder()
    return Objective(model, lambda net, batch: nn.functional.mse_loss(net(batch), batch), data)


def solve(search: SLSQP, closure: Callable[[], Any]) -> int:
    """Steps to the end; returns their number."""
    steps = 0
    while not search.finished:
        search.step(closure)
        steps += 1
    return steps


def scipys(objective: Objective, exact: bool, **options: Any) -> Any:
    params = list(objective.model.parameters())

    def fun(x: Any) -> float:
        assign(params, torch.from_numpy(x))
        return float(objective.value())

    def jac(x: Any) -> Any:
        assign(params, torch.from_numpy(x))
        objective()
        return flatten([p.grad for p in params if p.grad is not None]).numpy()

    start = flatten(params).numpy()
    return optimize.minimize(fun, start, method="SLSQP", jac=jac if exact else None, options=options)


def test_the_article_with_differences() -> None:
    objective = article()
    want = scipys(article(), False, maxiter=100, eps=1e-3)
    search = SLSQP(objective.model.parameters(), gradient="difference", eps=1e-3)
    solve(search, objective.value)
    assert search.solution is not None
    assert search.solution[1] == want.fun == pytest.approx(3.0969475, abs=1e-3)
    assert search.solution[0].tolist() == want.x.tolist()
    assert objective.cost.forward == want.nfev
    assert objective.cost.gradient == 0
    assert search.finished == want.message == "Iteration limit reached"
    assert search.best_value < want.fun  # a difference's point was lower than all of the solver's own


def test_the_article_with_exact_gradients() -> None:
    objective = article()
    want = scipys(article(), True, maxiter=100)
    search = SLSQP(objective.model.parameters())
    solve(search, objective)
    assert search.best_value == want.fun == pytest.approx(0.783054, abs=1e-6)
    assert search.best_value >= FLOOR
    # the first gradient brings the first loss
    assert (objective.cost.forward, objective.cost.gradient) == (want.nfev - 1, want.njev)
    assert flatten(objective.model.parameters()).tolist() == want.x.tolist()
    assert search.finished == "Optimization terminated successfully"


def test_batched_differences_reach_the_floor() -> None:
    objective = article()
    search = SLSQP(objective.model.parameters(), gradient="difference")
    steps = solve(search, objective)
    assert search.best_value == pytest.approx(FLOOR, rel=1e-5)
    assert objective.cost.forward > 3 * steps  # differences are one step
    assert objective.cost.gradient == 0


# Hock & Schittkowski 1981, by number: start, loss, inequalities, equalities, bounds, minimum, minimiser
PROBLEMS: dict[int, tuple[list[float], Any, list[Any], list[Any], Any, float, list[float]]] = {
    6: (
        [-1.2, 1.0],
        lambda x: (1 - x[0]) ** 2,
        [],
        [lambda x: 10 * (x[1] - x[0] ** 2)],
        None,
        0.0,
        [1.0, 1.0],
    ),
    28: (
        [-4.0, 1.0, 1.0],
        lambda x: (x[0] + x[1]) ** 2 + (x[1] + x[2]) ** 2,
        [],
        [lambda x: x[0] + 2 * x[1] + 3 * x[2] - 1],
        None,
        0.0,
        [0.5, -0.5, 0.5],
    ),
    43: (
        [0.0, 0.0, 0.0, 0.0],
        lambda x: (x * x * torch.tensor([1.0, 1, 2, 1])).sum() + (x * torch.tensor([-5.0, -5, -21, 7])).sum(),
        [
            lambda x: torch.stack(
                [
                    8 - (x * x).sum() - x[0] + x[1] - x[2] + x[3],
                    10 - (x * x * torch.tensor([1.0, 2, 1, 2])).sum() + x[0] + x[3],
                ]
            ),
            lambda x: 5 - 2 * x[0] ** 2 - x[1] ** 2 - x[2] ** 2 - 2 * x[0] + x[1] + x[3],
        ],
        [],
        None,
        -44.0,
        [0.0, 1.0, 2.0, -1.0],
    ),
    71: (
        [1.0, 5.0, 5.0, 1.0],
        lambda x: x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2],
        [lambda x: x.prod() - 25],
        [lambda x: (x * x).sum() - 40],
        (1.0, 5.0),
        17.0140173,
        [1.0, 4.7429994, 3.8211503, 1.3794082],
    ),
}


def problem(number: int, **hyper: Any) -> tuple[SLSQP, Callable[[], Tensor], nn.Parameter]:
    start, loss, inequalities, equalities, bounds, *_ = PROBLEMS[number]
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def closure() -> Tensor:
        x.grad = None
        value: Tensor = loss(x)
        value.backward()
        return value.detach()

    return SLSQP([x], bounds, inequalities=inequalities, equalities=equalities, **hyper), closure, x


@pytest.mark.parametrize("gradient", ["closure", "difference"])
@pytest.mark.parametrize("number", PROBLEMS)
def test_solves_hock_and_schittkowski(number: int, gradient: str) -> None:
    search, closure, x = problem(number, gradient=gradient, ftol=1e-9)
    solve(search, closure)
    *_, minimum, minimiser = PROBLEMS[number]
    assert search.finished == "Optimization terminated successfully"
    assert search.best_value == pytest.approx(minimum, abs=1e-6)
    assert x.tolist() == pytest.approx(minimiser, abs=1e-3)
    assert search.violation(x) <= 1e-8


@pytest.mark.parametrize("gradient", ["closure", "difference"])
def test_bounds_hold_at_every_evaluation(gradient: str) -> None:
    search, *_ = problem(71, gradient=gradient, eps=0.5)
    while not search.finished:
        theta = search.ask()
        assert ((theta >= 1) & (theta <= 5)).all()
        theta = theta.clone().requires_grad_()
        values = torch.stack([PROBLEMS[71][1](row) for row in theta])
        (slope,) = torch.autograd.grad(values.sum(), theta)
        search.tell(values, slope[0] if gradient == "closure" else None)


def test_every_step_leaves_the_best_feasible_point() -> None:
    search, closure, x = problem(43)
    lower = False
    while not search.finished:
        before = x.detach().clone()
        value = float(search.step(closure))
        if search.best is None:
            assert x.detach().equal(before)
        else:
            assert search.violation(x) <= 1e-5
            assert float(PROBLEMS[43][1](x.detach())) == search.best_value
            lower |= value < search.best_value
    assert lower, "no infeasible point was lower: this tests nothing"


def test_says_that_constraints_contradict() -> None:
    x = nn.Parameter(torch.tensor([0.0, 0.0], dtype=torch.float64))
    search = SLSQP([x], gradient="difference", inequalities=[lambda w: w[0] - 1, lambda w: -w[0] - 1])
    solve(search, lambda: (x * x).sum())
    assert "no point that was evaluated is feasible" in search.finished
    assert "violations add up to 2" in search.finished
    assert search.best is None
    assert math.isinf(search.best_value)
    assert x.tolist() == [0.0, 0.0]


def test_says_that_a_constraint_or_a_closure_has_no_gradient() -> None:
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    search = SLSQP([x], inequalities=[lambda w: w.detach().sum()], gradient="difference")
    with pytest.raises(SpecError, match="is not differentiable"):
        solve(search, lambda: (x * x).sum())
    with pytest.raises(SpecError, match="the closure left no gradient"):
        SLSQP([x]).step(lambda: (x * x).sum())
    with pytest.raises(ValueError, match=r"tell\(values, gradient\)"):
        SLSQP([x]).tell(torch.zeros(1))


@pytest.mark.parametrize("wrong", [{"eps": 0.0}, {"ftol": -1.0}, {"maxiter": 0}, {"gradient": "exact"}])
def test_says_what_is_wrong(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(wrong))):
        SLSQP([nn.Parameter(torch.zeros(2))], **wrong)


@pytest.mark.parametrize("gradient", ["closure", "difference"])
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_resumes_exactly_with_constraints(gradient: str, steps: int) -> None:
    whole, closure, end = problem(71, gradient=gradient)
    solve(whole, closure)
    search, closure, x = problem(71, gradient=gradient)
    for _ in range(steps):
        search.step(closure)
    resumed, other, y = problem(71, gradient=gradient)
    resumed.load_state_dict(copy.deepcopy(search.state_dict()))
    with torch.no_grad():
        y.copy_(x)
    solve(resumed, other)
    assert y.tolist() == end.tolist()
    assert resumed.generation == whole.generation


def test_other_constraints_are_not_a_resume() -> None:
    search, closure, x = problem(71)
    for _ in range(4):
        search.step(closure)
    other = SLSQP([x], (1.0, 5.0), equalities=[lambda w: (w * w).sum() - 30])
    other.load_state_dict(search.state_dict())
    with pytest.raises(SpecError, match="cannot be resumed"):
        other.step(closure)


def test_trains_float32_weights_in_their_own_type() -> None:
    model = nn.Linear(3, 1)
    inputs = torch.tensor([[1.0, 2, 3], [0, 1, 1], [2, 0, 1], [1, 1, 0]])
    objective = Objective(model, lambda net, batch: (net(batch)[:, 0] - batch.sum(1)).square().mean(), inputs)
    search = SLSQP(model.parameters(), ftol=1e-6)
    solve(search, objective)
    assert search.best_value < 1e-5
    assert model.weight.dtype == torch.float32

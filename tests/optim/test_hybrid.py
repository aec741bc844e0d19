import math

import pytest
import torch

from steppe.core.errors import SpecError
from steppe.core.objective import Cost, Objective
from steppe.optim import create
from steppe.optim.gradient_free.hybrid import ThenGradient
from steppe.optim.gradient_free.proposer import Trial
from steppe.optim.gradient_free.pso import PSO
from steppe.optim.gradient_free.stages import BasinHopping
from steppe.problems.function_parts import Point


def rastrigin(model, _):
    x = model()
    return 10 * len(x) + (x.square() - 10 * torch.cos(2 * torch.pi * x)).sum()


def set_up(cls, *start, cost=None, **settings):
    model = Point(torch.tensor(start, dtype=torch.float64))
    return model, Objective(model, rastrigin, None, cost), cls(model.parameters(), **settings)


def test_the_search_ends_at_the_switch_and_gradients_begin_from_its_best():
    cost = Cost()
    model, objective, optimizer = set_up(ThenGradient, 3.0, 2.0, cost=cost, first="pso", switch=100, lr=0.01)
    while optimizer.searching:
        optimizer.step(objective)
    size = len(optimizer.first.ask())
    assert optimizer.spent == cost.forward == math.ceil(100 / size) * size
    assert cost.gradient == 0
    assert torch.equal(model.x.detach(), optimizer.first.best)
    loss = optimizer.step(objective)
    assert float(loss) == optimizer.first.best_value
    assert cost.gradient == 1


def test_start_and_descent_find_what_descent_alone_misses():
    _, objective, alone = set_up(lambda p: create("adam", p, lr=0.02), 3.0, 2.0)
    for _ in range(200):
        alone.step(objective)
    settings = {"first": "differential_evolution", "bounds": (-5.0, 5.0), "switch": 600, "lr": 0.02}
    _model, other, both = set_up(ThenGradient, 3.0, 2.0, **settings)
    for _ in range(200):
        both.step(other)
    assert float(other.value()) < 1e-3 < 1 < float(objective.value())


def test_hyper_parameters_go_to_the_one_that_has_them():
    _, _, optimizer = set_up(ThenGradient, 1.0, first="cma_es", base="sgd", sigma=0.7, momentum=0.5, lr=0.3)
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert optimizer.first.hyper("sigma") == 0.7
    with pytest.raises(SpecError, match=r"momentun.*Did you mean 'momentum'"):
        set_up(ThenGradient, 1.0, first="cma_es", base="sgd", momentun=0.5)
    with pytest.raises(SpecError, match="not gradient-free"):
        set_up(ThenGradient, 1.0, first="adam")
    with pytest.raises(SpecError, match="cannot be the base"):
        set_up(ThenGradient, 1.0, base=PSO)
    model = Point(torch.ones(2, dtype=torch.float64))
    with pytest.raises(SpecError, match="other parameters"):
        ThenGradient(model.parameters(), first=PSO([torch.nn.Parameter(torch.ones(2))]))
    optimizer = ThenGradient(
        model.parameters(), PSO(model.parameters()), torch.optim.SGD(model.parameters(), 0.1)
    )
    assert optimizer.param_groups is optimizer.base.param_groups


@pytest.mark.parametrize("stop", [2, 12])
def test_both_phases_resume_to_the_same_bits(stop):
    settings = {"first": "cma_es", "switch": 30, "lr": 0.01}
    straight, objective, whole = set_up(ThenGradient, 3.0, 2.0, **settings)
    model, cut, first = set_up(ThenGradient, 3.0, 2.0, **settings)
    for _ in range(20):
        whole.step(objective)
    for _ in range(stop):
        first.step(cut)
    other, rest, second = set_up(ThenGradient, 0.0, 0.0, **settings)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(20 - stop):
        second.step(rest)
    assert torch.equal(straight.x, other.x)
    with pytest.raises(SpecError, match="written by ThenGradient"):
        set_up(BasinHopping, 0.0, 0.0)[2].load_state_dict(first.state_dict())


def test_basin_hopping_finds_what_descent_alone_misses():
    _model, objective, optimizer = set_up(
        BasinHopping, 3.0, 2.0, hop=1.2, every=30, temperature=1.0, seed=1, lr=0.02
    )
    for _ in range(1500):
        optimizer.step(objective)
    assert optimizer.best_value < 0.1
    assert optimizer.best.abs().max() < 0.05


def test_cold_hops_start_from_the_lowest_stage():
    _model, objective, optimizer = set_up(BasinHopping, 3.0, 2.0, hop=0.8, every=10, temperature=0.0, lr=0.02)
    ends, home = [], []
    for number in range(200):
        if number and number % 10 == 0:
            ends.append(float(objective.value()))
        optimizer.step(objective)
        if optimizer.memory:
            home.append(optimizer.memory["value"])
    assert home == sorted(home, reverse=True)
    assert home[-1] == min(ends)
    assert len(set(home)) > 1


def test_metropolis_accepts_with_the_stated_probability():
    _model, _objective, optimizer = set_up(BasinHopping, 0.0, temperature=2.0)
    optimizer.memory = {"home": torch.zeros(1, dtype=torch.float64), "value": 1.0}
    here, accepted = Trial(torch.ones(1, dtype=torch.float64), 2.0), 0
    for optimizer.steps in range(1, 2001):
        start, memory = optimizer.start(here, lambda theta: theta)
        accepted += memory["value"] == 2.0
        assert (start.weights - memory["home"]).abs().max() <= 0.5
    assert abs(accepted / 2000 - math.exp(-0.5)) < 0.04


def test_a_stage_begins_with_a_base_without_state_and_the_present_learning_rate():
    model, objective, optimizer = set_up(BasinHopping, 3.0, base="sgd", momentum=0.9, every=4, lr=0.01)
    for _ in range(4):
        optimizer.step(objective)
    optimizer.param_groups[0]["lr"] = 0.002
    optimizer.step(objective)
    (state,) = optimizer.state.values()
    assert torch.equal(state["momentum_buffer"], model.x.grad)  # as after a first step
    assert optimizer.param_groups[0]["lr"] == 0.002
    assert optimizer.param_groups is optimizer.base.param_groups


@pytest.mark.parametrize("call", [1, 2])
def test_an_exception_in_a_jump_leaves_no_trace(call):
    straight, whole, one = set_up(BasinHopping, 3.0, 1.0, every=3, base="adam", lr=0.05)
    model, objective, two = set_up(BasinHopping, 3.0, 1.0, every=3, base="adam", lr=0.05)
    for _ in range(7):
        one.step(whole)
    for _ in range(3):
        two.step(objective)
    calls = 0

    def interrupted():
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return objective()

    before = model.x.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        two.step(interrupted)
    assert torch.equal(before, model.x.detach())
    for _ in range(4):
        two.step(objective)
    assert torch.equal(straight.x, model.x)

"""Expensive objectives in worker processes. What they call stands here, at the top of a module."""

import functools
import os

import pytest
import torch

from steppe.core.errors import SolverError, SpecError
from steppe.core.objective import Cost
from steppe.optim import PSO, Processes


def make(shift=0.0):
    model = torch.nn.Linear(3, 1).double()

    def loss(theta):
        if theta[0] == 7:
            raise ArithmeticError("seven")
        if theta[0] == 9:
            os._exit(1)
        with torch.no_grad():
            model.weight.copy_(theta[:3])
            model.bias.copy_(theta[3:])
            data = torch.linspace(-1, 1, 300, dtype=torch.float64).reshape(100, 3)
            return (model(data) - shift).square().mean()

    return loss


def broken():
    raise OSError("no such data")


@pytest.fixture
def weights():
    return [torch.nn.Parameter(torch.zeros(1, 3)), torch.nn.Parameter(torch.zeros(1))]


def test_many_processes_give_the_order_and_the_bits_of_one(weights):
    cost = Cost()
    alone = make(0.5)
    optimizers = [PSO(weights, population=6, seed=seed) for seed in (1, 1)]
    assert torch.equal(optimizers[0].ask(), optimizers[1].ask())  # both start here
    with Processes(functools.partial(make, 0.5), weights, workers=2, cost=cost) as closure:
        theta = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert torch.equal(closure.values(theta), torch.stack([alone(row) for row in theta]))
        assert closure() == alone(torch.zeros(4, dtype=torch.float64))
        assert cost.forward == 8
        for _ in range(3):
            optimizers[0].step(closure)
        with pytest.raises(ArithmeticError, match="seven"):  # the closure lives on
            closure.values(torch.full((1, 4), 7.0))
        assert len(closure.values(theta[:1])) == 1
    for _ in range(3):
        optimizers[1].tell(torch.stack([alone(row) for row in optimizers[1].ask()]))
    assert torch.equal(optimizers[0].ask(), optimizers[1].ask())
    with pytest.raises(SpecError, match="not running"):
        closure.values(theta)


def test_a_process_that_dies_is_an_error_and_the_step_leaves_no_trace(weights):
    cost = Cost()
    optimizer = PSO(weights, population=4, bounds=(9.0, 10.0))  # its first particle sits at 9
    with Processes(make, weights, workers=1, cost=cost) as closure:
        with pytest.raises(SolverError, match="a worker process died"):
            optimizer.step(closure)
        assert (optimizer.generation, cost.forward) == (0, 0)


def test_what_goes_wrong_in_make_is_shown(weights):
    with Processes(broken, weights, workers=1) as closure, pytest.raises(OSError, match="no such data"):
        closure()


def test_wrong_arguments_are_named(weights):
    with pytest.raises(SpecError, match="top of a module"):
        Processes(lambda: None, weights)
    with pytest.raises(SpecError, match="at least one"):
        Processes(make, weights, workers=0)

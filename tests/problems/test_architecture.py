import itertools

import pytest
import torch
from torch import nn

from steppe.core.objective import Cost, Objective
from steppe.optim import create
from steppe.problems import architecture as module
from steppe.problems.architecture import (
    ACTIVATIONS,
    CHOICES,
    DEPTHS,
    RATES,
    WIDTHS,
    architecture,
    decode,
    table,
)
from steppe.problems.function_parts import Point

STEPS = 3


@pytest.fixture(scope="module")
def function():
    return architecture(STEPS)


def test_every_choice_has_its_place():
    rows = []
    for depth, width, activation, rate in itertools.product(
        range(len(DEPTHS)), range(len(WIDTHS)), range(len(ACTIVATIONS)), range(len(RATES))
    ):
        named = [float(place == activation) for place in range(len(ACTIVATIONS))]
        rows.append([depth + 0.3, width - 0.3, rate + 0.1, *named])
    assert decode(torch.tensor(rows)).tolist() == list(range(len(CHOICES)))


def test_what_is_outside_counts_as_the_last_one():
    far = torch.tensor([9.0, 9.0, -9.0, 0.0, 5.0, 0.0, 0.0])
    assert CHOICES[int(decode(far))] == (3, 16, "relu", 0.01)


def test_the_optimum_is_that_of_the_table(function):
    losses = table(STEPS)
    assert len(losses) == len(CHOICES) == 144
    assert function.minimum == float(losses.min())
    assert float(function(torch.tensor(function.minima[0]))) == function.minimum


def test_a_choice_is_trained_as_by_torch():
    """Each of the nets that are trained side by side, on its own with nn.Linear and Adam."""
    choice = (2, 4, "gelu", 0.03)
    x, y = module._data()
    stream = module.generator(0, "architecture", 2, 4)
    sizes = [(2, 4), (4, 4), (4, 1)]
    drawn = [
        torch.randn(module.REPEATS, *size, generator=stream, dtype=torch.float64) / size[0] ** 0.5
        for size in sizes
    ]
    errors = []
    for repeat in range(module.REPEATS):
        layers = [nn.utils.skip_init(nn.Linear, *size, dtype=torch.float64) for size in sizes]
        for layer, weight in zip(layers, drawn, strict=True):
            layer.weight.data = weight[repeat].T.clone()
            layer.bias.data.zero_()
        net = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (net(x[:64]).squeeze(-1) - y[:64]).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            errors.append((net(x[64:]).squeeze(-1) - y[64:]).square().mean())
    got = table(STEPS)[CHOICES.index(choice)]
    torch.testing.assert_close(got, torch.stack(errors).mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("key", ["cma_es", "differential_evolution"])
def test_search_finds_a_choice_among_the_best(function, key):
    settings = {"cma_es": {"sigma": 1.0}, "differential_evolution": {"population": 20}}[key]
    model, cost = Point(torch.tensor(function.start, dtype=torch.float64)), Cost()
    objective = Objective(model, lambda m, batch: function(m()), None, cost)
    optimizer = create(key, model.parameters(), seed=0, bounds=function.bounds, **settings)
    while cost.evaluations < 150:
        optimizer.step(objective)
    better = int((table(STEPS) < optimizer.best_value).sum())
    assert better < 5

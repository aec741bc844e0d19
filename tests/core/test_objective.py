import pytest
import torch
from torch import nn

from steppe.core.flat import flatten
from steppe.core.objective import _ROWS, Cost, Objective


def loss(model, batch):
    return model(batch).square().mean()


def dim(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make()


def rows(model, population):
    return torch.randn(
        population, dim(model), dtype=torch.float64, generator=torch.Generator().manual_seed(population)
    )


def one_at_a_time(objective, theta):
    model, losses = objective.model, []
    for row in theta:
        other = [p for p in model.parameters() if p.requires_grad]
        sizes = [p.numel() for p in other]
        with torch.no_grad():
            for p, part in zip(other, row.split(sizes), strict=True):
                p.copy_(part.view(p.shape))
        losses.append(objective.value())
    return torch.stack(losses)


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)

    def forward(self, x):
        return self.gru(x)[0][:, -1]


NETS = {
    "together": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), (5, 3), True),
    "float32": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (5, 3), True),
    "gru": (Last, (5, 6, 3), False),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), (5, 3), False),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("population", [1, 7, 300])
def test_values_are_those_of_one_at_a_time_and_weights_stay(name, population):
    make, shape, together = NETS[name]
    model = seeded(make)
    double = next(model.parameters()).dtype == torch.float64
    batch = seeded(lambda: torch.randn(shape)).to(next(model.parameters()).dtype)
    objective = Objective(model, loss, batch)
    theta, before = rows(model, population), flatten(model.parameters())
    values = objective.values(theta)
    assert values.shape == (population,)
    assert not values.requires_grad
    assert torch.equal(flatten(model.parameters()), before)
    assert objective.cost == Cost(forward=population)
    if population >= 5:
        assert (_ROWS[model] > 0) is together
    expected = one_at_a_time(objective, theta)
    torch.testing.assert_close(values, expected, rtol=1e-12 if double else 1e-5, atol=0)


def test_chunks_do_not_change_the_numbers(monkeypatch):
    model = seeded(NETS["together"][0])
    objective = Objective(model, loss, seeded(lambda: torch.randn(5, 3)).double())
    theta = rows(model, 50)
    whole = objective.values(theta)
    monkeypatch.setitem(_ROWS, model, 7)
    torch.testing.assert_close(objective.values(theta), whole, rtol=1e-14, atol=0)


def test_a_large_batch_is_evaluated_in_chunks():
    model = seeded(NETS["together"][0])
    objective = Objective(model, loss, torch.zeros(20_000, 3, dtype=torch.float64))
    objective.values(rows(model, 5))
    assert 1 <= _ROWS[model] <= 6  # 20,000 x 4 float64 is 0.6 MB


@pytest.mark.parametrize("population", [3, 40])
def test_noise_of_the_loss_is_the_same_for_every_row_and_both_ways(population):
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double())
    objective = Objective(model, loss, torch.ones(6, 3, dtype=torch.float64))
    theta = rows(model, 1).repeat(population, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        values = objective.values(theta)
        torch.manual_seed(0)
        alone = objective.values(theta[:1])
        other = objective.values(theta)
    torch.testing.assert_close(values, alone.expand(population), rtol=1e-13, atol=0)
    assert not torch.allclose(values, other)  # the next population has noise of its own


@pytest.mark.parametrize(
    "unfriendly",
    [
        lambda model, x: torch.tensor(float(model(x).square().mean())),
        lambda model, x: model(x).square().mean() if model(x).sum() > 0 else model(x).abs().mean(),
        lambda model, x: torch.as_tensor(model(x).detach().numpy().round().sum()),
    ],
)
def test_losses_that_leave_torch_are_evaluated_one_by_one(unfriendly):
    model = seeded(NETS["together"][0])
    objective = Objective(model, unfriendly, torch.ones(5, 3, dtype=torch.float64))
    theta = rows(model, 6)
    values = objective.values(theta)
    torch.testing.assert_close(values, one_at_a_time(objective, theta))


def test_a_parameter_that_is_read_past_the_model_is_noticed():
    model = seeded(lambda: nn.Linear(3, 1).double())
    weight = model.weight
    objective = Objective(model, lambda m, b: weight.square().sum(), None)
    theta = rows(model, 6)
    torch.testing.assert_close(objective.values(theta), theta[:, :3].square().sum(1))


def test_frozen_parameters_are_no_part_of_the_vector():
    model = seeded(NETS["together"][0])
    model[0].weight.requires_grad_(False)
    objective = Objective(model, loss, torch.ones(5, 3, dtype=torch.float64))
    assert [p is q for p, q in zip(objective.parameters, list(model.parameters())[1:], strict=True)] == [
        True
    ] * 3
    theta = rows(model, 6)
    torch.testing.assert_close(objective.values(theta), one_at_a_time(objective, theta))
    with pytest.raises(ValueError, match=r"need weights of shape \[population, 14\], got \[2, 3\]"):
        objective.values(torch.zeros(2, 3))


def test_an_error_of_the_loss_is_raised_and_the_weights_are_back():
    def fails(model, batch):
        raise OverflowError("no")

    model = seeded(NETS["together"][0])
    before = flatten(model.parameters())
    with pytest.raises(OverflowError):
        Objective(model, fails, None).values(rows(model, 6))
    assert torch.equal(flatten(model.parameters()), before)


def test_a_gradient_counts_as_three_evaluations():
    model = seeded(NETS["together"][0])
    objective = Objective(model, loss, torch.ones(5, 3, dtype=torch.float64))
    objective()
    objective.value()
    objective.values(rows(model, 10))
    assert objective.cost == Cost(forward=11, gradient=1)
    assert objective.cost.evaluations == 14

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from steppe.core.errors import DataError
from steppe.core.flat import assign, flatten, unflatten
from steppe.core.seeding import generator
from steppe.landscape import Cost, Point


def net(*extra, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *extra, nn.Linear(4, 1)).to(dtype)


def data(n=10, dtype=torch.float32):
    g = generator(0, "data")
    return torch.randn(n, 3, generator=g, dtype=dtype), torch.randn(n, 1, generator=g, dtype=dtype)


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def pairs(n=10, size=4):
    return list(zip(*(t.split(size) for t in data(n)), strict=True))


def test_flat_and_back():
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor(7.0), torch.ones(2)]
    vector = flatten(tensors)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 7, 1, 1]
    assert [t.shape for t in unflatten(vector, tensors)] == [t.shape for t in tensors]
    assign(tensors, 2 * vector)
    assert torch.equal(flatten(tensors), 2 * vector)
    with pytest.raises(ValueError, match="need a vector of 9 numbers"):
        unflatten(vector[1:], tensors)


def test_value_and_gradient_are_those_of_all_data_at_once():
    model = net()
    point = Point(model, mse, pairs())  # batches of 4, 4, 2
    whole = mse(model, data())
    whole.backward()
    value, gradient = point.gradient()
    assert value == pytest.approx(whole.item(), rel=1e-6)
    assert point.value() == value
    assert torch.allclose(gradient, flatten(p.grad for p in model.parameters()), atol=1e-7)
    assert point.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert (point.dim, len(point.theta)) == (21, 21)


def test_weights_give_each_batch_its_share():
    model, batches = net(), pairs()
    point = Point(model, mse, batches, weights=[1, 1, 2])
    each = [mse(model, b).item() for b in batches]
    assert point.value() == pytest.approx((each[0] + each[1] + 2 * each[2]) / 4)
    assert [point.value(batch=i) for i in range(3)] == each
    assert point.gradient(batch=2)[0] == each[2]


@pytest.mark.parametrize("weights", [[1, 1], [1, -1, 1], [0, 0, 0], [1, math.nan, 1]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(DataError, match="need 3 weights"):
        Point(net(), mse, pairs(), weights=weights)


def test_weights_modes_and_grads_come_back():
    model = net(nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    model[2].eval()
    mse(model, data()).backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads, modes = [p.grad.clone() for p in model.parameters()], [m.training for m in model.modules()]
    point = Point(model, mse, pairs())
    other = torch.randn(point.dim, generator=generator(1))
    assert point.value(other) != point.value()
    point.gradient(other)
    with pytest.raises(ZeroDivisionError), point.at(other):
        1 / (torch.equal(point.theta, other) - 1)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert [m.training for m in model.modules()] == modes


def test_frozen_parameters_are_not_part_of_the_vector():
    model = net()
    model[0].requires_grad_(False)
    assert Point(model, mse, pairs()).dim == 5
    with pytest.raises(DataError, match="trainable parameters"):
        Point(model.requires_grad_(False), mse, pairs())


def test_tied_weights_move_together():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    point = Point(model, lambda m, b: m(b).square().mean(), [data()[0]])
    assert point.dim == 15
    with point.at(torch.zeros(15)):
        assert model[1].weight.abs().sum() == 0


def test_cost_is_counted_in_passes_over_all_data():
    point = Point(net(), mse, pairs(8))
    before = point.cost
    point.value()
    point.value(batch=1)
    point.gradient(batch=0)
    assert point.cost - before == Cost(1.5, 0.5)
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_from_loader_in_three_lines():
    model = net()
    loader = DataLoader(TensorDataset(*data()), batch_size=4)
    point = Point.from_loader(model, nn.MSELoss(), loader)
    assert point.value() == pytest.approx(mse(model, data()).item(), rel=1e-6)


def test_what_shuffles_is_refused():
    loader = DataLoader(TensorDataset(*data(40)), batch_size=4, shuffle=True, generator=generator(0))
    with pytest.raises(DataError, match="shuffles or augments"):
        Point.from_loader(net(), nn.MSELoss(), loader)


def test_an_iterator_is_refused():
    with pytest.raises(DataError, match="read only once"):
        Point(net(), mse, iter(pairs()))
    with pytest.raises(DataError, match="needs batches"):
        Point(net(), mse, [])


class Noisy(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, training=True)


def test_noise_in_the_model_is_refused():
    with pytest.raises(DataError, match="dropout that ignores it"):
        Point(net(Noisy()), mse, pairs())


class Stubborn(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(True)


def test_batch_norm_that_stays_in_training_mode_is_refused():
    with pytest.raises(DataError, match=r"changes the buffer '2\.running_mean'"):
        Point(net(Stubborn(4)), mse, pairs())


@pytest.mark.parametrize(
    ("factor", "message"), [(math.inf, "finite number"), (torch.ones(2), r"shape \[2\]")]
)
def test_what_is_no_finite_scalar_is_refused(factor, message):
    with pytest.raises(DataError, match=message):
        Point(net(), lambda m, b: mse(m, b) * factor, pairs())


def test_ragged_batches_of_a_loss_that_is_no_mean_over_samples_are_refused():
    def total(model, batch):
        return F.mse_loss(model(batch[0]), batch[1], reduction="sum")

    with pytest.raises(DataError, match="from 2 to 4 samples"):
        Point(net(), total, pairs(10))
    Point(net(), total, pairs(8))  # one size
    Point(net(), total, pairs(10), weights=[1, 1, 1])  # said so

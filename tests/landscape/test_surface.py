import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from steppe.core.errors import DataError, SpecError
from steppe.core.seeding import generator
from steppe.landscape.directions import between, random_directions
from steppe.landscape.point import Point
from steppe.landscape.surface import surface
from steppe.quant.factor_model import GRUFactor, ic_loss


class Field(nn.Module):
    """A loss that is a function of two weights."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))


def field(function):
    return Point(Field(), lambda model, batch: function(*model.w), [torch.zeros(1)])


def square(point, resolution=25, **how):
    axes = torch.eye(2, dtype=torch.float64)
    return surface(point, torch.zeros(2).double(), axes, [(-1, 1), (-2, 2)], resolution, **how)


def regression(size=4):
    torch.manual_seed(0)
    model, g = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), generator(0, "data")
    x, y = torch.randn(12, 3, generator=g), torch.randn(12, 1, generator=g)
    return Point.from_loader(model, F.mse_loss, list(zip(x.split(size), y.split(size), strict=True)))


def plane(point, resolution=7, **how):
    axes = random_directions(point, generator(0, "axes"))
    return surface(point, point.theta, axes, [(-1, 1), (-0.5, 0.5)], resolution, **how)


def test_values_lie_where_they_belong():
    found = square(field(lambda a, b: a + 10 * b), 5)
    assert found.x.tolist() == [-1, -0.5, 0, 0.5, 1]
    assert found.y.tolist() == [-2, -1, 0, 1, 2]
    assert np.allclose(found.loss, found.x + 10 * found.y[:, None])
    assert found.computed.all()


def test_the_loss_is_that_of_the_model_with_those_weights():
    point = regression()
    theta, axes = point.theta, random_directions(point, generator(0, "axes"))
    found = plane(point)
    assert torch.equal(point.theta, theta)
    for j, i in ((0, 0), (3, 3), (2, 6)):
        there = theta.double() + found.x[i] * axes[0].double() + found.y[j] * axes[1].double()
        assert found.loss[j, i] == point.value(there)
    assert found.loss[3, 3] == point.value()


def test_a_line_between_two_minima_ends_in_them():
    point = regression()
    a, b = point.theta, torch.randn(point.dim, generator=generator(0, "b"))
    line = surface(point, a, between(a, b), [(0, 1)], 5)
    assert line.loss.shape == (1, 5)
    assert line.y.tolist() == [0]
    assert line.loss[0, 0] == point.value(a)
    assert line.loss[0, 4] == point.value(b)


def test_processes_give_the_same_bits():
    point = regression()
    assert np.array_equal(plane(point, 3).loss, plane(point, 3, workers=1).loss)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_killed_surface_resumes_to_the_same_bits(tmp_path, adaptive, monkeypatch):
    point = regression()
    whole = plane(point, 9, adaptive=adaptive)
    value, calls = point.value, 0

    def dying(theta=None, batch=None):
        nonlocal calls
        calls += 1
        if calls == 20:
            raise KeyboardInterrupt
        return value(theta, batch)

    monkeypatch.setattr(point, "value", dying)
    with pytest.raises(KeyboardInterrupt):
        plane(point, 9, adaptive=adaptive, folder=tmp_path / "s")
    calls = 100
    again = plane(point, 9, adaptive=adaptive, folder=tmp_path / "s")
    assert calls - 100 == whole.computed.sum() - 18 + 1  # one more call in each: the loss at the origin
    assert np.array_equal(whole.loss, again.loss)
    assert np.array_equal(whole.computed, again.computed)
    calls = 100
    plane(point, 9, adaptive=adaptive, folder=tmp_path / "s")
    assert calls == 101


def test_a_folder_holds_one_surface(tmp_path):
    point = regression()
    plane(point, folder=tmp_path)
    with pytest.raises(DataError, match="another surface"):
        plane(point, 8, folder=tmp_path)
    with pytest.raises(DataError, match="another surface"):
        plane(regression(size=3), folder=tmp_path)  # another split of the mean has other bits


def test_a_bowl_needs_few_points():
    found = square(field(lambda a, b: a**2 + b**2), adaptive=True)
    exact = found.x**2 + found.y[:, None] ** 2
    assert found.computed.sum() == 13 * 13
    assert np.array_equal(found.loss[found.computed], exact[found.computed])
    assert np.abs(found.loss - exact).max() < 0.03 * np.median(exact)


def test_a_ridge_is_computed_where_it_is():
    found = square(field(lambda a, b: torch.tanh(20 * (a - 0.3)) + 0.1 * b), 49, adaptive=True)
    exact = np.tanh(20 * (found.x - 0.3)) + 0.1 * found.y[:, None]
    assert np.abs(found.loss - exact).max() < 0.1
    assert found.computed[:, np.abs(found.x - 0.3) < 0.1].all()
    assert found.computed.mean() < 0.5


@settings(max_examples=25, deadline=None)
@given(resolution=st.integers(2, 14), slope=st.floats(-3, 3))
def test_any_grid_is_covered_and_a_plane_is_interpolated_exactly(resolution, slope):
    found = square(field(lambda a, b: a + slope * b), resolution, adaptive=True)
    assert np.allclose(found.loss, found.x + slope * found.y[:, None])
    line = surface(
        field(lambda a, b: a), torch.zeros(2).double(), torch.eye(2)[:1], [(0, 1)], resolution, adaptive=True
    )
    assert np.allclose(line.loss[0], line.x)


def test_where_the_loss_is_not_finite_every_point_is_computed():
    found = square(field(lambda a, b: torch.where(a > 0.5, torch.nan, a)), adaptive=True)
    assert found.computed[:, found.x > 0.55].all()
    assert np.isnan(found.loss[:, found.x > 0.55]).all()


def test_chunks_leave_a_mean_over_samples_and_are_refused_for_another_loss():
    point = regression(size=12)
    assert np.allclose(plane(point).loss, plane(point, chunk=5).loss, rtol=1e-6)
    torch.manual_seed(0)
    x, y = torch.randn(10, 1), torch.randn(10)
    section = Point(nn.Linear(1, 1), lambda model, batch: ic_loss(model(batch[0])[:, 0], batch[1]), [(x, y)])
    with pytest.raises(DataError, match="no mean over samples"):
        plane(section, chunk=5)


def test_a_gru_on_cross_sections():
    torch.manual_seed(0)
    model, g = GRUFactor(16, 1, fields=3), generator(0, "data")
    days = [(torch.randn(4, n, 3, generator=g), torch.randn(n, generator=g)) for n in (8, 9)]
    point = Point(model, lambda m, day: ic_loss(m(day[0]), day[1]), days, weights=[1, 1])
    found = plane(point, 3)
    assert found.loss[1, 1] == point.value()
    assert np.isfinite(found.loss).all()


def test_what_does_not_fit_together_is_refused():
    point = regression()
    axes = random_directions(point, generator(0, "axes"))
    with pytest.raises(SpecError, match="as many spans"):
        surface(point, point.theta, axes, [(-1, 1)])
    with pytest.raises(SpecError, match="low < high"):
        surface(point, point.theta, axes, [(-1, 1), (1, 1)])

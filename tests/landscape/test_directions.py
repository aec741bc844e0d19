import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from steppe.core.errors import DataError, SpecError
from steppe.core.flat import unflatten
from steppe.core.seeding import generator
from steppe.landscape.directions import between, eigenvectors, filters, random_directions
from steppe.landscape.point import Point
from steppe.landscape.trajectory import pca, read_trajectory, record, walk_null


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(3, 4, 2), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.gru(x)[0][-1])


def point():
    torch.manual_seed(0)
    model, g = Recurrent(), generator(0, "data")
    x, y = torch.randn(5, 6, 3, generator=g), torch.randn(6, 1, generator=g)
    return Point.from_loader(model, F.mse_loss, [(x, y)])


def test_filters_of_a_gru_are_rows_per_gate_and_unit_and_biases_per_gate():
    at = point()
    parts = dict(zip(at.names, unflatten(filters(at), at.params), strict=True))
    assert len(parts["gru.weight_ih_l0"].unique()) == len(parts["gru.weight_hh_l1"].unique()) == 12
    assert (parts["gru.weight_hh_l0"] == parts["gru.weight_hh_l0"][:, :1]).all()
    gates = parts["gru.bias_ih_l0"].view(3, 4)
    assert len(gates.unique()) == 3
    assert (gates == gates[:, :1]).all()
    assert len(parts["head.weight"].unique()) == len(parts["head.bias"].unique()) == 1
    assert len(filters(at).unique()) == 4 * 12 + 4 * 3 + 2


@pytest.mark.parametrize("normalise", ["filter", "layer"])
def test_random_directions_have_the_norms_of_the_weights(normalise):
    at = point()
    for direction in random_directions(at, generator(0, "axes"), 2, normalise):
        for name, d, w in zip(at.names, unflatten(direction, at.params), at.params, strict=True):
            if normalise == "filter" and name.startswith("gru.bias"):
                d, w = d.view(3, -1), w.view(3, -1)
            dims = -1 if normalise == "filter" else None
            assert torch.allclose(
                torch.linalg.vector_norm(d, dim=dims), torch.linalg.vector_norm(w, dim=dims)
            )


def test_random_directions_come_from_the_generator_alone_and_leave_zero_weights():
    at = point()
    with torch.no_grad():
        at.model.head.bias.zero_()
    first, again = (random_directions(at, generator(1, "axes")) for _ in range(2))
    assert torch.equal(first, again)
    assert (first[:, -1] == 0).all()
    plain = random_directions(at, generator(1, "axes"), 3, "none")
    assert plain.shape == (3, at.dim)
    assert plain.std() == pytest.approx(1, abs=0.1)
    with pytest.raises(SpecError, match="Did you mean 'filter'"):
        random_directions(at, generator(1, "axes"), 1, "filters")


def test_eigenvectors_and_the_line_between():
    scales = torch.tensor([1.0, 5.0, 3.0])

    class Bowl(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

    at = Point(Bowl(), lambda model, batch: (batch * model.w**2).sum() / 2, [scales])
    axes = eigenvectors(at, generator(0, "axes"), 2)
    assert torch.allclose(axes.abs(), torch.eye(3)[[1, 2]], atol=1e-3)
    assert between(torch.ones(3), scales).tolist() == [[0, 4, 2]]


def test_the_plane_of_a_trajectory_is_that_of_a_singular_value_decomposition():
    thetas = torch.randn(9, 40, generator=generator(0, "walk"), dtype=torch.float64).cumsum(0)
    plane = pca(thetas, 6)
    away = thetas - thetas[6]
    _, singular, right = torch.linalg.svd(away, full_matrices=False)
    assert torch.allclose((plane.axes @ right[:2].T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-10)
    assert torch.allclose(plane.explained, singular[:2] ** 2 / (singular**2).sum())
    assert torch.allclose(plane.coordinates, away @ plane.axes.T)
    assert (plane.coordinates[6].abs() < 1e-12).all()
    assert (plane.coordinates[0] < 0).all()
    centred = torch.linalg.svdvals(thetas - thetas.mean(0)) ** 2
    assert torch.allclose(plane.explained_centred, centred[:2] / centred.sum())


def test_the_null_of_many_equal_steps_is_the_published_constants():
    about, centred = walk_null(torch.ones(400), 400)
    k = torch.arange(1, 3)
    assert torch.allclose(about, 8 / math.pi**2 / (2 * k - 1).double() ** 2, atol=1e-3)
    assert torch.allclose(centred, 6 / math.pi**2 / k.double() ** 2, atol=2e-3)


def test_the_null_is_what_a_random_walk_in_many_dimensions_gives():
    lengths = torch.tensor([3.0, 2.0, 1.0, 1.0, 2.0])
    steps = torch.randn(5, 50_000, generator=generator(0, "steps"))
    steps *= (lengths / steps.norm(dim=1)).unsqueeze(1)
    plane = pca(torch.cat([torch.zeros(1, 50_000), steps]).cumsum(0), 4)
    assert torch.allclose(plane.explained, plane.null, atol=0.01)
    assert torch.allclose(plane.explained_centred, plane.null_centred, atol=0.01)


def test_a_plane_needs_three_checkpoints_off_a_line():
    line = torch.arange(4.0).unsqueeze(1) * torch.ones(5)
    for thetas in (line, line[:2]):
        with pytest.raises(DataError, match="three checkpoints"):
            pca(thetas, 0)


def test_a_trajectory_comes_back(tmp_path):
    with pytest.raises(DataError, match="no trajectory"):
        read_trajectory(tmp_path)
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    for epoch in (0, 1, 10, 2):
        with torch.no_grad():
            model.weight.fill_(epoch)
        record(tmp_path, epoch, model.parameters())
    found = read_trajectory(tmp_path)
    assert found.epochs == (0, 1, 2, 10)
    assert found.thetas.tolist() == [[0, 0], [1, 1], [2, 2], [10, 10]]

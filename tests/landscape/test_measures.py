"""Values known in closed form, mostly on bowls ``1 + (w - c)' A (w - c) / 2`` at their minimum, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from steppe.core.errors import DataError, SpecError
from steppe.core.flat import flatten
from steppe.core.seeding import generator
from steppe.landscape import Point
from steppe.landscape.directions import random_directions
from steppe.landscape.measures import measure

from .points import Weights, dense_hessian, quadratic, regression, symmetric

CENTRE = torch.tensor([1.0, -0.5, 2.0, 0.25], dtype=torch.float64)
BENT = symmetric([4.0, 2.0, 1.0, 0.5])[0]
ROUND = torch.diag(torch.tensor([3.0, 1.0, 0.5, 4.0], dtype=torch.float64))


def bowl(matrix, start=CENTRE, floor=1.0, parts=1):
    """Batches are `parts` copies of the same bowl."""

    def loss(model, a):
        d = model.w - CENTRE
        return floor + 0.5 * d @ a @ d

    return Point(Weights(start.clone()), loss, [matrix] * parts, weights=[1] * parts)


def rng():
    return generator(0, "measure")


def largest(matrix):
    return float(torch.linalg.eigvalsh(matrix)[-1])


def test_sam_is_the_rise_after_a_step_along_each_batchs_gradient():
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    matrices = [
        torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64),
        torch.tensor([[1.0, -1.0], [-1.0, 3.0]], dtype=torch.float64),
    ]
    point = Point(Weights(start), lambda m, a: 0.5 * m.w @ a @ m.w, matrices, weights=[1, 3])
    for adaptive, rho in ((False, 0.05), (True, 0.5)):
        scale = start.abs() if adaptive else torch.ones(2)
        expected = 0.0
        for share, a in zip((0.25, 0.75), matrices, strict=True):
            e = scale**2 * (a @ start)
            e *= rho / (scale * (a @ start)).norm()
            expected += share * float(e @ a @ start + 0.5 * e @ a @ e)
        found = measure("sam", point, rng(), adaptive=adaptive)
        assert found.value == pytest.approx(expected, rel=1e-12)
    both = 0.25 * matrices[0] + 0.75 * matrices[1]
    g = both @ start
    expected = float(0.05 * g.norm() + 0.5 * 0.05**2 * g @ both @ g / g.norm() ** 2)
    assert measure("sam", point, rng(), per_batch=False).value == pytest.approx(expected, rel=1e-12)


def test_sam_at_an_exact_minimum_is_zero():
    assert measure("sam", bowl(BENT), rng()).value == 0


@pytest.mark.parametrize("adaptive", [False, True])
def test_worst_case_in_a_ball_is_half_the_largest_eigenvalue(adaptive):
    scale = CENTRE.abs() if adaptive else torch.ones(4, dtype=torch.float64)
    expected = 0.5 * 0.1**2 * largest(scale[:, None] * BENT * scale)
    found = measure("worst_case_l2", bowl(BENT, parts=2), rng(), rho=0.1, adaptive=adaptive, steps=40)
    assert found.value == pytest.approx(expected, rel=1e-3)
    assert found.converged, found.note


def test_worst_case_in_a_box_is_at_its_best_corner():
    scale = 0.1 * CENTRE.abs()
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64) * scale
    expected = max(float(0.5 * d @ BENT @ d) for d in corners)
    found = measure("worst_case_linf", bowl(BENT), rng(), rho=0.1, starts=5)
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.converged, found.note


def test_worst_case_away_from_a_minimum_against_all_directions():
    point = quadratic(torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    angle = torch.linspace(0, 2 * math.pi, 20001, dtype=torch.float64)
    d = 0.3 * torch.stack([angle.cos(), angle.sin()], dim=1)
    rises = [0.5 * ((1 + d) @ point.batches[0] * (1 + d)).sum(1) - 2.0]
    found = measure("worst_case_l2", point, rng(), rho=0.3, adaptive=False)
    assert found.value == pytest.approx(float(rises[0].max()), rel=1e-4)
    assert found.converged, found.note


def test_a_search_cut_short_says_so():
    point = regression()[0]
    assert not measure("worst_case_linf", point, rng(), rho=0.5, steps=1).converged
    one = measure("worst_case_l2", point, rng(), steps=5).value
    more = measure("worst_case_l2", point, rng(), steps=60, starts=3)
    assert more.value >= one > 0
    assert more.converged, more.note


def test_epsilon_sharpness():
    half = 1e-3 * (CENTRE.abs() + 1)
    expected = 0.5 * float((torch.diag(ROUND) * half**2).sum()) / (1 + 1)
    found = measure("epsilon_sharpness", bowl(ROUND), rng())
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.converged
    ball = measure("epsilon_sharpness", bowl(ROUND), rng(), shape="ball", steps=60)
    assert ball.value == pytest.approx(0.5 * float((torch.diag(ROUND) * half**2).max()) / 2, rel=1e-3)
    with pytest.raises(DataError, match=r"the loss is -1\.0"):
        measure("epsilon_sharpness", bowl(ROUND, floor=-1.0), rng())


@pytest.mark.parametrize(("adaptive", "rho"), [(False, 0.01), (True, 0.1)])
def test_average_case_is_half_the_weighed_trace(adaptive, rho):
    scale = CENTRE.abs() if adaptive else torch.ones(4, dtype=torch.float64)
    expected = 0.5 * rho**2 * float((scale**2 * torch.diag(BENT)).sum())
    found = measure("average_case", bowl(BENT), rng(), adaptive=adaptive, stderr=0.05, max_pairs=2000)
    assert abs(found.value - expected) < 4 * found.stderr
    assert found.converged
    assert 0 < found.stderr <= 0.05 * found.value
    assert not measure("average_case", bowl(BENT), rng(), max_pairs=3).converged


def test_pairs_of_noise_cancel_the_gradient():
    away = bowl(BENT, CENTRE + 100)
    found = measure("average_case", away, rng())
    assert abs(found.value - 0.5 * 1e-4 * 7.5) < 4 * found.stderr


@pytest.mark.parametrize("adaptive", [False, True])
def test_pac_bayes_finds_the_noise_of_the_rise(adaptive):
    scale = CENTRE.abs() if adaptive else torch.ones(4, dtype=torch.float64)
    trace = float((scale**2 * torch.diag(BENT)).sum())
    found = measure("pac_bayes", bowl(BENT), rng(), adaptive=adaptive, rise=0.2, pairs=60, tol=1e-3)
    assert abs(found.value - trace / 0.4) < 4 * found.stderr
    assert found.stderr < 0.25 * found.value
    assert found.converged


def test_pac_bayes_uses_the_same_noise_for_every_sigma():
    # on a bowl the mean rise is then s² times one number, so the answers for two rises are in their exact ratio
    one, two = (measure("pac_bayes", bowl(BENT), rng(), rise=r, tol=1e-6) for r in (0.1, 0.4))
    assert one.value / two.value == pytest.approx(4, rel=1e-5)
    assert one.stderr / two.stderr == pytest.approx(4, rel=1e-3)


def test_pac_bayes_of_a_loss_that_never_rises():
    flat = Point(Weights(CENTRE.clone()), lambda m, b: 1 + 0 * m.w.sum(), [CENTRE])
    found = measure("pac_bayes", flat, rng(), limit=50.0)
    assert not found.converged
    assert found.value == 1 / 50**2
    assert "no sigma up to 50" in found.note


@pytest.fixture
def all_signs(monkeypatch):
    """All 16 matrices of 2 x 2 signs in turn instead of random ones: the mean is then exact."""
    each = itertools.cycle(itertools.product((-1.0, 1.0), repeat=4))

    def signs(like, _):
        assert like.shape == (2, 2)
        return like.new_tensor(next(each)).view(2, 2)

    monkeypatch.setattr("steppe.landscape.measures.relative.signs", signs)
    return {"stderr": 1e-12, "max_probes": 16}


def test_relative_flatness_of_least_squares_is_ridge_regression(all_signs):
    g = generator(1)
    x = torch.randn(20, 2, generator=g, dtype=torch.float64)
    y = torch.randn(20, 1, generator=g, dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    point = Point(model, lambda m, b: F.mse_loss(m(b[0]), b[1]), [(x, y)])
    expected = float(2 * model.weight.detach().square().sum() * x.square().sum(1).mean())
    assert measure("relative_flatness", point, rng(), **all_signs).value == pytest.approx(expected, rel=1e-9)


def test_relative_flatness_against_the_dense_hessian(all_signs):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    g = generator(1)
    x = torch.randn(8, 2, generator=g, dtype=torch.float64)
    point = Point(model, lambda m, b: F.mse_loss(m(b), b[:, :1].sin()), [x[:4], x[4:]])
    w = model[0].weight.detach()
    h = dense_hessian(point)[:6, :6].view(3, 2, 3, 2)
    expected = float((w @ w.T * torch.einsum("sitj,ij->st", h, torch.eye(2).double())).sum())
    found = measure("relative_flatness", point, rng(), layer="0.weight", **all_signs)
    assert found.value == pytest.approx(expected, rel=1e-9)
    with pytest.raises(SpecError, match=r"Did you mean '2\.weight'"):
        measure("relative_flatness", point, rng(), layer="3.weight")


def test_fisher_rao_against_gradients_of_single_samples():
    point, outputs, _ = regression()

    def losses(model, batch):
        return (outputs(model, batch) - batch[1]).square().squeeze(1)

    each = []
    for batch in point.batches:
        for loss in losses(point.model, batch):
            gradient = flatten(torch.autograd.grad(loss, point.params, retain_graph=True))
            each.append(float(point.theta @ gradient) ** 2)
    found = measure("fisher_rao", point, rng(), losses=losses)
    assert found.value == pytest.approx(np.mean(each), rel=1e-7)
    of_batches = sum(
        share * float(point.theta @ point.gradient(batch=i)[1]) ** 2 for i, share in enumerate(point.shares)
    )
    assert measure("fisher_rao", point, rng()).value == pytest.approx(of_batches, rel=1e-7)


@pytest.mark.parametrize("adaptive", [False, True])
def test_local_entropy_of_a_bowl(adaptive):
    rho, beta = 0.1, 60.0
    scale = CENTRE.abs() if adaptive else torch.ones(4, dtype=torch.float64)
    scaled = scale[:, None] * BENT * scale
    expected = float(torch.logdet(torch.eye(4) + beta * rho**2 * scaled)) / (2 * beta)
    found = measure(
        "local_entropy", bowl(BENT), rng(), rho=rho, beta=beta, adaptive=adaptive, steps=480, step=0.1
    )
    assert abs(found.value - expected) < 4 * found.stderr + 0.04 * expected  # 4 %: the step's bias
    assert found.converged, found.note


def test_local_entropy_of_a_stiff_bowl_does_not_run_away():
    found = measure("local_entropy", bowl(1000 * BENT), rng(), rho=0.1, beta=60.0)
    whole = float(torch.logdet(torch.eye(4) + 600 * BENT)) / 120
    assert 0 < found.value < 2 * whole
    assert not found.converged


def test_local_entropy_of_batches_is_that_of_their_mean():
    """Batches pull with gradients that cancel in the mean, which plain batch gradients would not survive."""
    pull = 50 * torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64)

    def loss(model, sign):
        d = model.w - CENTRE
        return 0.5 * d @ BENT @ d + sign[0] * pull @ d

    point = Point(Weights(CENTRE.clone()), loss, [CENTRE.new_tensor([s]) for s in (1.0, -1.0)])
    one = measure("local_entropy", bowl(BENT), generator(5), rho=0.1, beta=60.0, steps=160)
    two = measure("local_entropy", point, generator(6), rho=0.1, beta=60.0, steps=160)
    assert abs(one.value - two.value) < 4 * math.hypot(one.stderr, two.stderr)


def test_basin_width_of_a_bowl():
    point = bowl(BENT)
    lines = random_directions(point, rng(), n=6, normalise="none")
    radii = torch.sqrt(2 * 0.3 / torch.einsum("ni,ij,nj->n", lines, BENT, lines))
    found = measure("basin_width", point, rng(), rise=0.3, lines=6, normalise="none", tol=1e-5)
    assert found.value == pytest.approx(float(radii.log().mean().exp()), rel=1e-5)
    assert found.stderr == pytest.approx(found.value * float(radii.log().std()) / math.sqrt(6), rel=1e-3)
    assert found.converged
    near = measure("basin_width", point, rng(), rise=0.3, lines=6, normalise="none", limit=0.1)
    assert (near.value, near.converged) == (pytest.approx(0.1), False)
    assert "12 of 12 ways" in near.note


def test_barrier_of_two_wells():
    one = torch.ones(1, dtype=torch.float64)
    point = Point(
        Weights(one.clone()), lambda m, b: ((m.w**2 - b) ** 2 + m.w + 1).squeeze(), [one], weights=[1]
    )
    found = measure("barrier", point, rng(), other=-one)
    assert found.value == pytest.approx(1.0)  # the slope between the two ends does not count
    assert found.note == "highest at t = 0.5"
    assert found.cost.forward == 21
    assert measure("barrier", bowl(BENT), rng(), other=CENTRE + 1).value == 0
    with pytest.raises(SpecError, match=r"shape \[4\]"):
        measure("barrier", bowl(BENT), rng(), other=one)


def test_time_dispersion():
    losses = [1.0, 3.0, 2.0, 2.0, 7.0, 9.0]
    point = Point(Weights(torch.zeros(1)), lambda m, b: b + 0 * m.w.sum(), [torch.tensor(v) for v in losses])
    found = measure("time_dispersion", point, rng(), blocks=3)
    assert found.value == pytest.approx(np.std([2, 2, 8], ddof=1))
    assert found.note == f"by chance alone: {math.sqrt((1 + 0 + 1) / 3):.3g}"
    months = ["a", "b", "a", "b", "a", "b"]
    expected = np.std([10 / 3, 14 / 3], ddof=1)
    assert measure("time_dispersion", point, rng(), blocks=months).value == pytest.approx(expected)
    for blocks in (1, 7, ["a", "b"], ["a"] * 6):
        with pytest.raises(SpecError, match="from 2 to 6 blocks"):
            measure("time_dispersion", point, rng(), blocks=blocks)

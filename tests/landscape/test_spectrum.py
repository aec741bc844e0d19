import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from steppe.core.errors import SpecError
from steppe.core.seeding import generator
from steppe.landscape import Cost, Point
from steppe.landscape.hvp import ggn, hessian
from steppe.landscape.spectrum import density, fisher_trace, lambda_max, lanczos, trace

from .points import columns, dense_hessian, factor, quadratic, regression, symmetric

VALUES = [9.0, 4.0, 2.0, 1.0, 0.5, 0.1, 0.0, -0.5, -3.0, -12.0]


def test_lanczos_finds_known_pairs():
    matrix, q = symmetric(VALUES)
    eigen = lanczos(quadratic(matrix), generator(0), k=3, tol=1e-8)
    assert eigen.converged
    assert torch.allclose(eigen.values, torch.tensor(VALUES[:3], dtype=torch.float64))
    assert torch.allclose((eigen.vectors @ q[:, :3]).abs(), torch.eye(3, dtype=torch.float64), atol=1e-6)
    assert eigen.cost == Cost(gradient=2.0 * eigen.hvps)


def test_lanczos_stops_early_and_its_residuals_are_true():
    values = torch.cat([torch.tensor([50.0, 30.0]), torch.linspace(0, 1, 298)])
    matrix, _ = symmetric(values)
    eigen = lanczos(quadratic(matrix), generator(0), k=2, tol=1e-3)
    assert eigen.converged
    assert eigen.hvps < 12
    for value, vector, residual in zip(eigen.values, eigen.vectors, eigen.residuals, strict=True):
        assert float((matrix @ vector - value * vector).norm()) == pytest.approx(float(residual), rel=1e-4)
        assert residual <= 1e-3 * value
    # the value is better than its residual by the square
    assert eigen.values.tolist() == pytest.approx([50.0, 30.0], rel=1e-5)


def test_lanczos_says_when_it_did_not_converge():
    matrix, _ = symmetric(torch.linspace(0.9, 1, 200))
    eigen = lanczos(quadratic(matrix), generator(0), tol=1e-10, max_iter=5)
    assert not eigen.converged
    assert eigen.hvps == 5
    assert 0.9 < float(eigen.values[0]) <= 1


@pytest.mark.parametrize(
    "matrix", [torch.zeros(4, 4), torch.eye(4), torch.diag(torch.tensor([2.0, 0, 0, 0]))]
)
def test_lanczos_goes_on_where_the_krylov_space_ends(matrix):
    eigen = lanczos(quadratic(matrix.double()), generator(0), k=3)
    assert eigen.converged
    assert eigen.values.tolist() == pytest.approx(matrix.diag()[:3].tolist(), abs=1e-12)
    assert torch.allclose(eigen.vectors @ eigen.vectors.T, torch.eye(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("make", [regression, lambda: regression("cross-entropy"), lambda: factor(hidden=4)])
def test_spectrum_of_nets_against_dense_hessians(make):
    point, _, _ = make()
    true = torch.linalg.eigvalsh(dense_hessian(point)).flip(0)
    eigen = lanczos(point, generator(0), k=3, tol=1e-6)
    assert eigen.converged
    assert torch.allclose(eigen.values, true[:3], rtol=1e-6)
    measured = trace(point, generator(0), max_probes=20)
    assert abs(measured.value - float(true.sum())) < 4 * measured.stderr
    top = lambda_max(point, generator(0))
    assert (top.converged, math.isnan(top.stderr)) == (True, True)
    assert top.value == pytest.approx(float(true[0]), rel=1e-3)


def test_float32_gru_by_central_differences_against_float64():
    exact, _, _ = factor(hidden=16)
    point, _, _ = factor(torch.float32, hidden=16)
    true = lanczos(exact, generator(0), tol=1e-8, operator=hessian(exact, "autograd"))
    found = lanczos(point, generator(0), tol=1e-3)
    assert found.converged
    assert float(found.values[0]) == pytest.approx(float(true.values[0]), rel=2e-3)


def test_trace_reaches_the_requested_error_and_costs_what_it_says():
    matrix, _ = symmetric(torch.linspace(0, 1, 60))
    point = quadratic(matrix)
    for stderr in (0.05, 0.02):
        found = trace(point, generator(1), stderr=stderr)
        assert found.converged
        assert found.stderr <= stderr * found.value
        assert abs(found.value - 30) < 4 * found.stderr
        assert found.note == f"{found.cost.gradient / 2:.0f} probes"
    hurried = trace(point, generator(1), stderr=1e-4, max_probes=20)
    assert (hurried.converged, hurried.cost) == (False, Cost(gradient=40.0))


def test_the_standard_error_of_the_trace_is_true():
    # a fixed number of probes (the stop never comes): squared deviations over squared stderr average 1
    matrix, _ = symmetric(torch.linspace(-1, 3, 20))
    point = quadratic(matrix)
    found = [trace(point, generator(s), stderr=1e-9, max_probes=40, operator=matrix.mv) for s in range(60)]
    ratio = sum(((m.value - 20) / m.stderr) ** 2 for m in found) / 60
    assert 0.6 < ratio < 1.6


def test_hutchinson_is_exact_on_diagonal_matrices():
    found = trace(quadratic(torch.diag(torch.arange(5.0).double())), generator(0))
    assert (found.value, found.stderr) == pytest.approx((10.0, 0.0))


def test_hutch_plus_plus_is_exact_up_to_its_rank_and_better_for_decaying_spectra():
    low, _ = symmetric([7.0, 3.0, -2.0] + [0.0] * 27)
    assert trace(quadratic(low), generator(0), method="hutch++").value == pytest.approx(8.0)
    decaying, _ = symmetric([100 / k**2 for k in range(1, 101)])
    point = quadratic(decaying)
    plain = trace(point, generator(0), stderr=0.01)
    better = trace(point, generator(0), stderr=0.01, method="hutch++")
    assert better.cost.gradient < plain.cost.gradient / 3
    assert abs(better.value - float(decaying.trace())) < 4 * better.stderr


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), factor=st.floats(0.01, 100))
def test_rotations_change_nothing_and_factors_scale(seed, factor):
    matrix, _ = symmetric(VALUES)
    _, q = symmetric(VALUES, seed)
    turned = quadratic(factor * q @ matrix @ q.T)
    assert float(lanczos(turned, generator(seed), tol=1e-8).values[0]) == pytest.approx(9 * factor, rel=1e-6)
    found = trace(turned, generator(seed), stderr=10.0, method="hutch++")
    assert found.value == pytest.approx(factor * sum(VALUES), rel=1e-6)


def test_a_rescaled_net_has_another_hessian():
    # ReLU nets compute the same when a layer is doubled and the next halved (Dinh 2017)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 1, bias=False)).double()
    x = torch.randn(9, 3, generator=generator(0), dtype=torch.float64)
    point = Point(model, lambda m, b: m(b).square().mean(), [x])
    before = (point.value(), float(lanczos(point, generator(0)).values[0]))
    with torch.no_grad():
        model[0].weight.mul_(4)
        model[2].weight.div_(4)
    assert point.value() == pytest.approx(before[0])
    assert float(lanczos(point, generator(0)).values[0]) > 4 * before[1]


def test_same_seed_same_bits():
    point, _, _ = factor(torch.float32)
    state = torch.random.get_rng_state()
    for call in (lambda g: lambda_max(point, g), lambda g: trace(point, g, max_probes=12)):
        assert call(generator(5)).value == call(generator(5)).value
    assert torch.equal(torch.random.get_rng_state(), state)


def test_density_integrates_to_one_and_has_the_moments():
    matrix, _ = symmetric(VALUES * 8)
    point = quadratic(matrix)
    found = density(point, generator(0), probes=20, steps=40, operator=matrix.mv)
    step = float(found.grid[1] - found.grid[0])
    assert found.converged
    assert float(found.density.sum()) * step == pytest.approx(1.0, abs=1e-3)
    assert float(found.weights.sum()) == pytest.approx(1.0)
    mean, square = (float((found.weights * found.nodes**power).sum()) for power in (1, 2))
    assert mean == pytest.approx(sum(VALUES) / 10, abs=0.5)
    assert square == pytest.approx(sum(v**2 for v in VALUES) / 10, rel=0.2)
    # the lone eigenvalue -12 is a tenth of all: its peak holds a tenth of the mass
    near = (found.grid + 12).abs() < 5 * found.width
    mass, error = float(found.density[near].sum()) * step, float(found.stderr[near].mean())
    assert mass == pytest.approx(0.1, abs=0.03)
    assert error > 0


def test_density_against_a_dense_hessian():
    point, _, _ = regression()
    hessian = dense_hessian(point)
    found = density(point, generator(0), probes=200, steps=26, width=0.2, operator=hessian.mv)
    true = torch.linalg.eigvalsh(hessian)
    z = (found.grid.unsqueeze(1) - true) / 0.2
    exact = torch.exp(-0.5 * z**2).mean(dim=1) / (0.2 * math.sqrt(2 * math.pi))
    assert float((found.density - exact).abs().max()) < 0.1 * float(exact.max())
    single = density(point, generator(0), probes=1, steps=5)
    assert bool(single.stderr.isnan().all())


def test_ggn_trace_and_top():
    point, outputs, criterion = regression("cross-entropy")
    product = ggn(point, outputs, criterion)
    matrix = columns(product, point)
    found = trace(point, generator(0), max_probes=30, operator=product)
    assert abs(found.value - float(matrix.trace())) < 4 * found.stderr
    top = lambda_max(point, generator(0), operator=product)
    assert top.value == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-3)


def test_ggn_trace_of_squares_is_twice_the_mean_squared_gradient_of_the_output():
    point, outputs, criterion = regression()
    total = 0.0
    for x, _ in point.batches:
        for row in x:
            gradients = torch.autograd.grad(point.model(row).sum(), point.params)
            total += 2 / 11 * sum(float(g.square().sum()) for g in gradients)
    assert float(columns(ggn(point, outputs, criterion), point).trace()) == pytest.approx(total)


def test_fisher_trace_against_single_samples():
    point, _, _ = regression()
    total = 0.0
    for x, y in point.batches:
        for row, target in zip(x, y, strict=True):
            gradients = torch.autograd.grad(F.mse_loss(point.model(row), target), point.params)
            total += sum(float(g.square().sum()) for g in gradients) / 11
    found = fisher_trace(point, generator(0), lambda m, b: (m(b[0]) - b[1]).square()[:, 0], stderr=0.05)
    assert found.converged
    assert abs(found.value - total) < 4 * found.stderr
    assert found.note == f"{found.cost.gradient:.0f} probes"


def test_wrong_requests():
    point, g = quadratic(torch.eye(3)), generator(0)
    for call, message in [
        (lambda: lanczos(point, g, k=4), "from 1 to min"),
        (lambda: lanczos(point, g, k=0), "from 1 to min"),
        (lambda: trace(point, g, method="hutch"), "Did you mean"),
        (lambda: trace(point, g, stderr=0.0), "above 0"),
        (lambda: density(point, g, probes=0), "above 0"),
        (lambda: density(point, g, width=0.0), "above 0"),
    ]:
        with pytest.raises(SpecError, match=message):
            call()


@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_against_curvlinops():
    library = pytest.importorskip("curvlinops", reason="curvlinops is not installed", exc_type=ImportError)
    point, _, _ = regression("cross-entropy")
    matrix = library.HessianLinearOperator(point.model, nn.CrossEntropyLoss(), point.params, point.batches)
    assert torch.allclose(matrix @ point.theta, hessian(point)(point.theta), atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_against_hessian_eigenthings():
    library = pytest.importorskip("hessian_eigenthings", reason="hessian-eigenthings is not installed")
    point, _, _ = regression("cross-entropy", n=12)  # it weights batches equally
    matrix = library.HessianOperator(point.model, point.batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    theirs = library.lanczos(matrix, k=1, which="LA", max_iter=point.dim, tol=1e-8, seed=0)
    ours = lanczos(point, generator(0), tol=1e-6)
    assert float(ours.values[0]) == pytest.approx(float(theirs.eigenvalues[0]), rel=1e-6)

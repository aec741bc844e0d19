import pytest
import torch
from torch import nn
from torch.nn import functional as F

from steppe.core.errors import SpecError
from steppe.core.seeding import generator
from steppe.landscape import Cost, Point
from steppe.landscape.hvp import default_step, ggn, hessian, hvp
from steppe.landscape.spectrum import lanczos

from .points import columns, dense_hessian, factor, quadratic, regression, symmetric

METHODS = ["central", "autograd", "forward_over_reverse"]


def direction(point, seed=0):
    return torch.randn(point.dim, generator=generator(seed, "v"), dtype=torch.float64).to(point.theta.dtype)


def error(found, true):
    return float((found - true).norm() / true.norm())


@pytest.mark.parametrize("method", METHODS)
def test_quadratic(method):
    matrix, _ = symmetric([5.0, -2.0, 1.0, 0.0])
    point, v = quadratic(matrix), torch.tensor([1.0, -3.0, 0.5, 2.0], dtype=torch.float64)
    assert torch.allclose(hvp(point, v, method), matrix @ v, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["mse", "cross-entropy"])
def test_net_over_ragged_batches(method, kind):
    point, _, _ = regression(kind)
    v = direction(point)
    assert error(hvp(point, v, method), dense_hessian(point) @ v) < (1e-8 if method == "central" else 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_projects_gru_in_float64(method):
    point, _, _ = factor(hidden=4)
    v = direction(point)
    assert error(hvp(point, v, method), dense_hessian(point) @ v) < (1e-7 if method == "central" else 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_the_projects_gru_in_float32(method):
    # torch.func takes nn.GRU, central differences the native kernels where they are installed
    exact, _, _ = factor()
    point, _, _ = factor(torch.float32)
    v = direction(exact)
    true = hvp(exact, v, "forward_over_reverse")
    assert error(hvp(point, v.float(), method).double(), true) < (2e-3 if method == "central" else 1e-5)


def test_default_step_serves_random_and_sharp_directions():
    exact, _, _ = factor()
    point, _, _ = factor(torch.float32)
    product, step = hessian(exact, "autograd"), default_step(point.theta)
    sharp = lanczos(exact, generator(0), tol=1e-4, operator=product).vectors[0]
    worst = {}
    for c in (0.03, 1, 30):
        central = hessian(point, "central", c * step)
        worst[c] = max(error(central(v.float()).double(), product(v)) for v in (direction(exact), sharp))
    assert worst[1] < 2e-3
    assert worst[1] < 0.2 * min(worst[0.03], worst[30]), worst


def test_default_method():
    point, _, _ = factor(hidden=4)
    v = direction(point)
    assert torch.equal(hvp(point, v), hvp(point, v, "central"))
    point, _, _ = regression()
    v = direction(point)
    assert torch.equal(hvp(point, v), hvp(point, v, "autograd"))


@pytest.mark.parametrize("method", METHODS)
def test_linear_and_symmetric(method):
    point, _, _ = regression()
    u, v = direction(point, 1), direction(point, 2)
    product = hessian(point, method)
    assert torch.allclose(product(3 * u), 3 * product(u), rtol=1e-6, atol=1e-8)
    assert float(u @ product(v)) == pytest.approx(float(v @ product(u)), rel=1e-6)
    assert torch.equal(product(torch.zeros_like(v)), torch.zeros_like(v))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind(method):
    point, _, _ = regression()
    point.model.train()
    theta, before = point.theta, point.cost
    hvp(point, direction(point), method)
    assert torch.equal(point.theta, theta)
    assert all(p.grad is None for p in point.params)
    assert point.model.training
    assert point.cost - before == Cost(gradient=2.0)


@pytest.mark.parametrize("method", METHODS[1:])
def test_attention(method):
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True).double()
    x = torch.randn(2, 5, 8, generator=generator(0), dtype=torch.float64)
    point = Point(model, lambda m, b: m(b).pow(3).mean(), [x])
    v = direction(point)
    assert error(hvp(point, v, method), hvp(point, v, "central")) < 1e-6


def test_wrong_requests():
    point, v = quadratic(torch.eye(2)), torch.ones(2)
    with pytest.raises(SpecError, match="Did you mean 'central'"):
        hvp(point, v, "centre")
    with pytest.raises(SpecError, match="has none"):
        hvp(point, v, "autograd", eps=0.1)


def gauss_newton(point, outputs, criterion):
    """Dense ``Σ share J' H J`` from jacobians of the whole."""
    total = 0
    for share, batch in zip(point.shares, point.batches, strict=True):

        def flat_outputs(theta, batch=batch):
            parts = theta.split([p.numel() for p in point.params])
            weights = {n: t.view(p.shape) for n, t, p in zip(point.names, parts, point.params, strict=True)}
            return torch.func.functional_call(point.model, weights, (batch[0],)).reshape(-1)

        jacobian = torch.autograd.functional.jacobian(flat_outputs, point.theta)
        out = outputs(point.model, batch).detach()
        curvature = torch.autograd.functional.hessian(
            lambda o, out=out, batch=batch: criterion(o.view_as(out), batch), out.reshape(-1)
        )
        total = total + share * jacobian.T @ curvature @ jacobian
    return total


@pytest.mark.parametrize("make", [regression, lambda: regression("cross-entropy"), lambda: factor(hidden=4)])
def test_ggn(make):
    point, outputs, criterion = make()
    before = point.cost
    assert (
        error(columns(ggn(point, outputs, criterion), point), gauss_newton(point, outputs, criterion)) < 1e-10
    )
    assert point.cost - before == Cost(gradient=2.0 * point.dim)


def test_ggn_of_a_linear_model_is_its_hessian():
    torch.manual_seed(0)
    x = torch.randn(6, 3, generator=generator(0), dtype=torch.float64)
    y = torch.randn(6, 1, generator=generator(1), dtype=torch.float64)
    point = Point.from_loader(nn.Linear(3, 1).double(), nn.MSELoss(), [(x, y)])
    product = ggn(point, lambda m, b: m(b[0]), lambda out, b: F.mse_loss(out, b[1]))
    assert error(columns(product, point), dense_hessian(point)) < 1e-12

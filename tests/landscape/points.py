"""Points whose curvature is known, and dense matrices by other means."""

import torch
from torch import nn
from torch.nn import functional as F

from steppe.core.seeding import generator
from steppe.landscape import Point
from steppe.quant.factor_model import GRUFactor, ic_loss


class Weights(nn.Module):
    """A vector of weights and no more."""

    def __init__(self, start):
        super().__init__()
        self.w = nn.Parameter(start)


def quadratic(matrix, start=None):
    """``w' A w / 2``: the Hessian is `matrix` everywhere."""
    start = torch.ones(len(matrix), dtype=matrix.dtype) if start is None else start
    return Point(Weights(start), lambda model, a: 0.5 * model.w @ a @ model.w, [matrix], weights=[1])


def symmetric(values, seed=0):
    """A matrix of these eigenvalues in random directions, and the directions (columns)."""
    values = torch.as_tensor(values, dtype=torch.float64)
    q, _ = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=generator(seed, "q"), dtype=values.dtype)
    )
    return q * values @ q.T, q


def regression(kind="mse", dtype=torch.float64, n=11):
    """A small net over batches of 4, 4 and the rest; (point, outputs, criterion)."""
    torch.manual_seed(1)
    outs = 3 if kind == "cross-entropy" else 1
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outs)).to(dtype)
    g = generator(2)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64).to(dtype)
    y = (
        torch.randint(3, (n,), generator=g)
        if outs == 3
        else torch.randn(n, 1, generator=g, dtype=torch.float64).to(dtype)
    )
    function = F.cross_entropy if outs == 3 else _mean_square

    def outputs(model, batch):
        return model(batch[0])

    def criterion(out, batch):
        return function(out, batch[1])

    batches = list(zip(x.split(4), y.split(4), strict=True))
    return Point(model, lambda m, b: criterion(outputs(m, b), b), batches), outputs, criterion


def _mean_square(out, y):
    return (out - y).square().mean()  # torch's forward mode does not take F.mse_loss


def factor(dtype=torch.float64, hidden=16, stocks=12):
    """The project's GRU under minus the IC of two cross-sections; (point, outputs, criterion)."""
    torch.manual_seed(3)
    model = GRUFactor(hidden, 1, 3).to(dtype)
    g = generator(4)
    batches = [
        (
            torch.randn(5, stocks, 3, generator=g, dtype=torch.float64).to(dtype),
            torch.randn(stocks, generator=g, dtype=torch.float64).to(dtype),
        )
        for _ in range(2)
    ]

    def outputs(model, batch):
        return model(batch[0])

    def criterion(out, batch):
        return ic_loss(out, batch[1])

    point = Point(model, lambda m, b: criterion(outputs(m, b), b), batches, weights=[1, 1])
    return point, outputs, criterion


def dense_hessian(point):
    """``[dim, dim]`` by torch.autograd.functional, of the loss over all batches."""

    def loss(theta):
        parts = theta.split([p.numel() for p in point.params])
        weights = {n: t.view(p.shape) for n, t, p in zip(point.names, parts, point.params, strict=True)}
        root = _Root(point)
        return torch.func.functional_call(root, {f"model.{n}": t for n, t in weights.items()}, ())

    return torch.autograd.functional.hessian(loss, point.theta)


class _Root(nn.Module):
    def __init__(self, point):
        super().__init__()
        self.model, self.point = point.model, point

    def forward(self):
        p = self.point
        return sum(s * p.loss(self.model, b) for s, b in zip(p.shares, p.batches, strict=True))


def columns(operator, point):
    """The matrix of an operator, column by column."""
    return torch.stack([operator(e) for e in torch.eye(point.dim, dtype=point.theta.dtype)], dim=1)

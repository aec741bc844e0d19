"""Exactness that needs no golden files: random problems, both bases, cycling batches, against slow numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from steppe.optim import create

from . import oracles

BASES = {
    "sgd": ("sgd", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}),
    "adamw": ("adamw", {"lr": 1e-2, "weight_decay": 1e-2}),
}
VARIANTS = {
    "sam": ("sam", {"rho": 0.1}),
    "sam-adaptive": ("sam", {"rho": 0.5, "adaptive": True}),
    "asam": ("asam", {"rho": 0.5, "eta": 0.01}),
    "asam-eta0": ("asam", {"rho": 1.0, "eta": 0.0}),
    "gsam": ("gsam", {"rho": 0.1, "alpha": 0.4}),
    "gsam-adaptive": ("gsam", {"rho": 1.0, "alpha": 0.4, "adaptive": True}),
    "gsam-adaptive-paper": ("gsam", {"rho": 0.3, "alpha": 0.4, "adaptive": True, "form": "paper"}),
    "gsam-clean": ("gsam", {"rho": 0.1, "alpha": 0.7, "minimize": "clean"}),
    "gam": ("gam", {"rho": 0.2, "rho_prime": 0.02, "alpha": 0.6, "beta": 0.3, "gamma": 0.05}),
    "gam-paper": (
        "gam",
        {"rho": 0.2, "rho_prime": 0.02, "alpha": 0.6, "beta": 0.3, "gamma": 0.05, "form": "paper"},
    ),
    "fsam": ("friendly_sam", {"rho": 0.1, "sigma": 1.0, "lmbda": 0.9}),
    "fsam-sigma": ("friendly_sam", {"rho": 0.1, "sigma": 0.5, "lmbda": 0.6}),
    "fsam-paper": ("friendly_sam", {"rho": 0.1, "sigma": 1.0, "lmbda": 0.6, "form": "paper"}),
    "fsam-paper-sigma": ("friendly_sam", {"rho": 0.1, "sigma": 0.5, "lmbda": 0.6, "form": "paper"}),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_oracle(variant: str, base: str, seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(4, 6, 3, generator=stream, dtype=torch.float64)
    y = torch.randn(4, 6, 2, generator=stream, dtype=torch.float64)
    params = list(net.parameters())
    start = torch.randn(sum(p.numel() for p in params), generator=stream, dtype=torch.float64)
    nn.utils.vector_to_parameters(start, params)
    key, hyper = VARIANTS[variant]
    base_key, base_hyper = BASES[base]
    optimizer = create(key, net.named_parameters(), base=base_key, **hyper, **base_hyper)

    def loss(batch: int) -> torch.Tensor:
        return (net(x[batch]) - y[batch]).square().mean()

    def gradient_on(batch: int) -> oracles.Gradient:
        shapes = {name: p.shape for name, p in net.named_parameters()}

        def gradient(w: np.ndarray) -> np.ndarray:
            flat = torch.from_numpy(w).requires_grad_()
            pieces = flat.split([shape.numel() for shape in shapes.values()])
            weights = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
            value = (torch.func.functional_call(net, weights, x[batch]) - y[batch]).square().mean()
            return torch.autograd.grad(value, flat)[0].numpy()

        return gradient

    if key == "asam":
        is_weight = [np.full(p.numel(), "weight" in name) for name, p in net.named_parameters()]
        hyper = {**hyper, "is_weight": np.concatenate(is_weight)}
    w, memory, base_memory = start.numpy().copy(), {}, {}
    for step in range(12):
        batch = step % 4
        handed = getattr(oracles, key)(memory, w, gradient_on(batch), **hyper)
        w = getattr(oracles, base_key)(base_memory, w, handed, **base_hyper)

        def closure(batch: int = batch) -> torch.Tensor:
            optimizer.zero_grad()
            value = loss(batch)
            value.backward()
            return value

        optimizer.step(closure)
        got = nn.utils.parameters_to_vector(params).detach().numpy()
        np.testing.assert_allclose(got, w, rtol=0, atol=1e-10, err_msg=f"after step {step}")


@pytest.mark.parametrize("base", BASES)
def test_groups_share_the_norm_and_keep_their_rho(base: str) -> None:
    stream = torch.Generator().manual_seed(3)
    first, second = (nn.Parameter(torch.randn(4, generator=stream, dtype=torch.float64)) for _ in range(2))
    matrix = torch.randn(8, 8, generator=stream, dtype=torch.float64)
    matrix = matrix @ matrix.T
    base_key, hyper = BASES[base]
    groups = [{"params": [first], "rho": 0.05}, {"params": [second], "rho": 0.4}]
    optimizer = create("sam", groups, base=base_key, **hyper)
    w = torch.cat([first, second]).detach().numpy().copy()
    rho = np.repeat([0.05, 0.4], 4)
    memory: dict = {}

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        both = torch.cat([first, second])
        value = both @ matrix @ both / 2
        value.backward()
        return value

    for _ in range(10):
        w = getattr(oracles, base_key)(
            memory, w, oracles.sam({}, w, lambda at: matrix.numpy() @ at, rho=rho), **hyper
        )
        optimizer.step(closure)
    np.testing.assert_allclose(torch.cat([first, second]).detach().numpy(), w, rtol=1e-10)

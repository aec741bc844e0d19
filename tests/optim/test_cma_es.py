"""CMA-ES: one step against the tutorial, its invariances, restarts, bounds, what it reaches and where it stops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from steppe.core.errors import SpecError
from steppe.optim.gradient_free import restarts as runs
from steppe.optim.gradient_free.cma_es import CMAES
from steppe.optim.gradient_free.populations import reflect
from steppe.optim.gradient_free.strategy import default_population, strategy


def sphere(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def ellipsoid(x: Tensor) -> Tensor:
    powers = torch.linspace(0, 6, x.shape[-1], dtype=x.dtype)
    return (10**powers * x.square()).sum(-1)


def rosenbrock(x: Tensor) -> Tensor:
    head, tail = x[..., :-1], x[..., 1:]
    return (100 * (tail - head**2) ** 2 + (1 - head) ** 2).sum(-1)


def rastrigin(x: Tensor) -> Tensor:
    return (10 + x**2 - 10 * torch.cos(2 * math.pi * x)).sum(-1)


def search(start: Tensor, kind: type[CMAES] = CMAES, **hyper: Any) -> CMAES:
    return kind([torch.nn.Parameter(start.clone())], **hyper)


def spend(optimizer: CMAES, fn: Callable[[Tensor], Tensor], evaluations: int, goal: float = -math.inf) -> int:
    """Evaluations used until the budget, the goal or the end."""
    used = 0
    while used < evaluations and optimizer.best_value > goal and not optimizer.finished:
        theta = optimizer.ask()
        optimizer.tell(fn(theta))
        used += len(theta)
    return used


def tutorial(m: dict[str, Any], z: np.ndarray, values: np.ndarray, separable: bool) -> dict[str, Any]:
    """Figure 6 and table 1 of arXiv:1604.00772 in loops, C^(-1/2) by an eigendecomposition of its own.

    The separable form's step size is that of two points.
    """
    lam, n = z.shape
    mu = lam // 2
    raw = [math.log((lam + 1) / 2) - math.log(i) for i in range(1, lam + 1)]
    mueff = sum(raw[:mu]) ** 2 / sum(w * w for w in raw[:mu])
    mueff_minus = sum(raw[mu:]) ** 2 / sum(w * w for w in raw[mu:])
    csigma = (mueff + 2) / (n + mueff + 5)
    dsigma = 1 + 2 * max(0, math.sqrt((mueff - 1) / (n + 1)) - 1) + csigma
    cc = (4 + mueff / n) / (n + 4 + 2 * mueff / n)
    c1 = 2 / ((n + 1.3) ** 2 + mueff)
    cmu = min(1 - c1, 2 * (0.25 + mueff + 1 / mueff - 2) / ((n + 2) ** 2 + mueff))
    if separable:
        c1, cmu = c1 * (n + 2) / 3, min(1 - c1 * (n + 2) / 3, cmu * (n + 2) / 3)
    alpha = min(1 + c1 / cmu, 1 + 2 * mueff_minus / (mueff + 2), (1 - c1 - cmu) / (n * cmu))
    positive, negative = sum(w for w in raw if w > 0), -sum(w for w in raw if w < 0)
    w = [r / positive if r >= 0 else alpha * r / negative for r in raw]

    cov = m["cov"].numpy()
    cov = np.diag(cov) if separable else cov
    spectrum, vectors = np.linalg.eigh(cov)
    half = vectors @ np.diag(np.sqrt(spectrum)) @ vectors.T
    inverse = vectors @ np.diag(1 / np.sqrt(spectrum)) @ vectors.T
    order = sorted(range(lam), key=lambda k: values[k])
    y = [half @ z[k] for k in order]
    step = sum(w[i] * y[i] for i in range(mu))
    sigma, g = m["sigma"], m["age"] + 1
    p_sigma = (1 - csigma) * m["path_s"].numpy() + math.sqrt(csigma * (2 - csigma) * mueff) * inverse @ step
    expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
    norm = float(np.linalg.norm(p_sigma))
    growth = csigma / dsigma * (norm / expected - 1)
    two_points = {}
    if separable:
        trend = 0.0
        if m["shift"].any():
            ranks = [sum(values < values[i]) for i in (0, 1)]
            q = (ranks[1] - ranks[0]) / (lam - 1)
            trend = 0.7 * m["trend"] + 0.3 * np.sign(q) * abs(q) ** 0.5
            assert z[0] == pytest.approx(-z[1])
            assert inverse @ m["shift"].numpy() / np.linalg.norm(
                inverse @ m["shift"].numpy()
            ) == pytest.approx(z[0] / np.linalg.norm(z[0]))
        growth = trend / (0.7 + 2 * math.log(n))
        two_points = {"trend": trend, "shift": sigma * step}
    h = float(norm / math.sqrt(1 - (1 - csigma) ** (2 * g)) < (1.4 + 2 / (n + 1)) * expected)
    p_c = (1 - cc) * m["path_c"].numpy() + h * math.sqrt(cc * (2 - cc) * mueff) * step
    rank = np.zeros((n, n))
    for i in range(lam):
        scale = 1.0 if w[i] >= 0 else n / float(np.linalg.norm(inverse @ y[i]) ** 2)
        rank += w[i] * scale * np.outer(y[i], y[i])
    new = (1 + c1 * (1 - h) * cc * (2 - cc) - c1 - cmu * sum(w)) * cov + c1 * np.outer(p_c, p_c) + cmu * rank
    return {
        "mean": m["mean"].numpy() + sigma * step,
        "path_s": p_sigma,
        "path_c": p_c,
        "sigma": sigma * math.exp(growth),
        "cov": np.diag(new) if separable else new,
        **two_points,
    }


@pytest.mark.parametrize("covariance", ["full", "separable"])
@pytest.mark.parametrize("population", [None, 5, 40])
def test_every_step_is_the_tutorials(covariance: str, population: int | None) -> None:
    start = torch.tensor([3.0, -2.0, 0.5, 9.0], dtype=torch.float64)
    optimizer = search(start, covariance=covariance, population=population, sigma=0.3)
    for _ in range(30):
        theta, z = optimizer.ask(), optimizer.draw()
        values = rosenbrock(theta)
        expected = tutorial(optimizer.memory, z.numpy(), values.numpy(), covariance == "separable")
        optimizer.tell(values)
        for name, value in expected.items():
            np.testing.assert_allclose(optimizer.memory[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_defaults_are_the_tutorials() -> None:
    assert [default_population(n) for n in (2, 5, 10, 20, 100)] == [6, 8, 10, 12, 17]
    s = strategy(10, 10)
    assert float(s.weights[:5].sum()) == pytest.approx(1)
    assert s.weights[5:].max() < 0
    assert strategy(10, 10, separable=True).c1 == pytest.approx(4 * s.c1)
    assert strategy(1000, 24).gap > 1
    assert s.gap == 1


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(3, 200), st.booleans())
def test_covariance_keeps_its_trace_and_its_sign(dim: int, population: int, separable: bool) -> None:
    """Weights and rates let no negative update take more than there is (section B.2 of the tutorial)."""
    s = strategy(dim, population, separable)
    assert 0 <= s.c1 <= 1
    assert 0 <= s.cmu <= 1 - s.c1
    taken = -float(s.weights[s.parents :].sum()) * s.cmu * dim
    assert taken <= 1 - s.c1 - s.cmu + 1e-12
    assert 0 < s.cs < 1
    assert 0 < s.cc < 1 + 1e-12


class Rotated(CMAES):
    """Draws the same numbers, rotated."""

    rotation: Tensor

    def draw(self) -> Tensor:
        return super().draw() @ self.rotation.T


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000), st.integers(2, 8))
def test_does_not_see_a_rotation(seed: int, dim: int) -> None:
    """With start, loss and draws rotated, the whole path is the rotated path: the root of C is the symmetric one."""
    stream = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=stream, dtype=torch.float64))[0]
    start = torch.randn(dim, generator=stream, dtype=torch.float64)
    plain, turned = search(start, seed=seed), search(rotation @ start, Rotated, seed=seed)
    turned.rotation = rotation
    for _ in range(25):
        first, second = plain.ask(), turned.ask()
        torch.testing.assert_close(second, first @ rotation.T, rtol=1e-6, atol=1e-8)
        plain.tell(ellipsoid(first))
        turned.tell(ellipsoid(second @ rotation))
    torch.testing.assert_close(
        turned.memory["cov"], rotation @ plain.memory["cov"] @ rotation.T, rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("covariance", ["full", "separable"])
@pytest.mark.parametrize("transform", [lambda f: 8 * f - 3, torch.arcsinh, lambda f: -1 / (1 + f)])
def test_does_not_see_an_increasing_transform(covariance: str, transform: Callable[[Tensor], Tensor]) -> None:
    start = torch.full((5,), 2.0, dtype=torch.float64)
    plain, other = (search(start, covariance=covariance, seed=4, tolfun=0.0) for _ in range(2))
    for _ in range(60):
        theta = plain.ask()
        assert theta.equal(other.ask())
        plain.tell(rosenbrock(theta))
        other.tell(transform(rosenbrock(theta)))


@pytest.mark.parametrize(
    ("fn", "dim", "hyper", "evaluations"),
    [
        (sphere, 10, {}, 3000),
        (sphere, 1, {}, 1000),
        (ellipsoid, 8, {}, 6000),
        (ellipsoid, 20, {"covariance": "separable"}, 9000),
        (rosenbrock, 6, {"sigma": 0.3}, 8000),
        (rastrigin, 3, {"restarts": "ipop", "sigma": 2.0}, 40_000),
        (rastrigin, 3, {"restarts": "bipop", "bounds": (-5.0, 5.0)}, 40_000),
    ],
)
def test_reaches_the_minimum(fn: Any, dim: int, hyper: dict[str, Any], evaluations: int) -> None:
    for seed in (1, 2):
        optimizer = search(torch.full((dim,), 1.7, dtype=torch.float64), seed=seed, **hyper)
        spend(optimizer, fn, evaluations, goal=1e-8)
        assert optimizer.best_value <= 1e-8


def test_finds_a_minimum_on_the_bounds() -> None:
    optimizer = search(torch.full((4,), 3.0, dtype=torch.float64), bounds=([1.0, -9, 1, -math.inf], math.inf))
    spend(optimizer, sphere, 4000)
    assert optimizer.best is not None
    torch.testing.assert_close(
        optimizer.best, torch.tensor([1.0, 0, 1, 0], dtype=torch.float64), rtol=0, atol=1e-5
    )


@settings(deadline=None)
@given(
    st.floats(-1e3, 1e3),
    st.sampled_from([(-1.0, 2.0), (0.0, math.inf), (-math.inf, 3.0), (-math.inf, math.inf)]),
)
def test_reflects_as_in_a_mirror(x: float, bounds: tuple[float, float]) -> None:
    low, high = (torch.tensor([bound], dtype=torch.float64) for bound in bounds)
    got = float(reflect(torch.tensor([x], dtype=torch.float64), low, high))
    expected = x
    while not bounds[0] <= expected <= bounds[1]:
        expected = 2 * bounds[0] - expected if expected < bounds[0] else 2 * bounds[1] - expected
    assert got == (x if expected == x else pytest.approx(expected, abs=1e-9))


def test_starts_as_wide_as_the_bounds_say() -> None:
    optimizer = search(torch.zeros(3, dtype=torch.float64), bounds=([-1.0, -10, -math.inf], [1.0, 10, 5]))
    optimizer.ask()
    deviations = optimizer.memory["sigma"] * optimizer.memory["cov"].diagonal().sqrt()
    torch.testing.assert_close(deviations, torch.tensor([0.6, 6.0, 0.5], dtype=torch.float64))


def test_says_why_it_ended() -> None:
    bowl = search(torch.ones(3, dtype=torch.float64))
    spend(bowl, sphere, 10_000)
    assert bowl.finished == "losses equal within tolfun"
    flat = search(torch.ones(3, dtype=torch.float64))  # widens to get off
    spend(flat, lambda x: torch.ones(len(x)), 10_000)
    assert flat.finished == "distribution diverges"
    slope = search(torch.ones(3, dtype=torch.float64))
    spend(slope, lambda x: x.sum(1), 100_000)
    assert slope.finished == "distribution diverges"
    narrow = search(torch.ones(3, dtype=torch.float64), tolx=1e-3)
    spend(narrow, lambda x: x.norm(dim=1), 10_000)
    assert narrow.finished == "distribution smaller than tolx"
    noise = search(torch.ones(3, dtype=torch.float64))
    stream = torch.Generator().manual_seed(0)
    spend(noise, lambda x: torch.rand(len(x), generator=stream), 200_000)
    assert noise.finished == "losses stagnate"


def test_restarts_follow_their_papers() -> None:
    draws = torch.tensor([0.5, 0.25], dtype=torch.float64)
    first = runs.Run(10)
    spent = {"large": 0, "small": 900, "last": 0}
    assert runs.after(first, "none", 10, 5, spent, draws) is None
    large = runs.after(first, "bipop", 10, 5, spent, draws)
    assert large is not None
    assert (large.population, large.large, large.spread) == (20, True, 1.0)
    assert large.generations == 100 + math.floor(50 * 64 / math.sqrt(20))
    eighth = runs.Run(80, doublings=3, large=True)
    small = runs.after(eighth, "bipop", 10, 5, {"large": 9000, "small": 900, "last": 4000}, draws)
    assert small is not None
    assert (small.population, small.large) == (int(10 * 4**0.25), False)
    assert small.spread == pytest.approx(10**-0.5)
    assert small.generations == 4000 // (2 * small.population)
    assert small.doublings == 3
    last = runs.Run(5120, doublings=runs.MOST_DOUBLINGS, large=True)
    assert runs.after(last, "ipop", 10, 5, spent, draws) is None


def test_bipop_spends_alike_on_both_kinds() -> None:
    optimizer = search(torch.ones(2, dtype=torch.float64), restarts="bipop", bounds=(-5.0, 5.0))
    spend(optimizer, lambda x: rastrigin(x) + 1, 12_000)
    spent = optimizer.memory["spent"]
    assert optimizer.memory["restart"] > 3
    assert 0.3 < spent["small"] / spent["large"] < 3


def test_a_full_covariance_has_its_limits() -> None:
    weights = [torch.nn.Parameter(torch.zeros(100_000))]
    with pytest.raises(SpecError, match=r"160 GB.*covariance='separable'.*MB"):
        CMAES(weights)
    wide = CMAES(weights, covariance="separable", population=4)
    wide.step(lambda: weights[0].square().sum())
    assert wide.memory["cov"].shape == (100_000,)
    grown = CMAES([torch.nn.Parameter(torch.zeros(1500))])
    grown.add_param_group({"params": [torch.nn.Parameter(torch.zeros(600))]})
    with pytest.raises(SpecError, match="2,100 weights"):
        grown.ask()


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"population": 2}, "at least 3"),
        ({"covariance": "ful"}, "Did you mean 'full'"),
        ({"restarts": "bi-pop"}, "Did you mean 'bipop'"),
    ],
)
def test_says_what_is_wrong(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        search(torch.zeros(2), **hyper)

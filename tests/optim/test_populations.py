"""Particle swarms and differential evolution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from steppe.core.checkpoint import load_tree, save_tree
from steppe.core.errors import SpecError
from steppe.core.seeding import generator
from steppe.optim import PSO, DifferentialEvolution, create
from steppe.optim.gradient_free.differential_evolution import others
from steppe.optim.gradient_free.pso import neighbourhood_best

SEARCHES = [
    ("pso", {}),
    ("pso", {"topology": "ring", "walls": "absorb"}),
    ("pso", {"topology": "ring", "velocity_limit": 5.0}),
    ("differential_evolution", {}),
    ("differential_evolution", {"strategy": "rand1bin", "mutation": 2.0, "crossover": 1.0}),
]
every = pytest.mark.parametrize(("key", "hyper"), SEARCHES)


def search(key, hyper, dim=3, start=0.0, **more):
    weights = torch.nn.Parameter(torch.full((dim,), start, dtype=torch.float64))
    return create(key, [weights], **{"population": 8, **hyper, **more})


def sphere(theta):
    return theta.square().sum(1)


def rosenbrock(theta):
    return (100 * (theta[:, 1:] - theta[:, :-1] ** 2) ** 2 + (1 - theta[:, :-1]) ** 2).sum(1)


def ran(optimizer, function, steps):
    for _ in range(steps):
        optimizer.tell(function(optimizer.ask()))
    return optimizer


sides = st.floats(-1e100, 1e100) | st.floats(-2, 2)


@st.composite
def boxes(draw):
    """Bounds of three weights; some are missing."""
    low, high = [], []
    for _ in range(3):
        a, b = sorted(draw(st.lists(sides, min_size=2, max_size=2, unique=True)))
        low.append(draw(st.sampled_from([a, -math.inf])))
        high.append(draw(st.sampled_from([b, math.inf])))
    return low, high


@every
@settings(max_examples=20)
@given(
    bounds=boxes(),
    start=sides,
    spread=st.none() | st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**40),
    losses=st.lists(st.floats(), min_size=9, max_size=9),
)
def test_no_candidate_leaves_the_bounds_whatever_the_losses_are(
    key, hyper, bounds, start, spread, seed, losses
):
    optimizer = search(key, hyper, start=start, spread=spread, bounds=bounds, seed=seed)
    low, high = (torch.tensor(side, dtype=torch.float64) for side in bounds)
    best = math.inf
    for turn in range(8):
        theta = optimizer.ask()
        assert theta.isfinite().all()
        assert ((theta >= low) & (theta <= high)).all()
        told = [losses[(turn * i) % 9] for i in range(1, 9)]
        optimizer.tell(torch.tensor(told, dtype=torch.float64))
        assert optimizer.best_value <= best
        best = min([best, *(loss for loss in told if math.isfinite(loss))])
        assert optimizer.best_value == best


@every
@settings(max_examples=10)
@given(cut=st.integers(0, 12), seed=st.integers(0, 2**40))
def test_a_search_goes_on_where_it_was_saved(key, hyper, cut, seed, tmp_path_factory):
    through = ran(search(key, hyper, bounds=(-3.0, 4.0), seed=seed), rosenbrock, 12)
    saved = ran(search(key, hyper, bounds=(-3.0, 4.0), seed=seed), rosenbrock, cut)
    path = tmp_path_factory.mktemp("search") / "state.safetensors"
    save_tree(path, saved.state_dict())
    resumed = search(key, hyper, bounds=(-3.0, 4.0), seed=seed + 1)
    resumed.load_state_dict(load_tree(path))
    ran(resumed, rosenbrock, 12 - cut)
    assert resumed.best_value == through.best_value
    assert torch.equal(resumed.ask(), through.ask())


@every
@settings(max_examples=10)
@given(seed=st.integers(0, 2**40))
def test_only_the_order_of_losses_counts(key, hyper, seed):
    # powers of two change no rounding, so the order and its ties are the same to the last bit
    plain = ran(search(key, hyper, seed=seed, start=0.5), sphere, 20)
    bent = ran(search(key, hyper, seed=seed, start=0.5), lambda theta: (sphere(theta) * 4).sqrt() - 3, 20)
    if torch.equal(plain.best, bent.best):
        assert torch.equal(plain.ask(), bent.ask())
    steps = ran(search(key, hyper, seed=seed, start=0.5), lambda theta: sphere(theta) * 2.0**40, 20)
    assert torch.equal(plain.ask(), steps.ask())


@every
def test_what_is_asked_stays_until_it_is_told_and_the_global_stream_is_left_alone(key, hyper):
    optimizer = ran(search(key, hyper), sphere, 3)
    before = torch.get_rng_state()
    assert torch.equal(optimizer.ask(), optimizer.ask())
    assert torch.equal(torch.get_rng_state(), before)


@every
def test_the_first_candidate_is_the_start_and_the_rest_is_around_it_or_in_the_box(key, hyper):
    box = ([-100.0, -math.inf, 10.0], [100.0, math.inf, 10.5])
    theta = search(key, hyper, start=3.0, population=200, bounds=box).ask()
    assert theta[0].tolist() == [3.0, 3.0, 10.0]
    assert theta[:, 0].std() > 40
    assert (theta[:, 1] - 3).abs().max() <= 1
    assert (theta[:, 1] - 3).std() > 0.5
    near = search(key, hyper, start=3.0, population=200, bounds=box, spread=0.25).ask()
    assert (near[:, :2] - 3).abs().max() <= 0.25


@pytest.mark.parametrize(("key", "hyper"), [SEARCHES[0], SEARCHES[1], SEARCHES[3]])
def test_finds_the_minimum_of_small_functions(key, hyper):
    found = ran(search(key, hyper, population=20, bounds=(-5.0, 5.0), start=-3.0), sphere, 250)
    assert found.best_value < 1e-8
    found = ran(search(key, hyper, dim=2, population=20, bounds=(-5.0, 5.0), start=-3.0), rosenbrock, 250)
    assert found.best_value < 1e-4
    free = ran(search(key, hyper, population=20, start=3.0), sphere, 250)  # without bounds
    assert free.best_value < 1e-8


@every
def test_a_plateau_and_a_desert_of_nan_are_survived(key, hyper):
    def half(theta):
        return torch.where(theta[:, 0] > 0.5, torch.nan, theta[:, 0].round())

    optimizer = ran(search(key, hyper, start=1.0, spread=2.0), half, 30)
    assert optimizer.best_value <= 0
    empty = ran(search(key, hyper), lambda theta: torch.full((len(theta),), torch.inf), 5)
    assert empty.best_value == math.inf


# -- against the formulas, one number at a time ----------------------------------------------------------------------


def test_pso_is_its_formula():
    low, high = np.array([-1.0, -2.0, 0.0]), np.array([1.0, 0.5, 3.0])
    optimizer = PSO(
        [torch.nn.Parameter(torch.full((3,), 0.25, dtype=torch.float64))],
        population=5,
        topology="ring",
        bounds=(low.tolist(), high.tolist()),
        seed=3,
    )
    x = optimizer.ask().numpy().copy()
    v, own, known = np.zeros_like(x), x.copy(), np.full(5, np.inf)
    for generation in range(12):
        theta = optimizer.ask()
        np.testing.assert_allclose(theta.numpy(), x, rtol=0, atol=1e-12)
        losses = rosenbrock(theta)
        r1, r2 = torch.rand(2, 5, 3, generator=generator(3, "pso", generation), dtype=torch.float64).numpy()
        for i in range(5):
            if losses[i] < known[i]:
                own[i], known[i] = x[i], losses[i]
        for i in range(5):
            around = [i, (i - 1) % 5, (i + 1) % 5]
            leader = min(around, key=lambda j: known[j])
            for j in range(3):
                pull = 1.49618 * (r1[i, j] * (own[i, j] - x[i, j]) + r2[i, j] * (own[leader, j] - x[i, j]))
                limit = 0.5 * (high[j] - low[j])
                v[i, j] = min(max(0.7298 * v[i, j] + pull, -limit), limit)
                x[i, j] += v[i, j]
                if x[i, j] < low[j]:
                    x[i, j], v[i, j] = 2 * low[j] - x[i, j], -v[i, j]
                elif x[i, j] > high[j]:
                    x[i, j], v[i, j] = 2 * high[j] - x[i, j], -v[i, j]
        optimizer.tell(losses)
    assert optimizer.best_value == known.min()


def test_the_constriction_coefficients_are_those_of_clerc_and_kennedy():
    phi = 4.1
    chi = 2 / abs(2 - phi - math.sqrt(phi**2 - 4 * phi))
    defaults = PSO([torch.nn.Parameter(torch.zeros(1))]).defaults
    assert defaults["inertia"] == pytest.approx(chi, abs=1e-4)
    assert defaults["cognitive"] == defaults["social"] == pytest.approx(chi * phi / 2, abs=1e-4)


@pytest.mark.parametrize("strategy", ["best1bin", "rand1bin"])
def test_differential_evolution_is_its_formula(strategy):
    low, high = -0.75, 1.25
    optimizer = DifferentialEvolution(
        [torch.nn.Parameter(torch.full((3,), 0.25, dtype=torch.float64))],
        population=6,
        strategy=strategy,
        bounds=(low, high),
        seed=5,
    )
    members = optimizer.ask().numpy().copy()
    losses = rosenbrock(optimizer.ask()).numpy().copy()
    optimizer.tell(torch.tensor(losses))
    for generation in range(1, 12):
        draws = generator(5, "differential_evolution", generation)
        picked = others(6, 2 if strategy == "best1bin" else 3, draws).numpy()
        factor = 0.5 + 0.5 * torch.rand(1, generator=draws, dtype=torch.float64).item()
        chance = torch.rand(6, 3, generator=draws, dtype=torch.float64).numpy()
        always = torch.randint(3, (6, 1), generator=draws).numpy()[:, 0]
        trials = members.copy()
        for i in range(6):
            r = [losses.argmin(), *picked[:, i]] if strategy == "best1bin" else picked[:, i]
            for j in range(3):
                if chance[i, j] < 0.9 or j == always[i]:
                    y = members[r[0], j] + factor * (members[r[1], j] - members[r[2], j])
                    y = 2 * low - y if y < low else y
                    y = 2 * high - y if y > high else y
                    trials[i, j] = min(max(y, low), high)
        theta = optimizer.ask()
        np.testing.assert_allclose(theta.numpy(), trials, rtol=0, atol=1e-12)
        tried = rosenbrock(theta)
        for i in range(6):
            if tried[i] <= losses[i]:
                members[i], losses[i] = trials[i], tried[i]
        optimizer.tell(tried)
    assert optimizer.best_value == losses.min()


@given(population=st.integers(4, 12), seed=st.integers(0, 2**40))
def test_the_others_differ_from_each_other_and_from_oneself(population, seed):
    drawn = torch.cat([torch.arange(population)[None], others(population, 3, generator(seed))])
    assert ((drawn >= 0) & (drawn < population)).all()
    assert all(len(set(column)) == 4 for column in drawn.T.tolist())


def test_the_others_are_drawn_evenly():
    draws = generator(0, "evenly")
    counts = torch.zeros(5, 5, 5, 5)
    for _ in range(4000):
        drawn = others(5, 3, draws)
        counts[torch.arange(5), drawn[0], drawn[1], drawn[2]] += 1
    seen = counts[counts > 0]
    assert len(seen) == 5 * 4 * 3 * 2
    assert ((seen - 4000 / 24).abs() < 5 * math.sqrt(4000 / 24)).all()


def test_a_ring_knows_its_neighbours():
    best = torch.arange(6.0)[:, None]
    values = torch.tensor([0.0, 5.0, 4.0, 3.0, 2.0, 6.0])
    assert neighbourhood_best(best, values, "ring")[:, 0].tolist() == [0, 0, 3, 4, 4, 0]
    assert neighbourhood_best(best, values, "global")[:, 0].tolist() == [0] * 6
    assert neighbourhood_best(best[:2], values[:2], "ring")[:, 0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("key", "hyper", "words"),
    [
        ("pso", {"population": 1}, "at least 2"),
        ("pso", {"topology": "rings"}, "Did you mean 'ring'"),
        ("pso", {"walls": "bounce"}, "unknown walls"),
        ("pso", {"inertia": -1.0}, "inertia"),
        ("pso", {"velocity_limit": 0.0}, "velocity_limit"),
        ("pso", {"spread": 0.0}, "spread"),
        ("differential_evolution", {"population": 3}, "at least 4"),
        ("differential_evolution", {"strategy": "best2bin"}, "Did you mean 'best1bin'"),
        ("differential_evolution", {"mutation": (1.0, 0.5)}, "mutation"),
        ("differential_evolution", {"crossover": 1.5}, "crossover"),
        ("differential_evolution", {"spread": math.inf}, "spread"),
    ],
)
def test_a_wrong_setting_is_named(key, hyper, words):
    with pytest.raises(SpecError, match=words):
        search(key, hyper)

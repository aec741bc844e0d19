"""Annealing: inside its bounds, Metropolis' rule, and SciPy's numbers."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.core.seeding import derive
from steppe.optim.gradient_free.annealing import Annealing, DualAnnealing

optimize = pytest.importorskip("scipy.optimize")


def rastrigin(theta: Tensor) -> Tensor:
    return (theta**2 - 10 * torch.cos(2 * math.pi * theta) + 10).sum(-1)


def start(*numbers: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(numbers, dtype=torch.float64))


def finish(search: Any, steps: int = 10**9) -> list[Tensor]:
    asked = []
    while not search.finished and len(asked) < steps:
        asked.append(search.ask())
        search.tell(rastrigin(asked[-1]))
    return asked


@settings(max_examples=40, deadline=None)
@given(
    low=st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3),
    width=st.floats(1e-6, 1e6),
    moves=st.sampled_from(["gaussian", "cauchy"]),
    cooling=st.sampled_from(["geometric", "logarithmic"]),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_stays_inside_the_bounds(
    low: list[float], width: float, moves: str, cooling: str, scale: float, seed: int
) -> None:
    lower = torch.tensor(low, dtype=torch.float64)
    search = Annealing(
        [start(0.0, 1.0, -5.0)], (lower, lower + width), moves=moves, cooling=cooling, scale=scale, seed=seed
    )
    for theta in finish(search, 20):
        assert (theta >= lower).all()
        assert (theta <= lower + width).all()


@settings(max_examples=8, deadline=None)
@given(
    low=st.floats(-5, 0),
    width=st.floats(1e-3, 10),
    search=st.sampled_from(["l-bfgs-b", "none"]),
    seed=st.integers(0, 99),
)
def test_dual_annealing_stays_inside_the_bounds(low: float, width: float, search: str, seed: int) -> None:
    annealing = DualAnnealing(
        [start(0.0, 1.0)], (low, low + width), local_search=search, maxiter=10, seed=seed
    )
    for theta in finish(annealing):
        assert (theta >= low).all()
        assert (theta <= low + width).all()


def test_metropolis_rule() -> None:
    """At temperature T a rise of T·ln 2 is accepted half of the time; nothing going down is refused."""
    search = Annealing([start(0.5)], (0.0, 1.0), chains=20_000, initial_temp=2.0, moves="cauchy", rate=0.5)
    search.tell(torch.zeros(20_000))
    search.ask()
    rise = torch.where(torch.arange(20_000) < 10_000, 2.0 * math.log(2), -1.0).double()
    search.tell(rise)
    accepted = search.memory["values"] == rise
    assert accepted[10_000:].all()
    assert abs(float(accepted[:10_000].double().mean()) - 0.5) < 4 * 0.5 / 100
    assert search.coldness() == 0.5


def test_first_temperature_from_the_first_moves_uphill() -> None:
    search = Annealing([start(0.5)], (0.0, 1.0), chains=3)
    search.tell(torch.tensor([1.0, 1.0, 1.0]))
    search.tell(torch.tensor([0.5, 0.0, 1.0]))
    assert search.memory["initial_temp"] is None
    search.tell(torch.tensor([1.5, 3.0, -1.0]))
    assert search.memory["initial_temp"] == pytest.approx(2.0 / math.log(1 / 0.8))


def test_cooling_schedules() -> None:
    for cooling, want in (("geometric", 0.9**5), ("logarithmic", math.log(2) / math.log(7))):
        search = Annealing([start(0.5)], (0.0, 1.0), cooling=cooling, rate=0.9)
        finish(search, 6)
        assert search.coldness() == pytest.approx(want)


def test_ends_frozen_near_a_minimum() -> None:
    search = Annealing([start(4.1, -3.2)], (-5.12, 5.12), rate=0.95)
    while not search.finished:
        search.tell(search.ask().square().sum(1))
    assert "temperature" in search.finished
    assert search.best_value < 1e-6
    assert search.generation == 1 + math.ceil(math.log(1e-12) / math.log(0.95))
    assert float(search.step(lambda: 0.0)) == search.best_value


def test_the_first_chain_begins_at_the_parameters() -> None:
    search = Annealing([start(4.0, -9.0)], (-5.0, 5.0), chains=4)
    assert search.ask()[0].tolist() == [4.0, -5.0]


@pytest.mark.parametrize("cls", [Annealing, DualAnnealing])
def test_wants_finite_bounds(cls: Any) -> None:
    with pytest.raises(SpecError, match=f"{cls.__name__} searches between bounds"):
        cls([start(0.0)])
    with pytest.raises(SpecError, match="both finite"):
        cls([start(0.0)], (0.0, math.inf))


@pytest.mark.parametrize(
    ("cls", "wrong", "says"),
    [
        (Annealing, {"cooling": "geometrc"}, "Did you mean 'geometric'"),
        (Annealing, {"moves": "levy"}, "unknown moves"),
        (Annealing, {"rate": 1.0}, r"rate in \(0, 1\)"),
        (DualAnnealing, {"local_search": "L-BFGS"}, "unknown local_search"),
        (DualAnnealing, {"visit": 3.5}, r"visit in \(1, 3\)"),
    ],
)
def test_says_what_is_wrong(cls: Any, wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        cls([start(0.0)], (0.0, 1.0), **wrong)


@pytest.mark.parametrize("local_search", ["l-bfgs-b", "none"])
@pytest.mark.parametrize("seed", [0, 1])
def test_dual_annealing_is_scipys(local_search: str, seed: int) -> None:
    x0, calls = [4.1, -3.2, 0.7], 0

    def fun(x: Any) -> float:
        nonlocal calls
        calls += 1
        return float(rastrigin(torch.from_numpy(x)))

    stream = np.random.Generator(np.random.PCG64(derive(seed, "dual_annealing")))
    want = optimize.dual_annealing(
        fun, [(-5.12, 5.12)] * 3, maxiter=60, initial_temp=1.0, x0=x0, seed=stream,
        no_local_search=local_search == "none",
    )  # fmt: skip
    search = DualAnnealing(
        [start(*x0)], (-5.12, 5.12), local_search=local_search, maxiter=60, initial_temp=1.0, seed=seed
    )
    asked = finish(search)
    assert search.solution is not None
    assert search.solution[0].tolist() == want.x.tolist()
    assert search.solution[1] == want.fun
    assert sum(map(len, asked)) == want.nfev == calls
    assert search.finished == "Maximum number of iteration reached"


def test_dual_annealing_resumes_inside_a_local_search() -> None:
    search = DualAnnealing([start(4.1, -3.2)], (-5.12, 5.12), maxiter=4)
    while len(search.ask()) == 1:  # until differences are asked for
        search.tell(rastrigin(search.ask()))
    other = copy.deepcopy(search)
    first, second = finish(search), finish(other)
    assert len(first) == len(second)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))

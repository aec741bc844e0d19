"""Kendall's tau against its definition, and its interval against its promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from steppe.study.statistics import FEWEST, kendall

PAIRS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=9)


def slow(x: list[int], y: list[int]) -> float:
    agree = ties_x = ties_y = pairs = 0
    for (a, b), (c, d) in itertools.combinations(zip(x, y, strict=True), 2):
        pairs += 1
        ties_x += a == c
        ties_y += b == d
        if a != c and b != d:
            agree += 1 if (a < c) == (b < d) else -1
    scale = math.sqrt((pairs - ties_x) * (pairs - ties_y))
    return agree / scale if scale else math.nan


def test_by_hand() -> None:
    assert kendall([1, 2, 3, 4], [1, 2, 4, 3]).tau == pytest.approx(4 / 6)
    assert kendall([1, 1, 2, 3], [1, 2, 2, 3]).tau == pytest.approx(4 / 5)


@settings(deadline=None, max_examples=60)
@given(PAIRS)
def test_against_the_definition(pairs: list[tuple[int, int]]) -> None:
    x, y = map(list, zip(*pairs, strict=True))
    found = kendall(x, y, draws=20)
    assert found.tau == pytest.approx(slow(x, y), nan_ok=True)
    mirrored = kendall(x, [-b for b in y], draws=20)
    assert mirrored.tau == pytest.approx(-found.tau, nan_ok=True)
    if math.isfinite(found.low):
        assert -1 <= found.low <= found.high <= 1
        assert 0 < found.p <= 1


def test_few_trials_get_no_interval() -> None:
    found = kendall([1, 2, 3, math.nan, 5], [1, 2, 3, 4, 5])
    assert (found.tau, found.n) == (1, FEWEST - 1)
    assert math.isnan(found.low)
    assert math.isnan(found.p)
    assert math.isnan(kendall([1.0] * 6, range(6)).p)
    with pytest.raises(ValueError, match="equal length"):
        kendall([1, 2], [1, 2, 3])


def test_the_interval_covers_and_chance_is_called_chance() -> None:
    rng = np.random.default_rng(0)
    rho, n, tables = 0.5, 12, 150
    true = 2 / math.pi * math.asin(rho)  # of a bivariate normal
    covered = rejected = 0
    for _ in range(tables):
        x, noise = rng.standard_normal((2, n))
        found = kendall(x, rho * x + math.sqrt(1 - rho**2) * noise, draws=200)
        covered += found.low <= true <= found.high
        rejected += kendall(x, rng.standard_normal(n), draws=200).p <= 0.05
    assert covered / tables > 0.88
    assert rejected / tables < 0.11


def test_a_perfect_order_is_told_from_chance_without_an_interval() -> None:
    # every resample of a perfect order is perfect: an interval [1, 1] would claim certainty
    for n in (5, 7, 8):
        for found, tau in ((kendall(range(n), range(n)), 1), (kendall(range(n), range(n, 0, -1)), -1)):
            assert found.tau == tau
            assert math.isnan(found.low)
            assert math.isnan(found.high)
            assert found.p == pytest.approx(2 / math.factorial(n) if n < 8 else 1 / 2001)


@pytest.mark.parametrize("y", [[2, 1, 4, 3, 5, 6], [1, 1, 2, 3, 3, 4], [6, 5, 1, 2, 4, 3]])
def test_p_of_few_trials_is_exact(y: list[int]) -> None:
    found = kendall(range(6), y)
    taus = [abs(slow(list(range(6)), list(order))) for order in itertools.permutations(y)]
    assert found.p == pytest.approx(sum(tau >= abs(found.tau) - 1e-12 for tau in taus) / 720)
    assert found.low < found.high

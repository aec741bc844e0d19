import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from steppe.core.errors import SpecError
from steppe.quant import ranking
from steppe.quant.neutralise import Neutraliser, neutralised, winsorised

NAN = float("nan")


def market(seed, dates=4, stocks=60):
    """Scores with gaps and wild values, industries with an unknown one, float caps with gaps."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_t(2, (dates, stocks))
    scores[rng.random(scores.shape) < 0.1] = np.nan
    industry = rng.integers(-1, 3, (dates, stocks)).astype(np.int16)
    cap = np.exp(rng.standard_normal((dates, stocks))).astype(np.float32)
    cap[rng.random(cap.shape) < 0.05] = np.nan
    return scores, industry, cap


def slow(scores, industry, cap):
    """One date by dummies and least squares."""
    ok = np.isfinite(scores) & np.isfinite(cap)
    out = np.full(len(scores), NAN)
    x = scores[ok]
    if not len(x):
        return out
    median = np.median(x)
    mad = np.median(np.abs(x - median))
    if mad > 0:
        x = np.clip(x, median - 5 * mad, median + 5 * mad)
    design = np.c_[industry[ok][:, None] == np.arange(-1, 3), np.log(cap[ok].astype(float))]
    out[ok] = x - design @ np.linalg.lstsq(design, x, rcond=None)[0]
    return out


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), stocks=st.sampled_from([3, 12, 60]))
def test_neutralised_is_the_least_squares_residual(seed, stocks):
    scores, industry, cap = market(seed, stocks=stocks)
    got = neutralised(scores, industry, cap)
    for d in range(len(scores)):
        np.testing.assert_allclose(got[d], slow(scores[d], industry[d], cap[d]), atol=1e-9)


def test_a_date_alone_is_what_it_is_among_others(monkeypatch):
    scores, industry, cap = market(0)
    together = neutralised(scores, industry, cap)
    monkeypatch.setattr(ranking, "BLOCK", 1)
    np.testing.assert_allclose(neutralised(scores, industry, cap), together, atol=1e-15)


def test_one_design_serves_every_score():
    _, industry, cap = market(1)
    design = Neutraliser(industry, cap)
    for seed in range(3):
        scores = market(seed)[0]
        np.testing.assert_array_equal(design(scores), neutralised(scores, industry, cap))
        kept = scores.copy()
        design(scores)
        np.testing.assert_array_equal(scores, kept)


def test_winsorised_by_hand():
    got = winsorised([[0, 1, 2, 3, 100, NAN], [5, 5, 5, 9, NAN, NAN], [NAN] * 6])
    np.testing.assert_array_equal(got, [[0, 1, 2, 3, 7, NAN], [5, 5, 5, 9, NAN, NAN], [NAN] * 6])
    np.testing.assert_array_equal(winsorised([[0, 1, 2, 3, 100]], 1), [[1, 1, 2, 3, 3]])
    with pytest.raises(SpecError, match="reach 0"):
        winsorised([[1.0]], 0)


def test_one_wild_score_hardly_moves_the_neutralised_others():
    rng = np.random.default_rng(0)
    scores, cap = rng.standard_normal((1, 50)), np.exp(rng.standard_normal((1, 50)))
    industry, wild = np.zeros((1, 50), np.int16), scores.copy()
    wild[0, 0] = 1e9
    gap = neutralised(wild, industry, cap)[:, 1:] - neutralised(scores, industry, cap)[:, 1:]
    assert np.abs(gap).max() < 1

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from steppe.quant.layers import form_layers, layer_of, staggered_figures, top_figures
from steppe.quant.ranking import ranks

NAN = float("nan")


def test_layers_by_hand():
    np.testing.assert_array_equal(layer_of([[40, 10, NAN, 20, 30]], 2), [[2, 1, 0, 1, 2]])
    np.testing.assert_array_equal(layer_of([[5, 5, 5, 9]], 2), [[1, 1, 1, 2]])
    counts = np.bincount(layer_of([np.random.default_rng(0).standard_normal(103)], 10)[0], minlength=11)[1:]
    assert counts.min() >= 10
    assert counts.max() <= 11


@settings(max_examples=60, deadline=None)
@given(stocks=st.integers(1, 400), layers=st.integers(2, 30), seed=st.integers(0, 2**32))
def test_boundaries_are_those_of_whole_numbers(stocks, layers, seed):
    scores = np.random.default_rng(seed).integers(0, 2 * stocks, stocks)
    twice = (2 * ranks([scores])[0]).astype(int)
    expected = [(r - 1) * layers // (2 * stocks) + 1 for r in twice.tolist()]
    assert layer_of([scores], layers)[0].tolist() == expected


def test_means_and_exchange_by_hand():
    ranked = np.array([[1, 2, 3, 4, 0], [1, 4, 3, 2, 0], [0, 1, 2, 3, 4]], dtype=float)
    returns = np.array([[0.0, 0.1, 0.2, 0.4, NAN], [0.1, 0.1, 0.3, 0.1, 9.0], [NAN, 0.2, 0.2, 0.0, 0.0]])
    layers = form_layers(ranked, 2)
    np.testing.assert_allclose(layers.mean(returns), [[0.175, 0.05, 0.3], [0.15, 0.1, 0.2], [0.1, 0.2, 0]])
    np.testing.assert_allclose(layers.entered(), [[NAN] * 3, [0, 0.5, 0.5], [0.25, 1, 1]])
    # half in stocks 2 and 3, then in 1 and 2, then in 3 and 4
    drifted = np.array([[1.2, 1.4], [1.1, 1.3]]) / [[2.6], [2.4]]
    first = drifted[0, 1] + abs(0.5 - drifted[0, 0]) + 0.5
    assert layers.turnover(returns) == pytest.approx((first + 2) / 2)
    assert np.isnan(form_layers(ranked[:1], 2).turnover(returns[:1]))


def test_figures_of_overlapping_periods_are_means_over_series_without_overlap():
    returns = np.random.default_rng(0).normal(0.01, 0.02, (9, 3))
    returns[4] = NAN
    kept = np.delete(returns, 4, axis=0)
    got = staggered_figures(returns, np.arange(0, 45, 5), 10)
    for key, value in got.items():
        assert value == pytest.approx(np.mean([top_figures(kept[k::2], 10)[key] for k in (0, 1)]))
    assert staggered_figures(kept, np.arange(0, 80, 10), 10) == top_figures(kept, 10)
    assert all(np.isnan(value) for value in staggered_figures(returns[4:5], np.array([7]), 10).values())

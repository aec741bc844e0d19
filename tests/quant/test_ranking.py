import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from slow_statistics import in_both, slow_pearson, slow_rank_ic, slow_ranks

from steppe.quant import ranking
from steppe.quant.ranking import Ordered, correlation, rank_autocorrelation, rank_ic, ranks

NAN = float("nan")
VALUES = [NAN, -2.5, -0.0, 0.0, 0.1, 1.0, 3.0, 7.0]


@st.composite
def arrays(draw, count):
    """`count` arrays of one shape, full of ties and gaps, in either precision."""
    rows, stocks = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    row = st.lists(st.sampled_from(VALUES), min_size=stocks, max_size=stocks)
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return [np.array(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=dtype) for _ in range(count)]


@pytest.fixture(params=[1, 1 << 16], autouse=True, scope="module")
def _block(request):
    """One date per block, so that places are counted across blocks, and all dates in one."""
    whole, ranking.BLOCK = ranking.BLOCK, request.param
    yield
    ranking.BLOCK = whole


@settings(max_examples=60, deadline=None)
@given(arrays(2))
def test_correlations_equal_counting(pair):
    x, y = pair
    known = np.isfinite(x)
    ranked, pearson, spearman = ranks(x), correlation(x, y), rank_ic(x, y)
    for d in range(len(x)):
        assert ranked[d][known[d]].tolist() == slow_ranks(x[d][known[d]].tolist())
        assert np.isnan(ranked[d][~known[d]]).all()
        a, b = in_both(x[d], y[d])
        assert spearman[d] == pytest.approx(slow_rank_ic(a, b), abs=1e-12, nan_ok=True)
        assert pearson[d] == pytest.approx(slow_pearson(a, b), abs=1e-12, nan_ok=True)


@settings(max_examples=40, deadline=None)
@given(arrays(3), st.integers(0, 31))
def test_one_order_serves_every_subset_of_stocks(three, some):
    x, y, third = three
    keep = np.isfinite(x) & (third > 0)
    order = Ordered(x)
    got = order.ranks(keep)
    for d in range(len(x)):
        assert got[d][keep[d]].tolist() == slow_ranks(x[d][keep[d]].tolist())
        assert (got[d][~keep[d]] == 0).all()
    both = keep & np.isfinite(y)
    shared = Ordered(y).rank_ic(order.ranks(both))
    np.testing.assert_array_equal(shared, rank_ic(np.where(both, x, np.nan), y))
    index = np.flatnonzero([some >> d & 1 for d in range(len(x))])
    np.testing.assert_array_equal(order.rows(index).ranks(keep[index]), got[index])


@settings(max_examples=30, deadline=None)
@given(arrays(1))
def test_autocorrelation_is_the_rank_ic_of_neighbouring_rows(one):
    (x,) = one
    got = rank_autocorrelation(Ordered(x), np.isfinite(x))
    np.testing.assert_array_equal(got, rank_ic(x[:-1], x[1:]))


def test_both_precisions_of_the_same_numbers_rank_alike():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, 500)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    x[:, :50] = np.round(x[:, :50])
    x[0, :3] = [np.inf, -np.inf, np.inf]
    np.testing.assert_array_equal(ranks(x), ranks(x.astype(float)))
    negative = np.copysign(np.float32(np.nan), np.float32(-1))  # its bits are below those of -inf
    assert ranks(np.array([[negative, 1, -np.inf]], dtype=np.float32)).tolist()[0][1:] == [2, 1]


def test_rank_ic_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((2, 20, 300))
    y[:, 200:] = np.round(y[:, 200:])
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(rank_ic(x, y), expected, atol=1e-14)


def test_correlation_of_a_constant_row_is_undefined():
    line = [1, 2, 3, 4, 5, 6, 7]
    assert np.isnan(correlation([[0.1] * 7], [line]))[0]
    assert np.isnan(rank_ic([[0.1] * 7], [line]))[0]
    assert correlation([[1e9 + a for a in line]], [line])[0] == pytest.approx(1)
    assert correlation([[1 + 1e-12 * a for a in line]], [line])[0] == pytest.approx(1, abs=1e-3)

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from steppe.core.errors import DataError, SpecError
from steppe.quant import performance as perf
from steppe.quant.factor_test import factor_test, layer_of, neutralised, stderr
from steppe.quant.labels import forward_returns
from steppe.quant.panel import FIELDS, Panel
from steppe.quant.ranking import correlation, rank_ic, ranks

NAN = float("nan")


def make_panel(prices, *, limit_up=None, industry=None, cap=None):
    """A panel whose six fields are all `prices` [T, N]; NaN means no trade."""
    prices = np.asarray(prices, dtype=np.float32)
    off, on = np.zeros(prices.shape, dtype=bool), np.isfinite(prices)
    return Panel(
        name="made",
        simulated=True,
        fingerprint="",
        dates=np.datetime64("2020-01-01") + np.arange(len(prices)),
        symbols=np.array([f"S{i}" for i in range(prices.shape[1])]),
        values=np.repeat(prices[:, :, None], len(FIELDS), axis=2),
        factor=np.where(on, np.float32(1), np.float32("nan")),
        traded=on,
        listed=~off,
        age=np.full(prices.shape, 1000, dtype=np.int32),
        limit_up=off if limit_up is None else limit_up,
        limit_down=off,
        special=off,
        industry=np.zeros(prices.shape, dtype=np.int16) if industry is None else industry,
        float_cap=np.ones(prices.shape, dtype=np.float32) if cap is None else cap,
        industries=("a", "b", "c"),
    )


def random_panel(seed, dates=80, stocks=45, gaps=0.05):
    rng = np.random.default_rng(seed)
    prices = 10 * np.exp(np.cumsum(0.02 * rng.standard_normal((dates, stocks)), axis=0))
    prices[rng.random(prices.shape) < gaps] = np.nan
    return make_panel(
        prices,
        limit_up=(rng.random(prices.shape) < 0.02) & np.isfinite(prices),
        industry=np.broadcast_to(rng.integers(-1, 3, stocks).astype(np.int16), prices.shape),
        cap=np.exp(rng.standard_normal(prices.shape)).astype(np.float32),
    ), rng


def slow_ranks(values):
    """Average ranks by counting."""
    return [sum(b < a for b in values) + (1 + sum(b == a for b in values)) / 2 for a in values]


def slow_pearson(x, y):
    mx, my = sum(x) / len(x), sum(y) / len(y)
    sxy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return sxy / (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5


# labels


def test_forward_returns_by_hand():
    panel = make_panel([[10, 10], [11, NAN], [12, 10], [NAN, 11], [14, NAN], [15, NAN]])
    got = forward_returns(panel, 2)
    assert got.dtype == np.float32
    expected = [
        [0 / 1, NAN],  # 11 -> suspended at the exit, last known price 12
        [14 / 12 - 1, 11 / 10 - 1],  # the second leaves the market: valued at its last price
        [NAN, 0.0],  # the first does not trade at the entry
        [NAN, NAN],
        [NAN, NAN],
        [NAN, NAN],
    ]
    expected[0][0] = 12 / 11 - 1
    np.testing.assert_allclose(got, np.array(expected), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(forward_returns(panel, 2, rows=[1, 4]), got[[1, 4]])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), horizon=st.integers(1, 7))
def test_forward_returns_equal_a_loop_and_know_no_later_date(seed, horizon):
    panel, rng = random_panel(seed, dates=20, stocks=6, gaps=0.3)
    price = panel.field("vwap")
    got = forward_returns(panel, horizon)
    for t in range(20):
        for i in range(6):
            if t + 1 + horizon >= 20 or not panel.traded[t + 1, i]:
                assert np.isnan(got[t, i])
            else:
                known = [p for p in price[t + 1 : t + 2 + horizon, i] if np.isfinite(p)]
                assert got[t, i] == known[-1] / known[0] - 1
    cut = int(rng.integers(1, 20))
    panel.values[cut:] = 1.0
    kept = max(cut - 1 - horizon, 0)
    np.testing.assert_array_equal(forward_returns(panel, horizon)[:kept], got[:kept])


def test_forward_returns_refuses_nonsense():
    panel = make_panel([[1.0], [1.0]])
    with pytest.raises(SpecError, match="horizon 0"):
        forward_returns(panel, 0)
    with pytest.raises(SpecError, match="volume"):
        forward_returns(panel, 1, price="volume")


# the parts


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([NAN, -1.0, 0.0, 0.5, 2.0, 7.0]), min_size=9, max_size=9),
        min_size=2,
        max_size=2,
    )
)
def test_rank_ic_equals_counting(pair):
    x, y = pair
    both = [(a, b) for a, b in zip(x, y, strict=True) if np.isfinite(a) and np.isfinite(b)]
    got = rank_ic([x], [y])[0]
    finite = [a for a in x if np.isfinite(a)]
    np.testing.assert_array_equal(ranks([x])[0][np.isfinite(x)], slow_ranks(finite))
    if len(both) < 2 or len({a for a, _ in both}) == 1 or len({b for _, b in both}) == 1:
        assert np.isnan(got)
    else:
        a, b = zip(*both, strict=True)
        assert got == pytest.approx(slow_pearson(slow_ranks(a), slow_ranks(b)), abs=1e-12)
        assert correlation([x], [y])[0] == pytest.approx(slow_pearson(a, b), abs=1e-12)


def test_correlation_of_a_constant_row_is_undefined():
    assert np.isnan(correlation([[0.1] * 7], [[1, 2, 3, 4, 5, 6, 7]]))[0]


def test_layers_by_hand():
    np.testing.assert_array_equal(layer_of([[40, 10, NAN, 20, 30]], 2), [[2, 1, 0, 1, 2]])
    np.testing.assert_array_equal(layer_of([[5, 5, 5, 9]], 2), [[1, 1, 1, 2]])
    counts = np.bincount(layer_of([np.random.default_rng(0).standard_normal(103)], 10)[0], minlength=11)[1:]
    assert counts.min() >= 10
    assert counts.max() <= 11


def test_neutralised_is_the_least_squares_residual():
    panel, rng = random_panel(3, stocks=60)
    scores = rng.standard_normal((4, 60))
    scores[1, :5] = np.nan
    industry, cap = panel.industry[:4], panel.float_cap[:4].copy()
    cap[2, 7] = np.nan
    got = neutralised(scores, industry, cap)
    for d in range(4):
        ok = np.isfinite(scores[d]) & np.isfinite(cap[d])
        x = scores[d][ok]
        median = np.median(x)
        mad = np.median(np.abs(x - median))
        x = np.clip(x, median - 5 * mad, median + 5 * mad)
        design = np.c_[industry[d][ok][:, None] == np.arange(-1, 3), np.log(cap[d][ok].astype(float))]
        residual = x - design @ np.linalg.lstsq(design, x, rcond=None)[0]
        np.testing.assert_allclose(got[d][ok], residual, atol=1e-9)
        assert np.isnan(got[d][~ok]).all()


def test_one_wild_score_hardly_moves_the_neutralised_others():
    rng = np.random.default_rng(0)
    scores, industry, cap = (
        rng.standard_normal((1, 50)),
        np.zeros((1, 50), np.int16),
        np.exp(rng.standard_normal((1, 50))),
    )
    wild = scores.copy()
    wild[0, 0] = 1e9
    gap = neutralised(wild, industry, cap)[:, 1:] - neutralised(scores, industry, cap)[:, 1:]
    assert np.abs(gap).max() < 1


def test_stderr():
    x = np.random.default_rng(0).standard_normal(500)
    assert stderr(x) == pytest.approx(x.std(ddof=1) / np.sqrt(500))
    overlapping = np.convolve(x, [1, 1], mode="valid")
    assert 1.15 < stderr(overlapping, 1) / stderr(overlapping) < 1.3  # full weight would give sqrt(2)
    assert np.isnan(stderr([1.0]))


# the test itself


def test_perfect_foresight_has_rank_ic_one_and_random_scores_none():
    panel, rng = random_panel(0, dates=400)
    rows = np.arange(0, 385, 5)
    future = forward_returns(panel, 10, rows=rows)
    perfect = factor_test(future, panel, rows, layers=5)
    assert perfect.summary["rank_ic"] == pytest.approx(1)
    assert perfect.summary["rank_ic_positive"] == 1
    assert perfect.summary["top_annual_excess"] > 1
    random = factor_test(rng.standard_normal(future.shape), panel, rows, layers=5)
    assert abs(random.summary["rank_ic"]) < 4 * random.summary["rank_ic_stderr"]
    assert abs(random.summary["rank_ic"]) < 0.08


def test_against_a_slow_loop():
    panel, rng = random_panel(1)
    rows = np.arange(3, 65, 5)
    scores = rng.standard_normal((len(rows), 45)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = np.nan
    test = factor_test(scores, panel, rows, layers=5)
    assert test.skipped.is_empty()
    returns = {h: forward_returns(panel, h) for h in (5, 10)}
    held_before, exchanges = None, []
    for d, t in enumerate(rows):
        ok = np.isfinite(scores[d]) & panel.traded[t + 1] & ~panel.limit_up[t + 1]
        s, label, held = (list(x[ok].astype(float)) for x in (scores[d], returns[10][t], returns[5][t]))
        row = test.ic.row(d, named=True)
        assert row["stocks"] == len(s)
        assert row["ic"] == pytest.approx(slow_pearson(s, label), abs=1e-9)
        assert row["rank_ic"] == pytest.approx(slow_pearson(slow_ranks(s), slow_ranks(label)), abs=1e-9)
        assert row["rank_ic_5"] == pytest.approx(slow_pearson(slow_ranks(s), slow_ranks(held)), abs=1e-9)
        groups = [[] for _ in range(5)]
        for r, h in zip(slow_ranks(s), held, strict=True):
            groups[min(int((r - 0.5) / len(s) * 5), 4)].append(h)
        of_date = test.layers.filter(pl.col("date") == row["date"])
        assert of_date["layer"].to_list() == [0, 1, 2, 3, 4, 5]
        np.testing.assert_allclose(of_date["ret"], [np.mean(held), *map(np.mean, groups)], atol=1e-9)
        top = {
            i for i, r in zip(np.flatnonzero(ok), slow_ranks(s), strict=True) if (r - 0.5) / len(s) * 5 >= 4
        }
        weight = {i: 1 / len(top) for i in top}
        if held_before is not None:
            exchanges.append(
                sum(abs(weight.get(i, 0) - held_before.get(i, 0)) for i in {*weight, *held_before})
            )
        grown = {i: w * (1 + returns[5][t, i]) for i, w in weight.items()}
        held_before = {i: w / sum(grown.values()) for i, w in grown.items()}
    frame = test.layers.pivot(on="layer", index="date", values="ret")
    best, universe = frame["5"].to_numpy(), frame["0"].to_numpy()
    excess, k = best - universe, len(rows)
    s = test.summary
    assert s["top_annual_return"] == pytest.approx(np.prod(1 + best) ** (252 / (5 * k)) - 1)
    assert s["top_annual_excess"] == pytest.approx(np.prod(1 + excess) ** (252 / (5 * k)) - 1)
    assert s["top_tracking_error"] == pytest.approx(np.std(excess, ddof=1) * np.sqrt(252 / 5))
    assert s["top_information_ratio"] == pytest.approx(s["top_annual_excess"] / s["top_tracking_error"])
    assert s["top_turnover"] == pytest.approx(np.mean(exchanges))
    assert s["rank_ic_ir"] == pytest.approx(test.ic["rank_ic"].mean() / test.ic["rank_ic"].std())
    neutral = neutralised(
        np.where(panel.traded[rows + 1] & ~panel.limit_up[rows + 1], scores, np.nan),
        panel.industry[rows],
        panel.float_cap[rows],
    )
    np.testing.assert_allclose(test.ic["rank_ic_neutral"], rank_ic(neutral, returns[10][rows]), atol=1e-12)
    by_neutral = factor_test(neutral, panel, rows, layers=5).layers
    assert factor_test(scores, panel, rows, layers=5, neutralise=True).layers.equals(by_neutral)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_only_the_order_of_scores_counts_and_not_that_of_stocks(seed):
    panel, rng = random_panel(seed, dates=40)
    rows = np.array([2, 7, 12, 20])
    scores = rng.standard_normal((4, 45))
    base = factor_test(scores, panel, rows, layers=4)
    bent = factor_test(np.exp(3 * scores) - 5, panel, rows, layers=4)
    assert bent.ic["rank_ic"].equals(base.ic["rank_ic"])
    assert bent.layers.equals(base.layers)
    order = rng.permutation(45)
    planes = {
        name: getattr(panel, name)[:, order]
        for name in ("values", "factor", "traded", "listed", "age", "limit_up", "industry", "float_cap")
    }
    mixed = Panel(**vars(panel) | planes)
    other = factor_test(scores[:, order], mixed, rows, layers=4)
    for frame in ("ic", "layers"):
        for name in getattr(base, frame).columns[1:]:
            np.testing.assert_allclose(getattr(other, frame)[name], getattr(base, frame)[name], atol=1e-12)
    assert other.summary == pytest.approx(base.summary)


def test_later_dates_change_nothing_that_is_known():
    panel, rng = random_panel(9)
    rows = np.arange(0, 60, 5)
    scores = rng.standard_normal((len(rows), 45))
    before = factor_test(scores, panel, rows, layers=4)
    panel.values[51:] = 1.0  # entries up to t + 11 <= 50 are known
    panel.traded[51:] = True
    panel.float_cap[51:] = 7.0
    after = factor_test(scores, panel, rows, layers=4)
    known = int((rows + 11 <= 50).sum())
    assert known >= 8
    assert after.ic[:known].equals(before.ic[:known])
    assert after.layers[: 5 * known].equals(before.layers[: 5 * known])


def test_layers_never_overlap_on_daily_dates():
    panel, rng = random_panel(4)
    rows = np.arange(10, 40)
    test = factor_test(rng.standard_normal((30, 45)), panel, rows, layers=4)
    assert len(test.ic) == 30
    days = test.layers["date"].unique().sort().to_numpy()
    np.testing.assert_array_equal(days, panel.dates[[10, 15, 20, 25, 30, 35]])


def test_what_is_skipped_is_listed():
    panel, rng = random_panel(6, dates=40)
    rows = np.array([5, 10, 15, 20, 33])
    scores = rng.standard_normal((5, 45))
    scores[1, 5:] = np.nan
    scores[2] = 1.0
    test = factor_test(scores, panel, rows, layers=4)
    listed = {(str(d), m): r for d, m, r in test.skipped.iter_rows()}
    few, tied, end = (str(panel.dates[t]) for t in (10, 15, 33))
    assert "8 needed" in listed[few, "rank_ic"]
    assert "8 needed" in listed[few, "layers"]
    assert "tied" in listed[tied, "rank_ic"]
    assert "after the panel" in listed[end, "rank_ic"]
    assert (end, "rank_ic_5") not in listed
    assert test.ic["rank_ic"].is_null().to_list() == [False, True, True, False, True]
    assert test.summary["layer_dates"] == 3


def test_a_panel_without_float_caps_can_be_tested():
    panel, rng = random_panel(7, dates=40)
    panel.float_cap[:] = np.nan
    rows = np.array([5, 10, 15])
    test = factor_test(rng.standard_normal((3, 45)), panel, rows, layers=4)
    assert np.isnan(test.summary["rank_ic_neutral"])
    assert np.isfinite(test.summary["rank_ic"])
    assert set(test.skipped["measure"]) == {"rank_ic_neutral"}
    with pytest.raises(DataError, match="layers cannot be formed"):
        factor_test(rng.standard_normal((3, 45)), panel, rows, layers=4, neutralise=True)


def test_bad_input_is_refused():
    panel, rng = random_panel(8, dates=40)
    scores = rng.standard_normal((2, 45))
    with pytest.raises(DataError, match="expected"):
        factor_test(scores[:, :4], panel, [1, 6])
    with pytest.raises(DataError, match="increase strictly"):
        factor_test(scores, panel, [6, 1])
    with pytest.raises(DataError, match="integer indices"):
        factor_test(scores, panel, [0.5, 1.5])
    with pytest.raises(DataError, match="2020-01-07 are infinite"):
        factor_test(np.where(np.arange(2)[:, None] == 1, np.inf, scores), panel, [1, 6])
    with pytest.raises(DataError, match="on any of 2 dates"):
        factor_test(scores, panel, [1, 6], layers=40)
    with pytest.raises(SpecError, match="layers 1"):
        factor_test(scores, panel, [1, 6], layers=1)


# performance


def test_performance_by_hand():
    returns, benchmark = [0.10, -0.20, 0.25], [0.05, 0.0, 0.05]
    np.testing.assert_allclose(perf.net_value(returns), [1.1, 0.88, 1.1])
    assert perf.annual_return(returns, 3) == pytest.approx(0.1)
    assert perf.annual_return(returns, 6) == pytest.approx(0.21)
    assert perf.max_drawdown(returns) == pytest.approx(0.2)
    assert perf.max_drawdown([-0.1, 0.5]) == pytest.approx(0.1)  # the starting value counts as a peak
    assert perf.annual_excess(returns, benchmark, 3) == pytest.approx(1.05 * 0.8 * 1.2 - 1)
    assert perf.tracking_error(returns, benchmark, 4) == pytest.approx(2 * np.std([0.05, -0.2, 0.2], ddof=1))
    ratio = perf.annual_excess(returns, benchmark, 4) / perf.tracking_error(returns, benchmark, 4)
    assert perf.information_ratio(returns, benchmark, 4) == pytest.approx(ratio)
    assert perf.calmar(returns, benchmark, 3) == pytest.approx((1.05 * 0.8 * 1.2 - 1) / 0.2)
    dates = np.array(["2020-01-30", "2020-01-31", "2020-02-03"], dtype="datetime64[D]")
    np.testing.assert_allclose(perf.monthly_returns(returns, dates), [-0.12, 0.25])
    assert perf.monthly_win_rate(returns, benchmark, dates) == 0.5


def test_performance_at_the_edges():
    assert perf.annual_return([-1.0, 0.5]) == -1
    assert np.isnan(perf.volatility([0.1]))
    assert np.isnan(perf.information_ratio([0.1, 0.1], [0.1, 0.1]))
    assert np.isnan(perf.calmar([0.1, 0.1], [0.0, 0.0]))
    with pytest.raises(DataError, match="finite"):
        perf.net_value([0.1, NAN])
    with pytest.raises(DataError, match="the periods must be the same"):
        perf.tracking_error([0.1], [0.1, 0.2])
    with pytest.raises(DataError, match="2 dates"):
        perf.monthly_returns([0.1], np.array(["2020-01-01", "2020-01-02"], dtype="datetime64[D]"))

from fractions import Fraction
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st
from panels import make_panel
from slow_statistics import in_both, slow_pearson, slow_rank_ic, slow_ranks

from steppe.core.errors import DataError, SpecError
from steppe.quant import performance as perf
from steppe.quant.factor_test import FactorTester, factor_test, stderr
from steppe.quant.labels import forward_returns
from steppe.quant.neutralise import neutralised
from steppe.quant.panel import FIELDS, Panel
from steppe.quant.ranking import rank_ic

NAN = float("nan")


def panel_of(prices, *, limit_up=None, industry=None, cap=None):
    """A panel whose six fields are all `prices` [T, N]; NaN means no trade."""
    prices = np.asarray(prices, dtype=np.float32)
    given = {"limit_up": limit_up, "industry": industry, "float_cap": cap}
    return make_panel(
        prices.shape,
        dates=np.datetime64("2020-01-01") + np.arange(len(prices)),
        traded=np.isfinite(prices),
        values=np.repeat(prices[:, :, None], len(FIELDS), axis=2),
        **{name: plane for name, plane in given.items() if plane is not None},
    )


def random_panel(seed, dates=80, stocks=45, gaps=0.05):
    rng = np.random.default_rng(seed)
    prices = 10 * np.exp(np.cumsum(0.02 * rng.standard_normal((dates, stocks)), axis=0))
    prices[rng.random(prices.shape) < gaps] = np.nan
    return panel_of(
        prices,
        limit_up=(rng.random(prices.shape) < 0.02) & np.isfinite(prices),
        industry=np.broadcast_to(rng.integers(-1, 3, stocks).astype(np.int16), prices.shape),
        cap=np.exp(rng.standard_normal(prices.shape)).astype(np.float32),
    ), rng


# labels


def test_forward_returns_by_hand():
    panel = panel_of([[10, 10], [11, NAN], [12, 10], [NAN, 11], [14, NAN], [15, NAN]])
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
                assert got[t, i] == (known[-1] - known[0]) / known[0]
    cut = int(rng.integers(1, 20))
    panel.values[cut:] = 1.0
    kept = max(cut - 1 - horizon, 0)
    np.testing.assert_array_equal(forward_returns(panel, horizon)[:kept], got[:kept])


def test_forward_returns_refuses_nonsense():
    panel = panel_of([[1.0], [1.0]])
    with pytest.raises(SpecError, match="horizon 0"):
        forward_returns(panel, 0)
    with pytest.raises(SpecError, match="volume"):
        forward_returns(panel, 1, price="volume")


# the parts


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


def slow_series(scores, returns, statistic, least):
    """The statistic of every date that has enough stocks."""
    pairs = [in_both(*rows) for rows in zip(scores, returns, strict=True)]
    return [statistic(*pair) for pair in pairs if len(pair[0]) >= least]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), layers=st.sampled_from([2, 3]), ties=st.booleans())
def test_what_else_is_measured_against_loops(seed, layers, ties):
    panel, rng = random_panel(seed, dates=50, stocks=30, gaps=0.2)
    rows = np.arange(2, 45, 4)
    scores = rng.standard_normal((len(rows), 30))
    scores[rng.random(scores.shape) < 0.2] = np.nan
    scores[4, 3:] = np.nan  # too few
    scores[6] = 1.0
    if ties:
        scores = np.round(scores * 3)
    test = factor_test(scores, panel, rows, layers=layers, horizon=9, holding=4, horizons=(1, 9, 15))
    open_tomorrow = panel.traded[rows + 1] & ~panel.limit_up[rows + 1]
    x = np.where(open_tomorrow, scores, np.nan)

    for horizon, mean, error, dates in test.decay.iter_rows():
        series = slow_series(x, forward_returns(panel, horizon, rows=rows), slow_rank_ic, 2 * layers)
        series = [value for value in series if np.isfinite(value)]
        assert dates == len(series)
        assert mean == pytest.approx(np.mean(series), abs=1e-12)
        assert error == pytest.approx(stderr(series, -(-horizon // 4) - 1), rel=1e-9)
    assert test.decay["horizon"].to_list() == [1, 9, 15]
    assert test.decay["rank_ic"][1] == pytest.approx(test.summary["rank_ic"])

    ic = [
        value
        for value in slow_series(x, forward_returns(panel, 9, rows=rows), slow_pearson, 2 * layers)
        if np.isfinite(value)
    ]
    assert test.summary["ic_std"] == pytest.approx(np.std(ic, ddof=1))
    assert test.summary["ic_ir"] == pytest.approx(np.mean(ic) / np.std(ic, ddof=1))
    assert test.summary["ic_positive"] == np.mean([value > 0 for value in ic])
    assert test.summary["ic_stderr"] == pytest.approx(stderr(ic, 2))

    again = [slow_rank_ic(*in_both(*pair)) for pair in pairwise(scores)]
    again = [value for value in again if np.isfinite(value)]
    assert test.summary["rank_autocorrelation"] == pytest.approx(np.mean(again), abs=1e-12)

    before = None
    for date in test.layers["date"].unique(maintain_order=True):
        d = int(np.searchsorted(panel.dates[rows], np.datetime64(date)))
        stocks = [i for i in range(30) if np.isfinite(x[d, i])]
        rank = dict(zip(stocks, slow_ranks([x[d, i] for i in stocks]), strict=True))
        member = {0: set(stocks)} | {k: set() for k in range(1, layers + 1)}
        for i in stocks:
            member[int(Fraction(2 * rank[i] - 1) * layers / (2 * len(stocks))) + 1].add(i)
        long = forward_returns(panel, 9, rows=rows[d : d + 1])[0].astype(float)
        of_date = test.layers.filter(pl.col("date") == date)
        for _, layer, _, later, entered in of_date.iter_rows():
            inside = member[layer]
            expected = np.mean([long[i] for i in inside])
            assert later == (pytest.approx(expected, abs=1e-9) if np.isfinite(expected) else None)
            share = len(inside - before[layer]) / len(inside) if before else None
            assert entered == pytest.approx(share, abs=1e-12)
        before = member


def test_years_are_those_of_the_dates():
    panel, rng = random_panel(2, dates=500)
    rows = np.arange(0, 480, 5)
    scores = rng.standard_normal((len(rows), 45))
    test = factor_test(scores, panel, rows, layers=4)
    assert test.yearly["year"].to_list() == [2020, 2021]
    assert test.yearly["dates"].sum() == len(rows)
    year = pl.col("date").dt.year() == 2021
    ic, layers = test.ic.filter(year), test.layers.filter(year)
    best, universe = (layers.filter(pl.col("layer") == k)["ret"].to_numpy() for k in (4, 0))
    row = test.yearly.row(1, named=True)
    assert row["rank_ic"] == pytest.approx(ic["rank_ic"].mean())
    assert row["ic"] == pytest.approx(ic["ic"].mean())
    assert row["rank_ic_ir"] == pytest.approx(ic["rank_ic"].mean() / ic["rank_ic"].std())
    assert row["top_annual_excess"] == pytest.approx(perf.annual_excess(best, universe, 252 / 5))
    assert row["top_information_ratio"] == pytest.approx(perf.information_ratio(best, universe, 252 / 5))


def test_a_longer_holding_period_is_the_mean_over_both_weeks_it_can_start_in():
    panel, rng = random_panel(3, dates=200)
    rows = np.arange(0, 180, 5)
    test = factor_test(rng.standard_normal((len(rows), 45)), panel, rows, layers=4)
    best, universe = (test.layers.filter(pl.col("layer") == k)["ret_10"].to_numpy() for k in (4, 0))
    year = 252 / 10
    for key, figure in (
        ("excess", perf.annual_excess),
        ("return", lambda ours, _, year: perf.annual_return(ours, year)),
    ):
        halves = [figure(best[k::2], universe[k::2], year) for k in (0, 1)]
        assert test.summary[f"top_annual_{key}_10"] == pytest.approx(np.mean(halves))


def test_one_tester_serves_every_factor():
    panel, rng = random_panel(5)
    rows = np.arange(3, 65, 5)
    tester = FactorTester(panel, rows, layers=5, neutralise=True)
    for missing in (0.0, 0.3):
        scores = rng.standard_normal((len(rows), 45)).astype(np.float32)
        scores[rng.random(scores.shape) < missing] = np.nan
        kept = scores.copy()
        shared, alone = tester.test(scores), factor_test(scores, panel, rows, layers=5, neutralise=True)
        for name in ("ic", "decay", "layers", "yearly", "skipped"):
            assert getattr(shared, name).equals(getattr(alone, name))
        assert shared.summary == alone.summary
        np.testing.assert_array_equal(scores, kept)


def test_twenty_layers():
    panel, rng = random_panel(1)
    test = factor_test(rng.standard_normal((5, 45)), panel, np.arange(0, 25, 5), layers=20)
    assert test.layers["layer"].unique().to_list() == list(range(21))


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

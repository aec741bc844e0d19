import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from steppe.core.errors import SpecError
from steppe.quant.panel import FIELDS
from steppe.quant.sources import simulated
from steppe.quant.sources.simulated import REAL_EFFECTS, planted_effects, simulated_market

PLANES = [f.name for f in dataclasses.fields(simulated_market(0, 30, "2015-01-05", "2015-01-09"))]


def assert_same(a, b, dates):
    for name in PLANES:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray) and x.ndim >= 2:
            np.testing.assert_array_equal(x[:dates], y[:dates], err_msg=name)
    for kind in ("members", "weights", "benchmarks"):
        for name, plane in getattr(a, kind).items():
            np.testing.assert_array_equal(plane[:dates], getattr(b, kind)[name][:dates])


def raw(panel, field):
    return panel.field(field).astype(np.float64) / panel.factor


def reference(panel):
    """The reference price of each bar: the last close before it, dividends and splits taken out, in cents."""
    adjusted = panel.field("close").astype(np.float64)
    last = np.maximum.accumulate(np.where(panel.traded, np.arange(len(adjusted))[:, None], 0), axis=0)
    before = np.full_like(adjusted, np.nan)
    before[1:] = np.take_along_axis(adjusted, last, axis=0)[:-1]
    return np.round(100 * before / panel.factor)


def test_the_same_arguments_give_the_same_bits_whatever_the_global_generator_does():
    first = simulated_market(5, 40, "2016-01-01", "2016-06-30")
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    second = simulated_market(5, 40, "2016-01-01", "2016-06-30")
    assert_same(first, second, len(first.dates))
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    other = simulated_market(6, 40, "2016-01-01", "2016-06-30")
    assert other.fingerprint != first.fingerprint
    assert not np.array_equal(other.values, first.values, equal_nan=True)


def test_a_later_end_leaves_earlier_dates_bit_identical():
    short = simulated_market(2, 50, "2016-03-01", "2016-09-15")
    long = simulated_market(2, 50, "2016-03-01", "2017-03-31")
    assert len(long.dates) > len(short.dates)
    assert_same(short, long, len(short.dates))


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32), stocks=st.integers(30, 60), start=st.dates())
def test_a_panel_is_consistent(seed, stocks, start):
    start = np.datetime64(start.replace(year=2000 + start.year % 30, day=min(start.day, 28)), "D")
    panel = simulated_market(seed, stocks, str(start), str(start + 120))
    bars = dict(zip(FIELDS, np.moveaxis(panel.values, 2, 0), strict=True))
    on = panel.traded
    assert panel.simulated
    assert panel.name == "simulated market"
    assert np.is_busday(panel.dates).all()
    assert (np.isfinite(panel.values).all(axis=2) == on).all()
    assert (np.isfinite(panel.factor) == on).all()
    assert (on <= panel.listed).all()
    assert (bars["low"] <= np.minimum(bars["open"], bars["close"]))[on].all()
    assert (bars["high"] >= np.maximum(bars["open"], bars["close"]))[on].all()
    assert ((bars["low"] <= bars["vwap"]) & (bars["vwap"] <= bars["high"]))[on].all()
    assert (bars["volume"][on] > 0).all()
    assert (panel.factor[on] >= 1).all()
    assert (np.isfinite(panel.float_cap) == panel.listed).all()
    assert ((panel.age >= 0) >= panel.listed).all()
    assert set(np.unique(panel.industry)) <= set(range(len(panel.industries)))
    planes = list(panel.members.values())
    assert (sum(plane.astype(int) for plane in planes) <= 1).all()
    assert (np.logical_or.reduce(planes) <= panel.listed).all()
    for name, weight in panel.weights.items():
        np.testing.assert_allclose(weight.sum(axis=1), 1, rtol=1e-5)
        assert ((weight > 0) == panel.members[name]).all()


def test_prices_lie_on_the_grid_and_within_limits_that_bind(small_market):
    on = small_market.traded
    base = reference(small_market)
    up, down = np.floor(base * 1.1 + 0.5 + 1e-6), np.floor(base * 0.9 + 0.5 + 1e-6)
    for field in ("open", "high", "low", "close"):
        cents = 100 * raw(small_market, field)
        np.testing.assert_allclose(cents[on], np.round(cents[on]), atol=0.01)
        known = on & np.isfinite(base)
        assert (np.round(cents)[known] <= up[known]).all()
        assert (np.round(cents)[known] >= down[known]).all()
    opened = np.round(100 * raw(small_market, "open"))
    known = np.isfinite(base) & on
    np.testing.assert_array_equal(small_market.limit_up[known], (opened >= up)[known])
    np.testing.assert_array_equal(small_market.limit_down[known], (opened <= down)[known])
    assert small_market.limit_up.any()
    high, low = (np.round(100 * raw(small_market, name)) for name in ("high", "low"))
    np.testing.assert_array_equal(small_market.sealed_up[known], (low >= up)[known])
    np.testing.assert_array_equal(small_market.sealed_down[known], (high <= down)[known])
    assert (small_market.sealed_up <= small_market.limit_up).all()
    assert small_market.sealed_up.any()
    assert small_market.sealed_down.any()
    assert (np.round(100 * raw(small_market, "close")) == up)[known].mean() > 0.002
    assert (np.round(100 * raw(small_market, "close")) == down)[known].mean() > 0.002


def test_the_market_has_suspensions_listings_dividends_and_a_rebalanced_index(small_market):
    off = small_market.listed & ~small_market.traded
    assert 0.01 < off.sum() / small_market.listed.sum() < 0.12
    assert small_market.listed[-1].sum() > small_market.listed[0].sum()
    assert np.nanmax(small_market.factor) > 1.005
    months = small_market.dates.astype("datetime64[M]").astype(int)
    for plane in small_market.members.values():
        joined = np.flatnonzero((plane[1:] & ~plane[:-1]).any(axis=1)) + 1
        assert len(joined)
        assert (months[joined] % 6 == 0).all()
        assert (months[joined] != months[joined - 1]).all()
    large, mid, small = (
        np.nanmedian(np.where(m, small_market.float_cap, np.nan)) for m in small_market.members.values()
    )
    assert large > mid > small


def test_the_delisted_have_been_listed_and_never_return():
    panel = simulated_market(1, 60, "2013-01-01", "2019-12-31")
    assert panel.delisted.any()
    assert not (panel.delisted & panel.listed).any()
    assert (panel.delisted[:-1] <= panel.delisted[1:]).all()
    assert (panel.age[panel.delisted] >= 0).all()
    np.testing.assert_array_equal(panel.delisted, (panel.age >= 0) & ~panel.listed)


def test_benchmarks_are_price_indices(small_market):
    for name, level in small_market.benchmarks.items():
        assert level[0] == 1000
        for t in range(1, len(level)):
            held = small_market.members[name][t] & small_market.listed[t - 1]
            before, now = (small_market.float_cap[s, held].astype(np.float64).sum() for s in (t - 1, t))
            assert level[t] / level[t - 1] == pytest.approx(now / before, rel=1e-5)


def test_members_are_chosen_from_the_past():
    panel = simulated_market(4, 60, "2016-01-01", "2017-12-29")
    first_of_july = int(np.argmax(panel.dates >= np.datetime64("2017-07-01")))
    mean = panel.float_cap[first_of_july - 126 : first_of_july].astype(np.float64).mean(axis=0)
    best = np.argsort(-mean)[: round(0.09 * 60)]
    np.testing.assert_array_equal(np.flatnonzero(panel.members["SIM-L"][first_of_july]), np.sort(best))


def test_planted_effects_are_of_the_measured_size(monkeypatch):
    """Without the daily noise of style returns, which 40 full panels averaged out in the calibration."""
    monkeypatch.setattr(simulated, "PREMIUM_NOISE", np.zeros(5))
    panels = [simulated_market(seed, 250, "2014-01-01", "2016-12-31") for seed in (11, 12)]
    means = {name: np.mean([planted_effects(panel)[name] for panel in panels]) for name in REAL_EFFECTS}
    assert means == pytest.approx(REAL_EFFECTS, abs=0.02)


def test_bad_arguments():
    with pytest.raises(SpecError, match="at least 30"):
        simulated_market(stocks=5)
    with pytest.raises(SpecError, match="seed -1"):
        simulated_market(seed=-1)
    with pytest.raises(SpecError, match="no session between"):
        simulated_market(start="2015-01-10", end="2015-01-11")
    with pytest.raises(SpecError, match="more than 264"):
        planted_effects(simulated_market(0, 30, "2015-01-05", "2015-02-27"))

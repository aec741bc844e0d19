"""The backtest against the same in slow Python, by hand, and by what it must not depend on."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from panels import make_panel
from slow_backtest import slow_backtest

from steppe.core.errors import DataError, SpecError
from steppe.quant.backtest import backtest, fill

CLOSE, VWAP = 3, 4
SEEDS = st.integers(0, 2**32 - 1)


def rough_market(seed, sessions=48, stocks=7, contradictory=False):
    """A panel with suspensions in spells, sealed limits and delistings; with bars after delisting if asked."""
    rng = np.random.default_rng(seed)
    shape = (sessions, stocks)
    begins = rng.random(shape) < 0.06
    suspended = np.zeros(shape, bool)
    for lag in range(int(rng.integers(1, 12))):
        suspended[lag:] |= begins[: sessions - lag]
    delisted = np.cumsum(rng.random(shape) < 0.008, axis=0) > 0
    traded = ~suspended & (~delisted | contradictory)
    sealed = rng.random(shape)
    return make_panel(
        shape,
        seed=int(rng.integers(1000)),
        traded=traded,
        delisted=delisted,
        sealed_up=traded & (sealed < 0.1),
        sealed_down=traded & (sealed > 0.9),
    )


def random_decisions(seed, invested=None):
    """Targets of row t that depend on nothing but t and what is held: some stocks, some as they are, some cash."""

    def decide(row, held):
        rng = np.random.default_rng([seed, row])
        target = rng.random(len(held)) * (rng.random(len(held)) < 0.5)
        target /= max(target.sum(), 1e-9)
        target *= rng.choice([1.0, rng.random()]) if invested is None else invested
        keep = rng.random()
        return keep * held + (1 - keep) * target if rng.random() < 0.3 else target

    return decide


def random_rows(seed, sessions):
    rng = np.random.default_rng(seed)
    return np.flatnonzero(np.r_[True, rng.random(sessions - 1) < rng.choice([0.1, 0.3, 1.0])])


def constant(*weights):
    return lambda row, held: np.array(weights, dtype=float)


def flat(prices, vwaps=None, **fields):
    """A panel whose closes are given, ``[T, N]``; the vwaps are the closes unless given."""
    close = np.array(prices, dtype=np.float32)
    panel = make_panel(close.shape)
    values = np.repeat(close[:, :, None], 6, axis=2)
    if vwaps is not None:
        values[:, :, VWAP] = np.where(np.isnan(vwaps), close, vwaps)
    traded = np.isfinite(close)
    return replace(panel, **({"values": values, "traded": traded} | fields))


def plane(panel, *places):
    out = np.zeros(panel.shape, bool)
    for place in places:
        out[place] = True
    return out


# against the slow one


@settings(deadline=None, max_examples=100)
@given(
    seed=SEEDS,
    cost=st.sampled_from([0.0, 0.002, 0.03]),
    loss=st.sampled_from([0.0, 0.4, 1.0]),
    absent=st.sampled_from([1, 2, 6, 252]),
    contradictory=st.booleans(),
)
def test_equal_to_shares_and_cash_one_by_one(seed, cost, loss, absent, contradictory):
    panel = rough_market(seed, contradictory=contradictory)
    rows, decide = random_rows(seed, len(panel.dates)), random_decisions(seed, None if loss < 1 else 0.5)
    result = backtest(panel, rows, decide, cost=cost, delisting_loss=loss, absent=absent)
    slow = slow_backtest(panel, rows, decide, cost, loss, absent)
    for name in ("returns", "gross", "turnover", "cost", "weights"):
        np.testing.assert_allclose(
            getattr(result, name), getattr(slow, name), rtol=0, atol=1e-10, err_msg=name
        )
    np.testing.assert_allclose(result.fills["cash"], slow.cash, rtol=0, atol=1e-10)
    assert result.fills["delisted"].sum() <= slow.delisted  # those after the last trade have no row


@settings(deadline=None, max_examples=200)
@given(seed=SEEDS, cost=st.sampled_from([0.0, 0.002, 0.1]))
def test_a_fill_loses_its_cost_and_nothing_else(seed, cost):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 9))
    values = rng.random(n) * (rng.random(n) < 0.7)
    cash = float(rng.random() * rng.integers(2))
    target = rng.random(n) * (rng.random(n) < 0.7)
    target *= rng.choice([1.0, rng.random()]) / max(target.sum(), 1.0)
    can_buy, can_sell = rng.random((2, n)) < 0.7
    done = fill(values, cash, target, can_buy, can_sell, cost)
    before, after = values.sum() + cash, done.values.sum() + done.cash
    assert after == pytest.approx(before - cost * (done.bought + done.sold), abs=1e-12)
    if after > 0:
        assert (done.values / after).sum() + done.cash / after == pytest.approx(1, abs=1e-12)
    assert done.cash >= 0
    assert (done.values >= 0).all()
    change = done.values - values
    assert (change[~can_buy] <= 0).all()
    assert (change[~can_sell] >= 0).all()
    wanted = target * before - values
    assert (np.abs(change) <= np.abs(wanted) + 1e-12).all()  # no further than the target
    assert (change * wanted >= -1e-12).all()  # and never away from it
    sold = can_sell & (wanted < 0)
    np.testing.assert_allclose(done.values[sold], target[sold] * before, atol=1e-12)
    assert (done.values[can_sell & (target == 0)] == 0).all()  # sold out is exactly nothing


def test_purchases_share_what_cash_there_is():
    free = np.array([True, True, True])
    done = fill(np.array([0.6, 0.2, 0.2]), 0.0, np.array([0.0, 0.7, 0.3]), free, ~free | [0, 1, 1], 0.0)
    np.testing.assert_allclose(done.values, [0.6, 0.2, 0.2])  # the sale is blocked: no cash, no purchases
    assert done.short == pytest.approx(0.6)
    done = fill(
        np.array([0.6, 0.2, 0.1]), 0.1, np.array([0.0, 0.5, 0.4]), free, np.array([False, True, True]), 0.0
    )
    np.testing.assert_allclose(done.values, [0.6, 0.25, 0.15])  # 0.1 for purchases of 0.3 and 0.3
    done = fill(np.zeros(3), 1.0, np.array([0.5, 0.3, 0.2]), free, free, 0.002)
    np.testing.assert_allclose(done.values / done.values.sum(), [0.5, 0.3, 0.2])
    assert done.cash == pytest.approx(0, abs=1e-15)
    assert done.values.sum() == pytest.approx(1 / 1.002)


# by hand


def test_three_sessions_by_hand():
    panel = flat([[10, 20], [11, 20], [12, 30], [12, 24]], vwaps=[[10, 20], [10, 25], [12, 24], [16, 20]])
    result = backtest(
        panel, [0, 2], lambda row, held: np.array([0.5, 0.5] if row == 0 else [1.0, 0.0]), cost=0.01
    )
    assert [str(d) for d in result.dates] == [str(d) for d in panel.dates[1:]]
    # bought at 10 and 25 for 1 / 1.01 in all, then 11 and 20; 12 and 30; 16 and 20 when the second is sold
    half = 0.5 / 1.01
    a, b = half / 10, half / 25
    day1, day2 = 11 * a + 20 * b, 12 * a + 30 * b
    proceeds = 0.99 * 20 * b
    more = proceeds / 1.01 / 16
    day3 = 12 * (a + more)
    np.testing.assert_allclose(result.returns, [day1 - 1, day2 / day1 - 1, day3 / day2 - 1], rtol=1e-12)
    traded = np.array([1 / 1.01, (20 * b + proceeds / 1.01) / (16 * a + 20 * b)])
    np.testing.assert_allclose(result.turnover, traded, rtol=1e-12)
    np.testing.assert_allclose(result.cost, 0.01 * traded, rtol=1e-12)
    np.testing.assert_allclose(result.weights, [[0.5, 0.5], [1, 0]], atol=1e-12)
    gross = [11 / 10 / 2 + 20 / 25 / 2 - 1, day2 / day1 - 1, (16 * a + 20 * b) / day2 * 12 / 16 - 1]
    np.testing.assert_allclose(result.gross, gross, rtol=1e-12)
    assert result.fills["held"].to_list() == [2, 1]
    assert result.fills["signal"].to_list() == panel.dates[[0, 2]].tolist()
    assert result.fills["date"].to_list() == panel.dates[[1, 3]].tolist()


def test_the_first_session_costs_purchases_only_and_weights_drift():
    panel = make_panel((20, 3))
    result = backtest(panel, [2], constant(0.5, 0.3, 0.2))
    assert result.turnover[0] == pytest.approx(1 / 1.002)
    assert result.fills["sold"][0] == 0
    assert result.cost[0] == pytest.approx(0.002 / 1.002)
    path = panel.field("close")[3:].astype(float) / panel.field("vwap")[3] @ [0.5, 0.3, 0.2]
    np.testing.assert_allclose(np.cumprod(1 + result.returns), path / 1.002, rtol=1e-12)


def test_net_is_gross_less_costs_and_only_on_sessions_with_a_trade():
    panel = rough_market(5)
    rows = np.arange(0, 40, 5)
    result = backtest(panel, rows, random_decisions(5))
    cost = np.zeros(len(result.dates))
    cost[rows - rows[0]] = result.cost
    np.testing.assert_allclose(1 + result.returns, (1 + result.gross) * (1 - cost), rtol=1e-14)
    np.testing.assert_allclose(result.cost, 0.002 * result.turnover)
    np.testing.assert_allclose(result.weights.sum(axis=1) + result.fills["cash"].to_numpy(), 1, atol=1e-12)
    np.testing.assert_allclose(result.turnover, result.fills["bought"] + result.fills["sold"])


NAN = np.nan


def test_a_suspended_holding_is_its_last_close_and_its_gap_comes_when_it_trades_again():
    panel = flat([[10], [10], [NAN], [NAN], [15], [15]])
    result = backtest(panel, [0, 1], lambda row, held: np.array([1.0 if row == 0 else 0.0]), cost=0.0)
    np.testing.assert_allclose(result.returns, [0, 0, 0, 0.5, 0])
    assert result.fills["blocked_sells"].to_list() == [0, 1]
    assert result.fills["unfilled"].to_list() == [0, 1]
    assert result.fills["held"].to_list() == [1, 1]


def test_a_sealed_limit_blocks_one_side_only():
    panel = flat(np.full((4, 2), 10.0))
    up = replace(panel, sealed_up=plane(panel, (1, 0)))
    result = backtest(up, [0], constant(0.6, 0.4), cost=0.0)
    np.testing.assert_allclose(result.weights, [[0, 0.4]])  # what cannot be bought stays cash
    assert result.fills["cash"][0] == pytest.approx(0.6)
    assert result.fills.select("blocked_buys", "blocked_sells", "unfilled").row(0) == (
        1,
        0,
        pytest.approx(0.6),
    )

    def swap(row, held):
        return np.array([1.0, 0.0] if row == 0 else [0.0, 1.0])

    down = replace(panel, sealed_down=plane(panel, (2, 0)), sealed_up=plane(panel, (2, 0)))
    result = backtest(down, [0, 1], swap, cost=0.0)
    np.testing.assert_allclose(result.weights, [[1, 0], [1, 0]])  # not sold: no cash for the other
    assert result.fills["blocked_sells"].to_list() == [0, 1]
    result = backtest(replace(panel, sealed_up=plane(panel, (2, 0))), [0, 1], swap, cost=0.0)
    np.testing.assert_allclose(result.weights[1], [0, 1])  # at the upper limit it can be sold


def test_what_was_to_be_kept_is_not_called_blocked():
    panel = flat([[10, 10], [10, 10], [NAN, 11], [10, 12]])
    result = backtest(panel, [0, 1], lambda row, held: np.array([0.5, 0.5]) if row == 0 else held, cost=0.0)
    assert result.fills["blocked_buys"].to_list() == result.fills["blocked_sells"].to_list() == [0, 0]


def test_delisting_pays_the_last_close_less_the_loss():
    panel = flat([[10, 10], [10, 10], [8, 10], [NAN, 10], [NAN, 10], [NAN, 10]])
    gone = replace(panel, delisted=plane(panel, (slice(4, None), 0)))

    def keep(row, held):
        return np.array([0.5, 0.5]) if row == 0 else held

    # without a second trade, with one on the session the stock is delisted, with one on the session after
    for rows, cash in (([0], []), ([0, 3], [0.4 / 0.9]), ([0, 4], [0.3 / 0.8])):
        result = backtest(gone, rows, keep, cost=0.0, delisting_loss=0.25)
        np.testing.assert_allclose(np.cumprod(1 + result.returns), [1, 0.9, 0.9, 0.8, 0.8], rtol=1e-12)
        np.testing.assert_allclose(result.fills["cash"][1:], cash)
        assert result.fills["delisted"].to_list() == [0, *(1 for _ in cash)]
        assert result.fills["blocked_sells"].sum() == 0
    kept = backtest(panel, [0], constant(0.5, 0.5), cost=0.0, delisting_loss=0.25)
    assert kept.returns[3:].tolist() == [0, 0]  # no delisting date: the last close stays


def test_a_holding_without_bars_for_long_is_taken_for_delisted_and_nothing_it_does_later_counts():
    panel = flat([[10], [10], [NAN], [NAN], [NAN], [20]])
    result = backtest(panel, [0], constant(1.0), cost=0.0, delisting_loss=0.5, absent=3)
    np.testing.assert_allclose(result.returns, [0, 0, 0, -0.5, 0])
    result = backtest(panel, [0], constant(1.0), cost=0.0, delisting_loss=0.5, absent=4)
    np.testing.assert_allclose(result.returns, [0, 0, 0, 0, 1])


def test_a_delisted_stock_is_not_bought():
    panel = flat(np.full((4, 1), 10.0))
    result = backtest(replace(panel, delisted=plane(panel, (slice(1, None), 0))), [0], constant(1.0))
    assert result.fills.select("blocked_buys", "cash", "held").row(0) == (1, 1.0, 0)
    assert (result.returns == 0).all()


def test_signals_beyond_the_end_are_listed():
    panel = make_panel((12, 2))
    result = backtest(panel, [0, 5, 11], constant(0.5, 0.5))
    assert result.skipped["signal"].to_list() == [panel.dates[11].item()]
    assert len(result.dates) == 11
    short = backtest(panel, [0, 5, 11], constant(0.5, 0.5), end=str(panel.dates[5]))
    assert short.skipped["signal"].to_list() == panel.dates[[5, 11]].tolist()
    assert np.array_equal(short.returns, result.returns[:5])
    with pytest.raises(DataError, match="no signal can be traded: the first is of 2015-01-20"):
        backtest(panel, [11], constant(0.5, 0.5))


# what it must not depend on


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS, at=st.integers(2, 44))
def test_nothing_up_to_t_depends_on_what_comes_after(seed, at):
    panel, other = rough_market(seed), rough_market(seed + 1)
    planes = ("values", "traded", "delisted", "sealed_up", "sealed_down")
    mixed = replace(
        panel,
        **{name: np.concatenate([getattr(panel, name)[:at], getattr(other, name)[at:]]) for name in planes},
    )
    seen = {}

    def watching(log):
        def decide(row, held):
            log[row] = held
            return random_decisions(seed)(row, held)

        return decide

    rows = random_rows(seed, len(panel.dates))
    one = backtest(panel, rows, watching(seen.setdefault("one", {})), absent=5)
    two = backtest(mixed, rows, watching(seen.setdefault("two", {})), absent=5)
    days = max(at - 1 - rows[0], 0)  # sessions rows[0] + 1 .. at - 1
    trades = int((rows + 1 < at).sum())
    assert np.array_equal(one.returns[:days], two.returns[:days])
    assert np.array_equal(one.weights[:trades], two.weights[:trades])
    assert one.fills.head(trades).equals(two.fills.head(trades))
    assert all(np.array_equal(seen["one"][r], seen["two"][r]) for r in seen["one"] if r < at)


def test_appended_sessions_change_nothing():
    panel = rough_market(11)
    cut = replace(
        panel,
        dates=panel.dates[:30],
        **{k: getattr(panel, k)[:30] for k in ("values", "factor", "traded", "listed", "delisted", "age")},
        **{k: getattr(panel, k)[:30] for k in ("limit_up", "limit_down", "sealed_up", "sealed_down")},
        **{k: getattr(panel, k)[:30] for k in ("special", "industry", "float_cap")},
        members={},
        weights={},
        benchmarks={},
    )
    rows = np.arange(0, 48, 4)
    whole, short = (backtest(p, rows[rows < len(p.dates)], random_decisions(1)) for p in (panel, cut))
    assert np.array_equal(whole.returns[:29], short.returns)


def test_only_the_state_of_the_session_of_the_fill_counts():
    panel = make_panel((12, 4))
    rows, decide = [2, 6], random_decisions(3, invested=1.0)
    plain = backtest(panel, rows, decide)
    elsewhere = np.ones(panel.shape, bool)
    elsewhere[[3, 7]] = False
    other = replace(
        panel, sealed_up=elsewhere, sealed_down=elsewhere, limit_up=~elsewhere, limit_down=~elsewhere
    )
    assert np.array_equal(
        backtest(other, rows, decide).returns, plain.returns
    )  # limits of t, and opens of t + 1
    here = backtest(replace(panel, sealed_up=~elsewhere), rows, decide)
    assert here.fills["held"].to_list() == [0, 0]
    assert here.fills["blocked_buys"][0] > 0


@settings(deadline=None, max_examples=15)
@given(seed=SEEDS)
def test_adjusted_prices_have_no_scale_and_stocks_no_order(seed):
    panel, rows = rough_market(seed), np.arange(0, 47, 5)
    result = backtest(panel, rows, random_decisions(seed))
    values = panel.values.copy()
    values[:, 2, :5] *= 4  # another base of the adjustment
    assert np.array_equal(
        backtest(replace(panel, values=values), rows, random_decisions(seed)).returns, result.returns
    )

    order = np.random.default_rng(seed).permutation(panel.shape[1])
    planes = ("values", "traded", "delisted", "sealed_up", "sealed_down")
    turned = replace(panel, **{name: getattr(panel, name)[:, order] for name in planes})
    back = np.argsort(order)
    decide = random_decisions(seed)
    other = backtest(turned, rows, lambda row, held: decide(row, held[back])[order])
    np.testing.assert_allclose(other.returns, result.returns, atol=1e-14)


def test_the_panel_and_the_decisions_stay_as_they_are(small_market):
    before = small_market.values.copy()
    target = np.full(small_market.shape[1], 1 / small_market.shape[1])

    def decide(row, held):
        held[:] = -1  # the argument is the caller's own
        return target

    result = backtest(small_market, np.arange(0, 300, 5), decide)
    assert np.array_equal(small_market.values, before, equal_nan=True)
    assert (target == 1 / len(target)).all()
    assert np.isfinite(result.returns).all()


# errors


def test_errors_say_what_is_wrong():
    panel = make_panel((12, 2))
    for rows in ([], [1.5], [[1]], [3, 3], [-1], [12]):
        with pytest.raises(DataError, match="rows must"):
            backtest(panel, rows, constant(0.5, 0.5))
    with pytest.raises(DataError, match=r"targets of 2015-01-05 are \(3,\), expected \(2,\)"):
        backtest(panel, [0], constant(0.5, 0.3, 0.2))
    for wrong in ((0.8, 0.3), (-0.1, 0.5), (NAN, 0.5), (np.inf, 0.0)):
        with pytest.raises(
            DataError, match="targets of 2015-01-05: weights must be >= 0 with a sum of at most 1"
        ):
            backtest(panel, [0], constant(*wrong))
    for setting in ({"cost": -0.1}, {"cost": 1.0}, {"delisting_loss": 2.0}, {"absent": 0}):
        with pytest.raises(SpecError, match="costs and losses are shares"):
            backtest(panel, [0], constant(0.5, 0.5), **setting)
    values = panel.values.copy()
    values[1, 0, VWAP] = NAN
    with pytest.raises(DataError, match="S000 has a bar on 2015-01-06, but no vwap"):
        backtest(replace(panel, values=values), [0], constant(0.5, 0.5))
    values = panel.values.copy()
    values[5, 1, CLOSE] = NAN
    with pytest.raises(DataError, match="S001 has a bar on 2015-01-12, but no close"):
        backtest(replace(panel, values=values), [0], constant(0.5, 0.5))
    gone = replace(panel, delisted=plane(panel, slice(4, None)))
    with pytest.raises(DataError, match="lost everything by 2015-01-09"):
        backtest(gone, [0], constant(0.5, 0.5), delisting_loss=1.0)


def test_what_a_solver_leaves_is_rounded():
    panel = flat(np.full((4, 2), 10.0))
    for dust in (-1e-10, 1e-10):
        result = backtest(panel, [0], constant(1 + 5e-9, dust), cost=0.0)
        np.testing.assert_array_equal(result.weights, [[1, 0]])
        assert result.fills["held"].to_list() == [1]

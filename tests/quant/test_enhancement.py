"""The fund from end to end: what the optimizer is told, what comes back, and what is said when it cannot be."""

from dataclasses import fields, replace

import numpy as np
import pytest
from panels import make_panel, with_other_future

from steppe.core.errors import DataError
from steppe.quant import enhancement
from steppe.quant.enhancement import enhance, member_returns
from steppe.quant.labels import forward_returns
from steppe.quant.performance import excess_metrics
from steppe.quant.portfolio import IndexEnhancement, Limits
from steppe.quant.universe import index_weights, universe_mask

ROWS = np.arange(380, 630, 5)
INDEX = "SIM-S"


def noise(panel, rows=ROWS, seed=0):
    scores = np.random.default_rng(seed).standard_normal((len(rows), panel.shape[1]))
    return np.where(universe_mask(panel)[rows], scores, np.nan)


@pytest.fixture
def recorded(monkeypatch):
    """Every (limits, market, solution) of the optimizers that `enhance` makes."""
    seen = []

    class Recording(IndexEnhancement):
        def solve(self, market):
            solution = super().solve(market)
            seen.append((self.limits, market, solution))
            return solution

    monkeypatch.setattr(enhancement, "IndexEnhancement", Recording)
    return seen


@pytest.fixture(scope="module")
def fund(small_market):
    return enhance(small_market, noise(small_market), ROWS, INDEX)


def test_frames_and_summary(small_market, fund):
    assert fund.daily.columns == ["date", "ret", "benchmark"]
    assert fund.rebalances.columns == [
        *("date", "turnover", "held", "cash", "relaxed", "violation", "blocked", "objective")
    ]
    assert (fund.weights, fund.benchmark) == (
        "data",
        "price index" if small_market.benchmarks else "float-cap return of members",
    )
    assert fund.rebalances["date"].to_list() == small_market.dates[ROWS + 1].tolist()
    # the last portfolio is held as long as the others
    assert fund.daily["date"].to_list() == small_market.dates[ROWS[0] + 1 : ROWS[-1] + 6].tolist()
    ours, theirs = fund.daily["ret"].to_numpy(), fund.daily["benchmark"].to_numpy()
    metrics = excess_metrics(ours, theirs, fund.trades.dates)
    assert {key: fund.summary[key] for key in metrics} == metrics
    assert set(fund.summary) == {*metrics, "turnover", "cost_annual", "relaxed", "rebalances"}
    assert fund.summary["rebalances"] == len(ROWS)
    turnover = fund.rebalances["turnover"].to_numpy()
    assert turnover[0] == pytest.approx(1, abs=0.1)
    assert fund.summary["turnover"] == pytest.approx(turnover[1:].mean())
    assert fund.summary["cost_annual"] == pytest.approx(0.002 * turnover.sum() * 252 / len(ours))
    assert fund.yearly["period"].to_list() == ["2016", "2017"]


def test_what_the_optimizer_is_told(small_market, recorded):
    scores = noise(small_market)
    fund = enhance(small_market, scores, ROWS, INDEX)
    weights, _ = index_weights(small_market, INDEX)
    assert [limits.turnover for limits, *_ in recorded] == [2.0] + [0.3] * (len(ROWS) - 1)
    neutral = stopped = 0
    for row, score, (limits, market, solution) in zip(ROWS, scores, recorded, strict=True):
        held = np.zeros(small_market.shape[1])
        held[market.stocks] = market.holdings
        assert np.array_equal(
            market.stocks, np.flatnonzero(np.isfinite(score) | (weights[row] > 0) | (held > 0))
        )
        assert market.benchmark.sum() == pytest.approx(1)
        known = np.isfinite(score[market.stocks])
        assert market.scores[known].mean() == pytest.approx(0, abs=1e-9)
        assert market.scores[known].std() == pytest.approx(1)
        assert not market.scores[~known].any()
        neutral += (~known).sum()
        cap = small_market.float_cap[row, market.stocks]
        assert market.size == pytest.approx((np.log(cap) - np.log(cap).mean()) / np.log(cap).std(), abs=1e-4)
        assert np.array_equal(market.in_index, small_market.members[INDEX][row, market.stocks])
        assert np.array_equal(market.can_buy, small_market.traded[row, market.stocks])
        assert np.array_equal(market.can_sell, market.can_buy)
        # and what comes back keeps the limits, unless it says otherwise
        w, b, w0 = solution.weights, market.benchmark, market.holdings
        assert w[~market.can_buy] == pytest.approx(w0[~market.can_buy], abs=1e-9)
        stopped += (~market.can_buy).sum()
        if not solution.relaxed:
            assert np.abs(w - b).max() <= limits.active + 1e-8
            assert w[market.in_index].sum() >= limits.in_index - 1e-8
            assert np.abs(np.bincount(market.industry + 1, w - b)).max() <= limits.industry + 1e-8
            assert abs(market.size @ (w - b)) <= limits.size + 1e-8
            assert np.abs(w - w0).sum() <= limits.turnover + 1e-8
    assert neutral > 0
    assert stopped > 0
    said = fund.rebalances["relaxed"].to_list()
    assert said == [", ".join(r.limit for r in solution.relaxed) for *_, solution in recorded]
    assert fund.summary["relaxed"] == sum(text not in ("", "suspended") for text in said)
    assert fund.summary["relaxed"] < len(ROWS) / 4


def test_holdings_are_what_was_filled_and_drifted(small_market, recorded):
    fund = enhance(small_market, noise(small_market), ROWS, INDEX)
    filled = fund.trades.weights
    for after, (_, market, _) in zip(filled[:-1], recorded[1:], strict=True):
        drifted = np.zeros(small_market.shape[1])
        drifted[market.stocks] = market.holdings
        assert np.abs(drifted - after).max() < 0.05
        assert np.corrcoef(drifted, after)[0, 1] > 0.97


@pytest.mark.parametrize("program", [{}, {"risk_aversion": 100.0}])
def test_decisions_know_no_future(small_market, recorded, program):
    rows = ROWS[:10]
    here = enhance(small_market, noise(small_market, rows), rows, INDEX, **program)
    first = list(recorded)
    recorded.clear()
    # the scores are given: they are the same in both worlds
    last, known = rows[6], rows[:7]
    other = with_other_future(small_market, last)
    there = enhance(other, noise(small_market, rows)[:7], known, INDEX, **program)
    for k in range(7):
        for name in (f.name for f in fields(first[k][1]) if f.name != "risk"):
            assert np.array_equal(getattr(first[k][1], name), getattr(recorded[k][1], name)), name
        assert np.array_equal(first[k][2].weights, recorded[k][2].weights)
    past = last - rows[0]
    assert np.array_equal(here.trades.returns[:past], there.trades.returns[:past])
    assert there.trades.returns[past] != here.trades.returns[past]


def test_better_scores_earn_more(small_market):
    future = np.where(universe_mask(small_market)[ROWS], forward_returns(small_market, 5, rows=ROWS), np.nan)
    good, bad = (enhance(small_market, sign * future, ROWS, INDEX).summary for sign in (1, -1))
    assert good["annual_excess"] > 0.2
    assert bad["annual_excess"] < -0.2


def test_costs_are_paid(small_market, fund):
    free = enhance(small_market, noise(small_market), ROWS, INDEX, cost=0.0)
    assert free.summary["cost_annual"] == 0
    saved = free.summary["annual_excess"] - fund.summary["annual_excess"]
    assert saved == pytest.approx(fund.summary["cost_annual"], rel=0.5)


def test_a_risk_term_lowers_the_risk(small_market, fund):
    careful = enhance(small_market, noise(small_market)[:20], ROWS[:20], INDEX, risk_aversion=1e4)
    ours, theirs = (fund.daily[name].to_numpy()[: len(careful.daily)] for name in ("ret", "benchmark"))
    bold = excess_metrics(ours, theirs, careful.trades.dates)
    assert careful.summary["tracking_error"] < bold["tracking_error"]
    assert careful.rebalances["objective"].mean() < fund.rebalances["objective"][:20].mean()


def test_benchmark_of_members(small_market):
    panel = replace(small_market, benchmarks={}, weights={})
    weights, source = index_weights(panel, INDEX)
    assert source == "float_cap"
    found = member_returns(panel, weights, 380, 420)
    close = panel.field("close").astype(np.float64)
    for row in (381, 400, 420):
        total = 0.0
        for stock in np.flatnonzero(weights[row - 1]):
            if panel.traded[row, stock]:
                before = close[:row, stock]
                total += weights[row - 1, stock] * (
                    close[row, stock] / before[np.flatnonzero(np.isfinite(before))[-1]] - 1
                )
        assert found[row] == pytest.approx(total, abs=1e-6)
    assert np.isfinite(found).sum() == 40
    fund = enhance(panel, noise(panel), ROWS, INDEX)
    assert (fund.weights, fund.benchmark) == ("float_cap", "float-cap return of members")
    assert fund.copy_tracking_error == 0


def test_price_index_and_first_session():
    panel = make_panel((60, 20))
    rows = np.arange(10, 50, 5)
    scores = np.random.default_rng(0).standard_normal((len(rows), 20))
    fund = enhance(panel, scores, rows, "IDX", limits=Limits(active=0.05, industry=0.5, size=3, turnover=1))
    assert fund.benchmark == "price index"
    level = panel.benchmarks["IDX"]
    theirs = fund.daily["benchmark"].to_numpy()
    assert theirs[1:] == pytest.approx(level[12:51] / level[11:50] - 1)
    weights, _ = index_weights(panel, "IDX")
    legs = panel.field("close")[11].astype(float) / panel.field("vwap")[11] - 1
    assert theirs[0] == pytest.approx(weights[10] @ legs)
    assert fund.copy_tracking_error < 1e-4
    bare = replace(panel, benchmarks={})
    members = enhance(bare, scores, rows, "IDX", limits=Limits(active=0.05, industry=0.5, size=3, turnover=1))
    assert members.daily["benchmark"].to_numpy() == pytest.approx(theirs, abs=1e-5)

    # of a fund of twice the size every order is twice the share of the session
    double = enhance(panel, scores, rows, "IDX", limits=Limits(active=0.05, industry=0.5, size=3), assets=2e8)
    single = enhance(panel, scores, rows, "IDX", limits=Limits(active=0.05, industry=0.5, size=3), assets=1e8)
    for key in ("participation", "participation_95"):
        assert double.capacity[key] == pytest.approx(2 * single.capacity[key])
    assert 0 < single.capacity["participation"] < single.capacity["participation_95"]


def test_missing_caps_scores_and_industries():
    panel = make_panel((60, 20))
    cap, industry = panel.float_cap.copy(), panel.industry.copy()
    cap[:, 15] = np.nan
    industry[:, 16] = -1
    rows = np.arange(10, 50, 5)
    scores = np.random.default_rng(0).standard_normal((len(rows), 20))
    scores[:, 0] = np.nan
    limits = Limits(active=0.05, industry=0.5, size=3)
    fund = enhance(replace(panel, float_cap=cap, industry=industry), scores, rows, "IDX", limits=limits)
    assert np.isfinite(fund.daily["ret"].to_numpy()).all()


def test_what_cannot_be_done_is_said(small_market):
    scores = noise(small_market)
    with pytest.raises(DataError, match=r"unknown index 'SIM-X'.*Did you mean"):
        enhance(small_market, scores, ROWS, "SIM-X")
    with pytest.raises(DataError, match=r"scores are \(3, 80\), expected \(50, 80\)"):
        enhance(small_market, scores[:3], ROWS, INDEX)
    with pytest.raises(DataError, match="rows must increase"):
        enhance(small_market, scores, ROWS[::-1], INDEX)
    with pytest.raises(DataError, match="rows must be a non-empty list"):
        enhance(small_market, scores[:0], [], INDEX)
    empty, infinite = scores.copy(), scores.copy()
    empty[3] = np.nan
    infinite[4, 0] = np.inf
    with pytest.raises(DataError, match=f"no stock has a score on {small_market.dates[ROWS[3]]}"):
        enhance(small_market, empty, ROWS, INDEX)
    with pytest.raises(DataError, match=f"scores are infinite on {small_market.dates[ROWS[4]]}"):
        enhance(small_market, infinite, ROWS, INDEX)

    nobody = small_market.weights[INDEX].copy()
    nobody[ROWS[5] : ROWS[5] + 3] = 0
    panel = replace(small_market, weights={INDEX: nobody})
    with pytest.raises(DataError, match=f"no members with a known weight on {panel.dates[ROWS[5]]}"):
        enhance(panel, scores, ROWS, INDEX)

    level = np.full(small_market.shape[0], 1000.0)
    level[[390, 395, 401, 402, 403]] = np.nan
    panel = replace(small_market, benchmarks={INDEX: level})
    with pytest.raises(DataError, match=rf"has no level on {panel.dates[390]}, .* and 2 more"):
        enhance(panel, scores, ROWS, INDEX)
    # before and after the fund's life a level may be missing
    level = np.full(small_market.shape[0], 1000.0)
    level[:380] = level[640:] = np.nan
    fund = enhance(replace(small_market, benchmarks={INDEX: level}), scores, ROWS, INDEX)
    assert fund.benchmark == "price index"


def test_end(small_market):
    end = small_market.dates[500]
    fund = enhance(small_market, noise(small_market), ROWS, INDEX, end=end)
    assert fund.trades.dates[-1] == end
    assert len(fund.rebalances) == (ROWS < 500).sum()

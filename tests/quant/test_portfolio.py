"""Portfolios: against cvxpy, against their own limits, and that nothing but a date's market decides about it."""

import dataclasses

import numpy as np
import pytest

from steppe.core.errors import DataError, SolverError, SpecError
from steppe.quant.portfolio import FactorRisk, IndexEnhancement, Limits, Market
from steppe.quant.portfolio.relaxation import stock_limits
from steppe.quant.portfolio.trades import violation

LIMITS = Limits(active=0.03, in_index=0.8, industry=0.04, size=0.2, turnover=0.3)
KINDS = {
    "linear": {},
    "quadratic": {"risk_aversion": 5.0},
    "capped": {"tracking_error": 0.03},
    "both": {"risk_aversion": 2.0, "tracking_error": 0.025},
}


def make_market(seed, n=60, *, suspended=0, drift=0.05, industries_as_factors=True, ties=False):
    g = np.random.default_rng(seed)
    in_index = np.zeros(n, dtype=bool)
    in_index[g.permutation(n)[: 2 * n // 3]] = True
    cap = np.exp(g.normal(0, 0.8, n))
    benchmark = np.where(in_index, cap, 0) / cap[in_index].sum()
    size = np.log(cap)
    size = (size - size.mean()) / size.std()
    industry = g.integers(-1, 5, n)
    holdings = benchmark * np.exp(g.normal(0, drift, n))
    holdings += np.where(g.random(n) < 0.1, 0.01, 0)
    holdings /= holdings.sum()
    can_buy, can_sell = np.ones(n, dtype=bool), np.ones(n, dtype=bool)
    for mask in (can_buy, can_sell):
        mask[g.permutation(n)[:suspended]] = False
    styles = np.column_stack([size, g.normal(0, 1, (n, 3))])
    ones = (industry[:, None] == np.arange(-1, 5)).astype(float)
    exposures = np.hstack([ones, styles]) if industries_as_factors else g.normal(0, 1, (n, 7))
    root = g.normal(0, 0.05, (exposures.shape[1],) * 2)
    risk = FactorRisk(exposures, root @ root.T, g.uniform(0.15, 0.5, n) ** 2)
    scores = g.normal(0, 0.05, n)
    if ties:
        scores = np.round(scores, 1)
    stocks = g.permutation(10 * n)[:n]
    return Market(stocks, scores, benchmark, holdings, industry, size, in_index, can_buy, can_sell, risk)


def oracle(market, limits, box, risk_aversion=None, tracking_error=None):
    """The rebalance as a textbook writes it, solved by cvxpy with Clarabel at tight tolerances."""
    cp = pytest.importorskip("cvxpy")
    w = cp.Variable(len(market.stocks))
    x = w - market.benchmark
    root = np.linalg.cholesky(
        market.risk.exposures @ market.risk.covariance @ market.risk.exposures.T
        + np.diag(market.risk.specific)
    )
    objective = market.scores @ w
    if risk_aversion is not None:
        objective -= risk_aversion / 2 * cp.sum_squares(root.T @ x)
    constraints = [
        cp.sum(w) == box.invested,
        w >= box.low,
        w <= box.high,
        market.in_index.astype(float) @ w >= limits.in_index,
        cp.abs(market.size @ x) <= limits.size,
        cp.norm1(w - market.holdings) <= limits.turnover,
    ]
    constraints += [
        cp.abs(cp.sum(x[market.industry == j])) <= limits.industry for j in np.unique(market.industry)
    ]
    if tracking_error is not None:
        constraints.append(cp.norm(root.T @ x) <= tracking_error)
    problem = cp.Problem(cp.Maximize(objective), constraints)
    tight = {f"tol_{name}": 1e-10 for name in ("gap_abs", "gap_rel", "feas")}
    problem.solve(solver="CLARABEL", **tight)
    return problem.value, problem.status


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("seed", "suspended"), [(0, 0), (1, 0), (2, 6), (3, 10)])
def test_same_objective_as_cvxpy_and_every_limit_kept(kind, seed, suspended):
    market = make_market(seed, suspended=suspended, industries_as_factors=seed != 1)
    solution = IndexEnhancement(LIMITS, **KINDS[kind]).solve(market)
    box, _ = stock_limits(market, LIMITS)
    assert {r.limit for r in solution.relaxed} <= {"suspended"}
    value, status = oracle(market, LIMITS, box, **KINDS[kind])
    assert status == "optimal"
    assert solution.objective == pytest.approx(value, rel=1e-6)
    assert violation(market, solution.weights, LIMITS, box)[1] <= 1e-8
    still = ~market.can_buy & ~market.can_sell
    np.testing.assert_array_equal(solution.weights[still], market.holdings[still])
    if "tracking_error" in KINDS[kind]:
        x = solution.weights - market.benchmark
        assert market.risk.variance(x) ** 0.5 <= KINDS[kind]["tracking_error"] + 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_solved_before_changes_nothing(kind):
    warm = IndexEnhancement(LIMITS, **KINDS[kind])
    for seed in range(4):
        market = make_market(seed, n=150, ties=True)
        first, cold = warm.solve(market), IndexEnhancement(LIMITS, **KINDS[kind]).solve(market)
        assert first.objective == pytest.approx(cold.objective, rel=1e-9)
        np.testing.assert_allclose(first.weights, cold.weights, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_the_stocks_does_not_matter(kind):
    market = make_market(5, n=150, ties=True)
    order = np.random.default_rng(0).permutation(150)
    fields = {f.name: getattr(market, f.name) for f in dataclasses.fields(market)}
    risk = FactorRisk(market.risk.exposures[order], market.risk.covariance, market.risk.specific[order])
    shuffled = Market(**{k: v[order] for k, v in fields.items() if k != "risk"}, risk=risk)
    solver = IndexEnhancement(LIMITS, **KINDS[kind])
    straight = solver.solve(market).weights
    np.testing.assert_allclose(solver.solve(shuffled).weights, straight[order], atol=1e-7)


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_a_better_score_never_lowers_the_objective(kind):
    market = make_market(6)
    solver = IndexEnhancement(LIMITS, **KINDS[kind])
    before = solver.solve(market).objective
    for i in range(0, 60, 10):
        scores = market.scores.copy()
        scores[i] += 0.02
        assert solver.solve(dataclasses.replace(market, scores=scores)).objective >= before - 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_no_turnover_keeps_the_holdings(kind):
    market = make_market(7)
    market = dataclasses.replace(market, holdings=market.benchmark / market.benchmark.sum())
    solution = IndexEnhancement(dataclasses.replace(LIMITS, turnover=0.0), **KINDS[kind]).solve(market)
    np.testing.assert_array_equal(solution.weights, market.holdings)
    assert solution.status == "optimal"


def relaxed(market, limits, **kind):
    solution = IndexEnhancement(limits, **kind).solve(market)
    assert solution.status == "relaxed"
    return solution, {r.limit: r.by for r in solution.relaxed}


@pytest.mark.parametrize("kind", KINDS)
def test_turnover_gives_way_first_and_least(kind):
    market = make_market(8)
    market = dataclasses.replace(market, holdings=np.zeros(60))  # all cash: at least 100 % must be bought
    solution, by = relaxed(market, LIMITS, **KINDS[kind])
    assert by.keys() == {"turnover"}
    assert by["turnover"] == pytest.approx(0.7, abs=1e-6)
    assert solution.weights.sum() == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("kind", ["linear", "quadratic"])
def test_size_and_industry_give_way_after_turnover(kind):
    market = make_market(9, n=40)
    limits = dataclasses.replace(LIMITS, in_index=0.1, size=0.01)
    # all is suspended, what is large is held in excess: no turnover helps, and the violations are known
    large = market.size > 0.8
    holdings = np.where(large, 0.6 / large.sum(), 0.4 * market.benchmark)
    nothing = np.zeros(40, dtype=bool)
    market = dataclasses.replace(
        market, holdings=holdings / holdings.sum(), can_buy=nothing, can_sell=nothing
    )
    solution, by = relaxed(market, limits, **KINDS[kind])
    np.testing.assert_allclose(solution.weights, market.holdings, atol=1e-9)
    assert list(by)[1:] == ["size", "industry"]
    x = solution.weights - market.benchmark
    assert by["size"] == pytest.approx(abs(market.size @ x) - limits.size, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_forced_sales_beyond_every_limit_end_with_weights_or_their_names(kind, seed):
    market = make_market(seed, n=40, suspended=4, drift=1.0)
    large = market.size > 0.8
    holdings = np.where(large, 0.6 / large.sum(), 0.4 * market.benchmark)
    market = dataclasses.replace(market, holdings=holdings / holdings.sum(), can_sell=~large)
    solution, by = relaxed(market, LIMITS, **KINDS[kind])
    assert "suspended" in by
    assert (solution.weights[large] >= market.holdings[large]).all()
    assert solution.weights.sum() == pytest.approx(1, abs=1e-8)


def test_active_and_invested_give_way_last():
    market = make_market(10, n=40)
    can_buy = np.arange(40) < 4
    market = dataclasses.replace(market, holdings=np.zeros(40), can_buy=can_buy)
    solution, by = relaxed(market, LIMITS)
    assert {"suspended", "active", "turnover"} <= set(by)
    assert solution.weights.sum() == pytest.approx(1, abs=1e-8)
    market = dataclasses.replace(market, can_buy=np.zeros(40, dtype=bool), holdings=market.benchmark * 0.5)
    solution, by = relaxed(market, LIMITS)
    assert by["invested"] == pytest.approx(0.5)
    np.testing.assert_allclose(solution.weights, market.holdings, atol=1e-9)


def test_a_cap_below_the_least_tracking_error_rises_to_it():
    market = make_market(11, drift=0.6)
    limits = dataclasses.replace(LIMITS, turnover=0.1, active=0.2, in_index=0.5, industry=0.5, size=2.0)
    solution, by = relaxed(market, limits, tracking_error=1e-3)
    assert by.keys() == {"tracking_error"}
    te = market.risk.variance(solution.weights - market.benchmark) ** 0.5
    assert te == pytest.approx(1e-3 + by["tracking_error"], abs=1e-9)
    careful = IndexEnhancement(limits, risk_aversion=1e6).solve(market).weights
    assert te == pytest.approx(market.risk.variance(careful - market.benchmark) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.full(60, np.nan)}, "scores is not finite for 60 of 60"),
        ({"size": np.zeros(59)}, "size has shape"),
        ({"benchmark": np.full(60, 0.01)}, "sums to 0.6"),
        ({"holdings": np.full(60, 0.02)}, "more than the whole portfolio"),
        ({"holdings": np.full(60, -0.01)}, "negative weight"),
        ({"stocks": np.zeros(60, dtype=int)}, "twice"),
        ({"industry": np.zeros(60)}, "industry cannot be an array of float64"),
        ({"risk": FactorRisk(np.zeros((60, 2)), np.eye(2), np.zeros(60))}, "variances > 0"),
        ({"risk": FactorRisk(np.zeros((60, 2)), np.diag([1.0, -1.0]), np.ones(60))}, "semidefinite"),
        ({"risk": FactorRisk(np.zeros((59, 2)), np.eye(2), np.ones(60))}, "exposures has shape"),
    ],
)
def test_wrong_markets_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        dataclasses.replace(make_market(0), **change)


def test_wrong_settings_are_refused():
    with pytest.raises(SpecError, match="turnover"):
        Limits(turnover=-0.1)
    with pytest.raises(SpecError, match="in_index"):
        Limits(in_index=1.2)
    with pytest.raises(SpecError, match="risk_aversion"):
        IndexEnhancement(risk_aversion=0)
    with pytest.raises(DataError, match="risk model"):
        IndexEnhancement(risk_aversion=1).solve(dataclasses.replace(make_market(0), risk=None))


def test_a_failed_solve_is_an_error(monkeypatch):
    from steppe.quant.portfolio.interior import InteriorSolver

    monkeypatch.setattr(InteriorSolver, "solve", lambda self, tilt: None)
    with pytest.raises(SolverError, match="no solution was found for 60 stocks"):
        IndexEnhancement(LIMITS, risk_aversion=1).solve(make_market(0))
    monkeypatch.setattr(InteriorSolver, "solve", lambda self, tilt: np.zeros(len(self.linear)))
    off = dataclasses.replace(make_market(0), holdings=np.zeros(60))
    with pytest.raises(SolverError, match="break the limit 'invested'"):
        IndexEnhancement(dataclasses.replace(LIMITS, turnover=2.0), risk_aversion=1).solve(off)

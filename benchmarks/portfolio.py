"""CPU time of one rebalance: steppe beside cvxpy and Qlib's formulation, on one core.

    OMP_NUM_THREADS=1 python benchmarks/portfolio.py [--sizes 300 1000 5000] [--dates 12] [--peer-dates 4] [--no-peers]

Synthetic weekly sequences: an AR(1) score (0.7), holdings that drift with 4 % noise a week from the weights that the
date before ended with, 30 industries, 10 styles, the limits of the LP as published; the index has 300 members at
n = 300, else at most 1,000. Times are CPU milliseconds, median of the dates after the first; every contender
solves the same dates (those of steppe's own holdings);
"objective" is the largest relative difference from steppe's, "violation" the
worst of any limit.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import cvxpy as cp
import numpy as np
from numpy.typing import NDArray

from steppe.quant.portfolio import FactorRisk, IndexEnhancement, Limits, Market
from steppe.quant.portfolio.relaxation import stock_limits
from steppe.quant.portfolio.trades import violation

LIMITS = Limits()
RISK_AVERSION, CAP = 10.0, 0.02
Vector = NDArray[np.float64]


class Weeks:
    """The markets of a sequence, each given the holdings that the last rebalance left."""

    def __init__(self, n: int, dates: int, seed: int = 0) -> None:
        self.g = g = np.random.default_rng(seed)
        self.n, self.dates = n, dates
        cap = np.exp(g.normal(0, 1.1, n))
        members = np.argsort(-cap)[: min(n, 1000)]
        self.in_index = np.isin(np.arange(n), members)
        self.benchmark = np.where(self.in_index, cap, 0) / cap[members].sum()
        self.size = (np.log(cap) - np.log(cap).mean()) / np.log(cap).std()
        self.industry = g.integers(0, 30, n)
        styles = np.column_stack([self.size, g.normal(0, 1, (n, 9))])
        root = g.normal(0, 1, (40, 40)) / np.sqrt(40)
        deviation = np.repeat([0.12, 0.04], [30, 10])
        covariance = (root @ root.T + np.eye(40)) / 2 * np.outer(deviation, deviation)
        exposures = np.hstack([np.eye(30)[self.industry], styles])
        self.risk = FactorRisk(exposures, covariance, g.uniform(0.2, 0.5, n) ** 2)

    def markets(self, solve: Callable[[Market], Vector]) -> Iterator[Market]:
        holdings, score = self.benchmark, self.g.normal(0, 1, self.n)
        anything = np.ones(self.n, dtype=bool)
        for _ in range(self.dates):
            market = Market(
                *(np.arange(self.n), 0.05 * score, self.benchmark, holdings, self.industry, self.size),
                *(self.in_index, anything, anything, self.risk),
            )
            yield market
            drifted = solve(market) * (1 + self.g.normal(0, 0.04, self.n))
            holdings = drifted / drifted.sum()
            score = 0.7 * score + np.sqrt(1 - 0.49) * self.g.normal(0, 1, self.n)


def limits_of(market: Market, w: cp.Variable) -> list[cp.Constraint]:
    x = w - market.benchmark
    one_hot = (market.industry == np.arange(30)[:, None]).astype(float)
    return [
        cp.sum(w) == 1,
        w >= np.maximum(market.benchmark - LIMITS.active, 0),
        w <= market.benchmark + LIMITS.active,
        market.in_index.astype(float) @ w >= LIMITS.in_index,
        cp.abs(market.size @ x) <= LIMITS.size,
        cp.abs(one_hot @ x) <= LIMITS.industry,
        cp.norm1(w - market.holdings) <= LIMITS.turnover,
    ]


def by_cvxpy(kind: str, solver: str) -> Callable[[Market], Vector]:
    def solve(market: Market) -> Vector:
        w, risk = cp.Variable(len(market.stocks)), market.risk
        assert risk is not None
        x = w - market.benchmark
        objective, constraints = market.scores @ w, limits_of(market, w)
        if kind != "lp":
            y = np.linalg.cholesky(risk.covariance).T @ (risk.exposures.T @ x)
            parts = cp.hstack([y, cp.multiply(np.sqrt(risk.specific), x)])
            if kind == "qp":
                objective -= RISK_AVERSION / 2 * cp.sum_squares(parts)
            else:
                constraints.append(cp.norm(parts) <= CAP)
        cp.Problem(cp.Maximize(objective), constraints).solve(solver=solver)
        return np.asarray(w.value)

    return solve


def by_qlib(market: Market) -> Vector:
    """The formulation of Qlib's EnhancedIndexingOptimizer: a new problem each date, the risk as two quad_forms of
    the factor covariance and the specific variances, with the limits compared here (its ECOS is gone)."""
    w, risk = cp.Variable(len(market.stocks), nonneg=True), market.risk
    assert risk is not None
    x = w - market.benchmark
    variance = cp.quad_form(risk.exposures.T @ x, risk.covariance) + risk.specific @ (x**2)
    objective = market.scores @ x - RISK_AVERSION / 2 * variance
    cp.Problem(cp.Maximize(objective), limits_of(market, w)).solve(solver="CLARABEL")
    return np.asarray(w.value)


def by_dense_covariance(market: Market) -> Vector:
    """The same with the whole covariance of the stocks, as most examples write it."""
    w, risk = cp.Variable(len(market.stocks), nonneg=True), market.risk
    assert risk is not None
    dense = risk.exposures @ risk.covariance @ risk.exposures.T + np.diag(risk.specific)
    x = w - market.benchmark
    objective = market.scores @ x - RISK_AVERSION / 2 * cp.quad_form(x, cp.psd_wrap(dense))
    cp.Problem(cp.Maximize(objective), limits_of(market, w)).solve(solver="CLARABEL")
    return np.asarray(w.value)


PEERS: dict[str, dict[str, Callable[[Market], Vector]]] = {
    "lp": {"cvxpy + HiGHS": by_cvxpy("lp", "HIGHS"), "cvxpy + Clarabel": by_cvxpy("lp", "CLARABEL")},
    "qp": {
        "cvxpy + Clarabel": by_cvxpy("qp", "CLARABEL"),
        "Qlib's formulation": by_qlib,
        "dense quad_form": by_dense_covariance,
    },
    "cap": {"cvxpy + Clarabel": by_cvxpy("cap", "CLARABEL")},
}
SETTINGS = {"lp": {}, "qp": {"risk_aversion": RISK_AVERSION}, "cap": {"tracking_error": CAP}}


def value(kind: str, market: Market, w: Vector) -> float:
    assert market.risk is not None
    risk = RISK_AVERSION / 2 * market.risk.variance(w - market.benchmark) if kind == "qp" else 0.0
    return float(market.scores @ w) - risk


def broken(kind: str, market: Market, w: Vector) -> float:
    assert market.risk is not None
    over = np.sqrt(market.risk.variance(w - market.benchmark)) - CAP if kind == "cap" else 0.0
    return max(float(over), violation(market, w, LIMITS, stock_limits(market, LIMITS)[0])[1], 0.0)


def measure(kind: str, n: int, dates: int, peer_dates: int, peers: bool) -> None:
    optimizer = IndexEnhancement(LIMITS, **SETTINGS[kind])
    names = ["steppe", *(PEERS[kind] if peers else ())]
    if n > 1000 and "dense quad_form" in names:
        names.remove("dense quad_form")  # its covariance alone is 200 MB
    times: dict[str, list[float]] = {name: [] for name in names}
    apart = dict.fromkeys(names, 0.0)
    worst = dict.fromkeys(names, 0.0)

    def ours(market: Market) -> Vector:
        started = time.process_time()
        weights = optimizer.solve(market).weights
        times["steppe"].append(time.process_time() - started)
        best = value(kind, market, weights)
        worst["steppe"] = max(worst["steppe"], broken(kind, market, weights))
        for name in names[1:]:
            if len(times[name]) < peer_dates:
                started = time.process_time()
                weights_of_peer = PEERS[kind][name](market)
                times[name].append(time.process_time() - started)
                apart[name] = max(apart[name], abs(value(kind, market, weights_of_peer) / best - 1))
                worst[name] = max(worst[name], broken(kind, market, weights_of_peer))
        return weights

    for _ in Weeks(n, dates).markets(ours):
        pass
    own = statistics.median(times["steppe"][1:])
    for name in names:
        each = statistics.median(times[name][1:])
        print(
            f"{kind:4} {n:5} {name:20} {each * 1e3:9.2f} ms {each / own:7.1f} x"
            f"   objective {apart[name]:.0e}   violation {worst[name]:.0e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[300, 1000, 5000])
    parser.add_argument("--kinds", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--dates", type=int, default=12)
    parser.add_argument("--peer-dates", type=int, default=4, help="two of these at n = 5000")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # cvxpy's on inaccurate solutions: the violation says it
    for kind in args.kinds:
        for n in args.sizes:
            measure(kind, n, args.dates, args.peer_dates if n <= 1000 else 2, not args.no_peers)


if __name__ == "__main__":
    main()

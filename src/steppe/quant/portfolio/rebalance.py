"""One rebalance after another: the linear programme, the quadratic one and the tracking-error cap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from steppe.core.errors import DataError, SolverError, SpecError
from steppe.quant.portfolio.interior import InteriorSolver
from steppe.quant.portfolio.linear import LinearSolver
from steppe.quant.portfolio.market import FactorRisk, Limits, Market, Relaxed, Solution
from steppe.quant.portfolio.relaxation import stock_limits, widen
from steppe.quant.portfolio.trades import TURNOVER, Box, Trades, violation

__all__ = ["IndexEnhancement"]

# what the limits may be missed by before a solution counts as failed
TOLERANCE = 1e-8
# relative accuracy of the objective under a tracking-error cap
ACCURACY = 1e-7
SEARCH = 60
# a weight this near to a bound or to what is held is there
SETTLE = 1e-10


class IndexEnhancement:
    """Maximise scores'w - risk_aversion / 2 * (active variance) within the limits and under a tracking-error cap.

    Without risk_aversion and tracking_error this is a linear programme, which needs no risk model. The object
    keeps the row prices of its last linear programme as a start for the next; what it returns for a date does not
    depend on them (see `linear`), and quadratic programmes start cold. So a sequence that is resumed in the middle
    gives the same weights, to about 1e-9.

    Args:
        limits: of every rebalance.
        risk_aversion: charge for the active variance (per year); the scores are then returns per year.
        tracking_error: highest active standard deviation, per year.

    Raises:
        SpecError: a limit, risk aversion or tracking error that is not a positive number.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        risk_aversion: float | None = None,
        tracking_error: float | None = None,
    ) -> None:
        for name, value in (("risk_aversion", risk_aversion), ("tracking_error", tracking_error)):
            if value is not None and not 0 < value < np.inf:
                raise SpecError(f"{name} must be a positive number or None, not {value!r}.")
        self.limits = limits if limits is not None else Limits()
        self.risk_aversion, self.tracking_error = risk_aversion, tracking_error
        self._linear = LinearSolver()

    def solve(self, market: Market) -> Solution:
        """The best weights of one date.

        Where no weights keep every limit, limits give way in the order of `relaxation`, and the solution says which.

        Raises:
            DataError: a risk term without a risk model.
            SolverError: a solver failed, or what it returned does not keep the limits; never weights of a guess.
        """
        if market.risk is None and not (self.risk_aversion is None and self.tracking_error is None):
            raise DataError("risk_aversion and tracking_error need a risk model: market.risk is None.")
        box, relaxed = stock_limits(market, self.limits)
        limits = self.limits
        self._linear.iterations = 0
        outcome = self._attempt(market, limits, box)
        if outcome is None:
            limits, widened = widen(market, limits, box, self._linear)
            relaxed += widened
            outcome = self._attempt(market, limits, box)
        if outcome is None:
            raise SolverError(
                f"no solution was found for {len(market.stocks)} stocks although the limits can be kept"
                f" ({', '.join(f'{r.limit} widened by {r.by:.3g}' for r in relaxed) or 'nothing widened'})."
            )
        weights, inner, excess = outcome
        if excess > 0:
            relaxed.insert(0, Relaxed("tracking_error", excess))
        weights = _settle(weights, market, box)
        name, by = violation(market, weights, limits, box)
        if not by <= TOLERANCE:
            raise SolverError(f"the solver's weights break the limit {name!r} by {by:.3g}.")
        objective = float(market.scores @ weights)
        if self.risk_aversion is not None and market.risk is not None:
            objective -= self.risk_aversion / 2 * market.risk.variance(weights - market.benchmark)
        iterations = self._linear.iterations + inner
        return Solution(weights, objective, tuple(relaxed), "relaxed" if relaxed else "optimal", iterations)

    def _attempt(
        self, market: Market, limits: Limits, box: Box
    ) -> tuple[NDArray[np.float64], int, float] | None:
        """Weights, interior point iterations and the excess over the tracking-error cap; None if infeasible."""
        trades = Trades(market, limits, box)
        risk, cap = market.risk, self.tracking_error
        if risk is None or (self.risk_aversion is None and cap is None) or not len(trades.stock):
            amounts = self._linear.solve(trades)
            return None if amounts is None else (trades.weights(amounts), 0, 0.0)
        if trades.row_high[TURNOVER] < 0:
            return None
        solver = InteriorSolver(trades, risk)
        highest = np.inf if self.risk_aversion is None else 1 / self.risk_aversion
        amounts = solver.solve(highest) if cap is None else self._capped(trades, risk, cap, solver, highest)
        if amounts is None:
            return None
        weights = trades.weights(amounts)
        excess = 0.0 if cap is None else float(np.sqrt(risk.variance(weights - market.benchmark))) - cap
        return weights, solver.iterations, excess if excess > TOLERANCE else 0.0

    def _capped(
        self, trades: Trades, risk: FactorRisk, cap: float, solver: InteriorSolver, highest: float
    ) -> NDArray[np.float64] | None:
        """Amounts of the best trades under the cap, or of the least tracking error where that is above the cap.

        With the tilt as the price of risk, every tilt's optimum is the best portfolio of its own tracking error. So
        the tilt is sought whose tracking error is the cap, between one that stays below and one that does not; the
        mix of the two that meets the cap keeps every limit (all are convex), and the programme's dual bounds what
        the mix can lose.
        """
        market = trades.market
        cap2 = cap * cap

        def judge(amounts: NDArray[np.float64]) -> tuple[float, float]:
            weights = trades.weights(amounts)
            return risk.variance(weights - market.benchmark), float(market.scores @ weights)

        # the best without a cap: an optimum of the linear programme where no risk aversion was given
        high = solver.solve(highest) if np.isfinite(highest) else self._linear.solve(trades)
        if high is None:
            return None
        high_risk, high_score = judge(high)
        if high_risk <= cap2:
            return high
        low = solver.solve(0.0)
        if low is None:
            return None
        low_tilt, (low_risk, low_score) = 0.0, judge(low)
        if low_risk >= cap2:
            return low
        high_tilt = highest
        side = 0  # which end moved last: regula falsi alone would leave the other where it is for long
        spread = high_score - low_score
        for _ in range(SEARCH):
            mix = _mix(low, high, lambda z: judge(z)[0], cap2)
            _, score = judge(mix)
            # for any tilt, no portfolio under the cap scores more than the tilt's optimum less its price of excess risk
            bound = min(
                score_ - (variance - cap2) / (2 * tilt)
                for tilt, variance, score_ in (
                    (low_tilt, low_risk, low_score),
                    (high_tilt, high_risk, high_score),
                )
                if tilt > 0
            )
            if bound - score <= ACCURACY * max(abs(bound), spread):
                return mix
            # a tilt in between: tracking error is nearly linear in it (where the upper one is not infinite)
            low_te, high_te = np.sqrt(low_risk), np.sqrt(high_risk)
            if np.isfinite(high_tilt):
                part = (cap - low_te) / (high_te - low_te)
                part = (1 + part) / 2 if side < -1 else part / 2 if side > 1 else part
                tilt = low_tilt + part * (high_tilt - low_tilt)
            elif low_tilt > 0:
                tilt = 4 * low_tilt
            else:
                tilt = (cap2 - low_risk) / max(score - low_score, 1e-12 * spread)
            middle = solver.solve(tilt)
            if middle is None:
                return None
            variance, middle_score = judge(middle)
            if variance <= cap2:
                low, low_tilt, low_risk, low_score = middle, tilt, variance, middle_score
                side = min(side, 0) - 1
            else:
                side = max(side, 0) + 1
                high, high_tilt, high_risk, high_score = middle, tilt, variance, middle_score
        raise SolverError(f"no portfolio with a tracking error of {cap:g} was found in {SEARCH} tilts.")


def _mix(
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    variance: Callable[[NDArray[np.float64]], float],
    target: float,
) -> NDArray[np.float64]:
    """The point between ``low`` and ``high`` whose variance, a quadratic along the way, is the target."""
    at_low, at_high, at_half = variance(low), variance(high), variance((low + high) / 2)
    square = 2 * (at_low + at_high) - 4 * at_half
    slope = at_high - at_low - square
    missing = target - at_low
    root = np.sqrt(max(slope * slope + 4 * square * missing, 0.0))
    part = 2 * missing / (slope + root) if slope + root > 0 else 0.0
    return np.asarray(low + min(max(part, 0.0), 1.0) * (high - low))


def _settle(weights: NDArray[np.float64], market: Market, box: Box) -> NDArray[np.float64]:
    """Weights as they are meant: exactly at a bound, at what is held or at zero where they are within rounding.

    What the total loses by that goes to the stocks inside their bounds that are traded anyway.
    """
    out = np.clip(weights, box.low, box.high)
    for value in (market.holdings, box.low, box.high):
        out = np.where((np.abs(out - value) < SETTLE) & (value >= box.low) & (value <= box.high), value, out)
    inside = (out > box.low + 1e-6) & (out < box.high - 1e-6) & (out != market.holdings)
    if inside.any():
        out[inside] += (box.invested - out.sum()) / inside.sum()
    return out

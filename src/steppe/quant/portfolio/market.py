"""What a rebalance is given and what it returns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from steppe.core.errors import DataError, SpecError

__all__ = ["FactorRisk", "LimitName", "Limits", "Market", "Relaxed", "Solution"]

LimitName = Literal[
    "suspended", "tracking_error", "turnover", "size", "industry", "in_index", "active", "invested"
]


@dataclass(frozen=True)
class Limits:
    """Limits of a rebalance; the defaults are Huatai's (AI series 72). Weights are fractions of the portfolio.

    Attributes:
        active: largest |w_i - b_i| of a stock.
        in_index: least total weight of the index's members.
        industry: largest |sum over an industry of (w - b)|; industry -1 (unknown) is a group of its own.
        size: largest |size'(w - b)|, in the units of ``Market.size`` (standard deviations).
        turnover: largest sum |w - w0| of a rebalance, both sides counted.
    """

    active: float = 0.008
    in_index: float = 0.80
    industry: float = 0.02
    size: float = 0.2
    turnover: float = 0.30

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value >= 0 or not np.isfinite(value):
                raise SpecError(f"limits.{field.name} must be a finite number >= 0, not {value!r}.")
        if self.in_index > 1:
            raise SpecError(f"limits.in_index is a share of the portfolio, at most 1, not {self.in_index!r}.")


@dataclass(frozen=True)
class FactorRisk:
    """Covariance of returns B F B' + diag(D), per year.

    Attributes:
        exposures: B ``[n, k]``.
        covariance: F ``[k, k]``, symmetric, positive semidefinite.
        specific: D ``[n]``, variances > 0.
    """

    exposures: NDArray[np.float64]
    covariance: NDArray[np.float64]
    specific: NDArray[np.float64]

    def variance(self, active: NDArray[np.float64]) -> float:
        """x'(B F B' + D)x of active weights ``[n]``."""
        y = active @ self.exposures
        return float(y @ self.covariance @ y + active @ (self.specific * active))


@dataclass(frozen=True)
class Market:
    """One date as the rebalance sees it; every array ``[n]`` over its candidate stocks, in any order.

    Attributes:
        stocks: whole numbers that name the stocks, the same on every date; they settle ties between equal scores.
        scores: what is maximised; finite. With a risk term their unit is a return per year.
        benchmark: weights in the index, >= 0, sum 1.
        holdings: weights held now, >= 0, sum <= 1; the rest is cash.
        industry: industry of each stock, a whole number.
        size: z-score of the log of the float capitalisation.
        in_index: whether a stock is a member of the index.
        can_buy: whether the weight may rise.
        can_sell: whether the weight may fall.
        risk: covariance of returns, for a risk term or a tracking-error cap.

    Raises:
        DataError: an array of another shape, a number that is not finite, a negative weight, weights that do
            not add up, a stock named twice, a covariance that is none.
    """

    stocks: NDArray[np.integer[Any]]
    scores: NDArray[np.float64]
    benchmark: NDArray[np.float64]
    holdings: NDArray[np.float64]
    industry: NDArray[np.integer[Any]]
    size: NDArray[np.float64]
    in_index: NDArray[np.bool_]
    can_buy: NDArray[np.bool_]
    can_sell: NDArray[np.bool_]
    risk: FactorRisk | None = None

    def __post_init__(self) -> None:
        n = len(self.stocks)
        kinds = {"stocks": "iu", "industry": "iu", "in_index": "b", "can_buy": "b", "can_sell": "b"}
        for name in ("stocks", "scores", "benchmark", "holdings", "industry", "size", *list(kinds)[2:]):
            array = getattr(self, name)
            if array.shape != (n,) or not n:
                raise DataError(
                    f"market.{name} has shape {array.shape}; it needs one entry per stock, ({n},)."
                )
            if array.dtype.kind not in kinds.get(name, "f"):
                raise DataError(f"market.{name} cannot be an array of {array.dtype}.")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                bad = self.stocks[~np.isfinite(array)]
                raise DataError(
                    f"market.{name} is not finite for {len(bad)} of {n} stocks (first: {bad[0]}); "
                    "fill it or leave these stocks out."
                )
        for name in ("benchmark", "holdings"):
            if (lowest := getattr(self, name).min()) < 0:
                raise DataError(f"market.{name} has a negative weight ({lowest:.3g}).")
        if abs(total := float(self.benchmark.sum()) - 1) > 1e-6:
            raise DataError(
                f"market.benchmark sums to {total + 1:.8g}, not to 1: every member of the index must be a candidate."
            )
        if (total := float(self.holdings.sum())) > 1 + 1e-9:
            raise DataError(f"market.holdings sum to {total:.10g}, more than the whole portfolio.")
        if len(np.unique(self.stocks)) < n:
            raise DataError("market.stocks names a stock twice.")
        if self.risk is not None:
            _check_risk(self.risk, n)


def _check_risk(risk: FactorRisk, n: int) -> None:
    k = risk.exposures.shape[-1] if risk.exposures.ndim else 0
    shapes = {"exposures": (n, k), "covariance": (k, k), "specific": (n,)}
    for name, shape in shapes.items():
        array = getattr(risk, name)
        if array.shape != shape:
            raise DataError(f"market.risk.{name} has shape {array.shape}, not {shape}.")
        if not np.isfinite(array).all():
            raise DataError(f"market.risk.{name} holds numbers that are not finite.")
    if not (risk.specific > 0).all():
        raise DataError("market.risk.specific must be variances > 0.")
    if not np.allclose(risk.covariance, risk.covariance.T, rtol=1e-8, atol=1e-12):
        raise DataError("market.risk.covariance is not symmetric.")
    try:
        np.linalg.cholesky(risk.covariance + 1e-10 * max(float(np.trace(risk.covariance)), 1e-30) * np.eye(k))
    except np.linalg.LinAlgError:
        raise DataError("market.risk.covariance is not positive semidefinite.") from None


@dataclass(frozen=True)
class Relaxed:
    """A limit that a date could not keep: by how much it was widened, in the limit's own unit."""

    limit: LimitName
    by: float


@dataclass(frozen=True)
class Solution:
    """A solved rebalance.

    Attributes:
        weights: ``[n]``, >= 0, sum 1 (less where "invested" was relaxed).
        objective: scores'w, less risk_aversion / 2 times the active variance where a risk aversion was given.
        relaxed: limits that had to give way; empty on an ordinary date.
        status: "relaxed" where any limit gave way; the weights are optimal under the limits as widened.
        iterations: of the solver, summed over what was solved.
    """

    weights: NDArray[np.float64]
    objective: float
    relaxed: tuple[Relaxed, ...]
    status: Literal["optimal", "relaxed"]
    iterations: int

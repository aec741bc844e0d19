"""A factor risk model: what a portfolio may lose together, by industries and styles.

The return of a session is explained by exposures of the evening before,

    r_i(t+1) = g_industry(i)(t+1) + sum_s x_is(t) f_s(t+1) + u_i(t+1),

one weighted regression per session over the universe (weights sqrt(float cap)). The covariance of the factor
returns g, f and the variances of the residuals u, both exponentially weighted over the past year, give the
covariance of the stocks: X F X' + diag(D). The design is the common one of fundamental models (Menchero, Orr and
Wang 2011, "The Barra US Equity Model (USE4)"); styles and shrinkage are ours, and of its refinements none is
taken: no serial-correlation, eigenfactor or volatility-regime adjustment.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from steppe.core.errors import DataError
from steppe.quant.bars import carried_closes
from steppe.quant.panel import Panel
from steppe.quant.performance import SESSIONS_PER_YEAR
from steppe.quant.portfolio import FactorRisk

__all__ = ["STYLES", "RiskModel"]

Array = NDArray[np.float64]

STYLES: Final = (
    "size",
    "beta",
    "momentum",
    "volatility_60",
    "volatility_20",
    "reversal",
    "liquidity",
)
"""The style exposures, in the order of their columns; see `RiskModel`."""

WINDOW: Final = 252  # sessions of factor and specific returns that are looked at (ours)
HALF_LIFE: Final = 84  # sessions, of factor and specific variances (USE4S; its correlations use 504)
LEAST: Final = 60  # sessions of factor returns without which no covariance is given (ours)
REACH: Final = 3.0  # exposures are pulled in to this many standard deviations (USE4)
PRIOR: Final = 21.0  # observations that the mean specific variance counts as (ours)
FLOOR: Final = 0.1  # least specific variance, as a share of the mean one (ours)
BLOCK: Final = 126  # sessions whose regressions are made together


class RiskModel:
    """Factor risk of any date of one panel; sessions are regressed once, in blocks, when a date first needs them.

    Styles, from what is known at the close of t, in adjusted prices (windows are ours):

    - size: log float cap;
    - beta: slope on the float-cap weighted market return over 252 sessions, at least 126 of them traded;
    - momentum: log return from 252 to 21 sessions ago;
    - volatility_60, volatility_20: standard deviation of daily returns, at least 45 and 15 of them;
    - reversal: log return of the last 20 sessions;
    - liquidity: log of the mean of traded value / float cap over 60 sessions, at least 45 traded.

    Each is standardised by its mean and standard deviation over the universe of the date and pulled in to +-3.

    What is missing: a style that is not known is 0, the mean of the universe (a stock without float cap has size
    and liquidity 0 and, in the regressions, the smallest weight of the date; without any float cap on a date all
    weights are equal). Unknown industry is an industry of its own. A session counts for a stock if it traded on
    it and on the one before, so the jump after a suspension is nobody's risk. An industry without such a stock
    in the universe earns the mean of the others. A stock without residuals has the mean specific variance of the
    universe. Stocks outside the universe have exposures and residuals, but no say in factor returns and means.
    While a style is not known for anyone (momentum in a panel's first year) its return is 0: the model knows all it
    can after two years of bars.

    Args:
        panel: the market, T dates and N stocks.
        universe: ``[T, N]`` bool, the stocks whose returns make the factors: best all that trade and are
            seasoned, since the members of one index alone are few per industry.

    Raises:
        DataError: `universe` is not ``[T, N]``.
    """

    def __init__(self, panel: Panel, universe: NDArray[np.bool_]) -> None:
        if universe.shape != panel.shape:
            raise DataError(f"universe is {universe.shape}, expected {panel.shape} [dates, stocks].")
        self.panel = panel
        self.universe = universe
        dates, stocks = panel.shape
        self._price = carried_closes(panel.field("close"))
        traded = np.asarray(panel.traded)
        self._returns = np.full(panel.shape, np.nan, dtype=np.float32)
        np.divide(self._price[1:], self._price[:-1], out=self._returns[1:], where=traded[1:] & traded[:-1])
        self._returns -= 1
        self._factors = np.full((dates, self.industries + len(STYLES)), np.nan)
        self._residuals = np.full((dates, stocks), np.nan, dtype=np.float32)
        self._market = self._market_returns()
        self._done: set[int] = set()
        self._kept: tuple[int, NDArray[np.float32]] | None = None

    @property
    def industries(self) -> int:
        """Columns of industries: all of the panel's, then the unknown one."""
        return len(self.panel.industries) + 1

    def factor_returns(self, row: int) -> Array:
        """``[window, k]`` the daily returns of the factors up to `row`, oldest first; at most 252 sessions.

        Raises:
            DataError: fewer than 60 sessions before `row` could be regressed.
        """
        first = max(row + 1 - WINDOW, 0)
        for block in range(first // BLOCK, row // BLOCK + 1):
            self._estimate(block)
        window = self._factors[first : row + 1]
        window = window[np.isfinite(window[:, 0])]
        if len(window) < LEAST:
            raise DataError(
                f"panel {self.panel.name!r}: {len(window)} sessions up to {self.panel.dates[row]} have factor "
                f"returns, a risk model needs {LEAST}. Start later, or give a panel that begins earlier."
            )
        return window

    def at(self, row: int, stocks: ArrayLike) -> FactorRisk:
        """The risk of `stocks` as known at the close of `row`; nothing after it is read.

        Args:
            row: index into ``panel.dates``.
            stocks: ``[n]`` indices into ``panel.symbols``.

        Returns:
            exposures ``[n, k]``: one-hot industries, then the styles; the covariance ``[k, k]`` of the factors,
            positive definite; specific variances ``[n]``. Both per year (252 sessions), for simple returns, about
            0 and not about their means: those are small beside the noise of estimating them.

        Raises:
            DataError: fewer than 60 sessions before `row` could be regressed.
        """
        at = np.asarray(stocks, dtype=np.intp)
        factors = self.factor_returns(row)
        weight = _half_life_weights(len(factors))
        covariance = (factors * weight[:, None]).T @ factors * SESSIONS_PER_YEAR
        # an industry that repeats the others' mean leaves the matrix singular
        covariance += 1e-6 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        exposures = np.zeros((len(at), len(covariance)))
        exposures[np.arange(len(at)), self._groups(row)[at]] = 1.0
        exposures[:, self.industries :] = self._styles(row // BLOCK)[row % BLOCK, at]
        specific = self._specific(row)[at]
        return FactorRisk(exposures=exposures, covariance=covariance, specific=specific)

    def _specific(self, row: int) -> Array:
        """``[N]`` specific variances per year: weighted mean squares, pulled to the mean of the universe."""
        past = self._residuals[max(row + 1 - WINDOW, 0) : row + 1].astype(np.float64)
        seen = np.isfinite(past)
        weight = _half_life_weights(len(past))
        mass = weight @ seen
        square = weight @ np.where(seen, past, 0.0) ** 2
        known = mass > 0
        variance = np.divide(square, mass, out=np.zeros_like(mass), where=known)
        count = np.divide(mass**2, weight**2 @ seen, out=np.zeros_like(mass), where=known)  # effective number
        inside = known & self.universe[row]
        mean = float(variance[inside if inside.any() else known].mean())
        variance = (count * variance + PRIOR * mean) / (count + PRIOR)
        return np.maximum(variance, FLOOR * mean) * SESSIONS_PER_YEAR

    def _estimate(self, block: int) -> None:
        """Regress the sessions of a block on the exposures of the evenings before them."""
        if block in self._done:
            return
        previous = self._styles(block - 1)[-1] if block else None
        styles = self._styles(block)
        for offset in range(len(styles)):
            evening = styles[offset - 1] if offset else previous
            if evening is not None:
                self._regress(block * BLOCK + offset, evening)
        self._done.add(block)

    def _regress(self, session: int, styles: NDArray[np.float32]) -> None:
        evening = session - 1
        known = np.flatnonzero(np.isfinite(self._returns[session]))
        inside = self.universe[evening, known]
        x, y = styles[known].astype(np.float64), self._returns[session, known].astype(np.float64)
        group = self._groups(evening)[known]
        weight = np.where(inside, _root(self.panel.float_cap[evening, known], inside), 0.0)
        if inside.sum() <= self.industries + len(STYLES):
            return  # more factors than stocks
        mass = np.bincount(group, weight, self.industries)
        present = mass > 0

        def mean(a: Array) -> Array:
            total = np.bincount(group, weight * a, self.industries)
            return np.divide(total, mass, out=np.zeros_like(mass), where=present)

        # Frisch and Waugh: the styles' returns from deviations within industries, then the industries' from the rest
        centre = np.stack([mean(column) for column in x.T], axis=1)
        z = x - centre[group]
        moments = z.T @ (z * weight[:, None])
        style_returns = np.linalg.pinv(moments, rcond=1e-8, hermitian=True) @ (z.T @ (weight * y))
        rest = y - x @ style_returns
        industry_returns = mean(rest)
        industry_returns[~present] = np.average(industry_returns[present], weights=mass[present])
        self._factors[session] = np.concatenate([industry_returns, style_returns])
        self._residuals[session, known] = rest - industry_returns[group]

    def _groups(self, row: int) -> NDArray[np.intp]:
        industry = self.panel.industry[row].astype(np.intp)
        return np.where(industry >= 0, industry, self.industries - 1)

    def _market_returns(self) -> Array:
        """``[T]`` float-cap weighted return of the universe of the evening before; NaN without any."""
        out = np.full(len(self._returns), np.nan)
        for session in range(1, len(out)):
            inside = self.universe[session - 1] & np.isfinite(self._returns[session])
            if inside.any():
                cap = _root(self.panel.float_cap[session - 1, inside], True) ** 2
                out[session] = cap @ self._returns[session, inside] / cap.sum()
        return out

    def _styles(self, block: int) -> NDArray[np.float32]:
        """``[sessions of the block, N, styles]``, standardised. The last block asked for is kept."""
        if self._kept is not None and self._kept[0] == block:
            return self._kept[1]
        start, stop = block * BLOCK, min((block + 1) * BLOCK, len(self._returns))
        raw = self._raw_styles(start, stop)
        with np.errstate(invalid="ignore"):
            inside = np.where(self.universe[start:stop, :, None], raw, np.nan)
        seen = np.isfinite(inside)
        count = np.maximum(seen.sum(axis=1, keepdims=True), 1)
        mean = np.where(seen, inside, 0.0).sum(axis=1, keepdims=True) / count
        square = (np.where(seen, inside - mean, 0.0) ** 2).sum(axis=1, keepdims=True) / count
        scale = np.where(square > 1e-16, np.sqrt(square), np.inf)
        out = np.nan_to_num(np.clip((raw - mean) / scale, -REACH, REACH)).astype(np.float32)
        self._kept = block, out
        return out

    def _raw_styles(self, start: int, stop: int) -> Array:
        """``[stop - start, N, styles]`` before standardising; NaN where not known."""
        first = max(start - WINDOW, 0)
        rows = np.arange(start, stop)
        with np.errstate(invalid="ignore", divide="ignore"):
            log_price = np.log(self._price[first:stop].astype(np.float64))
            cap = self.panel.float_cap[first:stop].astype(np.float64)
            turnover = self.panel.field("vwap")[first:stop].astype(np.float64)
            turnover *= self.panel.field("volume")[first:stop]
            turnover /= cap
            returns = self._returns[first:stop].astype(np.float64)
            known = np.isfinite(returns)
            market = np.where(known, self._market[first:stop, None], np.nan)

            def rolling(a: Array | NDArray[np.bool_], sessions: int) -> Array:
                """Sum of the known values of the last sessions, at each of the rows."""
                total, end = _cumulative(np.where(np.isfinite(a), a, 0)), rows - first + 1
                return total[end] - total[np.maximum(end - sessions, 0)]

            def change(begin: int, end: int) -> Array:
                back = rows - begin - first
                out = log_price[np.maximum(rows - end - first, 0)] - log_price[np.maximum(back, 0)]
                out[back < 0] = np.nan
                return out

            def deviation(sessions: int) -> Array:
                count = rolling(known, sessions)
                out = rolling(returns**2, sessions) / count - (rolling(returns, sessions) / count) ** 2
                out[count < 0.75 * sessions] = np.nan
                return np.sqrt(np.maximum(out, 0))

            count, together = rolling(known, WINDOW), rolling(market, WINDOW)
            beta = rolling(returns * market, WINDOW) - rolling(returns, WINDOW) * together / count
            beta /= rolling(market**2, WINDOW) - together**2 / count
            beta[count < WINDOW // 2] = np.nan
            days = rolling(np.isfinite(turnover), 60)
            liquidity = np.log(rolling(turnover, 60) / days)
            liquidity[days < 45] = np.nan
            styles = {
                "size": np.log(cap[rows - first]),
                "beta": beta,
                "momentum": change(WINDOW, 21),
                "volatility_60": deviation(60),
                "volatility_20": deviation(20),
                "reversal": change(20, 0),
                "liquidity": liquidity,
            }
        out = np.stack([styles[name] for name in STYLES], axis=-1)
        out[~np.isfinite(out)] = np.nan
        return out


def _cumulative(a: Array) -> Array:
    """``[rows + 1, N]`` running sums along time, from 0."""
    out = np.zeros((len(a) + 1, a.shape[1]))
    for row, total, following in zip(a, out[:-1], out[1:], strict=True):  # np.cumsum strides down the columns
        np.add(row, total, out=following)
    return out


def _half_life_weights(sessions: int) -> Array:
    """``[sessions]`` 2 ** (-age / half-life), sum 1; the last session has age 0."""
    weight = 0.5 ** (np.arange(sessions - 1, -1, -1) / HALF_LIFE)
    return np.asarray(weight / weight.sum())


def _root(cap: NDArray[np.float32], inside: NDArray[np.bool_] | bool) -> Array:
    """Square roots of float caps; what is unknown gets the smallest of those inside, 1 if none is known."""
    known = np.isfinite(cap) & (cap > 0)
    root = np.sqrt(np.where(known, cap, 1.0).astype(np.float64))
    least = np.min(root, where=known & inside, initial=np.inf)
    return np.where(known, root, least if np.isfinite(least) else 1.0)

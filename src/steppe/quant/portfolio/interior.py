"""The quadratic programme, solved by a primal-dual interior point method that knows its structure.

    minimise over z   (x'(B F B' + D)x) / 2 - tilt * scores'x,   x = start - benchmark + S z,  0 <= z <= room

with the rows of `trades`. Written with the row sums r = J z as variables of their own, of which the factor exposures
y = B'x are some (an industry that is a factor too is one row, not two), the Newton equations are

    K dz + J'dp = a,   W dr - dp = b,   J dz - dr = c

where K holds the specific variances and the barrier of z: diagonal but for the pairs of a buy and a sell of one
stock; and W the factor covariance and the barrier of r, as small as there are rows (about 45). What is left to
factorise is J K^-1 J' + W^-1: O(columns x rows^2) an iteration (Woodbury's identity), all of it matrix products.
Predictor and corrector after Mehrotra (SIAM J. Optimization 2, 1992).

Every solve starts cold: the result depends on its own date alone, and as the specific variances make the optimum
unique there are no ties.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from steppe.quant.portfolio.market import FactorRisk
from steppe.quant.portfolio.trades import FIRST_INDUSTRY, IN_INDEX, INVESTED, SIZE, TURNOVER, Trades

__all__ = ["InteriorSolver"]

ITERATIONS = 80
# fraction of the way to the nearest bound that a step may go
STEP = 0.995
# sum of the distance-multiplier products at the end, for an objective scaled to gradients of spread 1
GAP = 1e-9

Vector: TypeAlias = NDArray[np.float64]


class InteriorSolver:
    """Solves one rebalance for any number of tilts; `iterations` counts over all of them."""

    def __init__(self, trades: Trades, risk: FactorRisk) -> None:
        self.trades, self.risk, self.iterations = trades, risk, 0
        market, traded = trades.market, trades.traded
        m = len(trades.row_low)
        exposures = np.ascontiguousarray(risk.exposures.T)
        row, extra = _match(exposures, trades)
        #: entries of the traded stocks in the rows, [m, t]; turnover, which is not signed, is left out
        self.rows = np.zeros((m + len(extra), len(traded)))
        self.rows[INVESTED] = 1
        self.rows[IN_INDEX] = market.in_index[traded]
        self.rows[SIZE] = market.size[traded]
        self.rows[FIRST_INDUSTRY + trades.group[traded], np.arange(len(traded))] = 1
        self.rows[m:] = exposures[np.ix_(extra, traded)] if len(extra) else 0

        covariance = (risk.covariance + risk.covariance.T) / 2
        # over the ranged rows: all but the first, the total weight, which is fixed
        self.covariance = np.zeros((len(self.rows) - 1, len(self.rows) - 1))
        self.covariance[np.ix_(row - 1, row - 1)] = covariance
        active = trades.start - market.benchmark
        self.row_linear = np.zeros(len(self.rows) - 1)
        self.row_linear[row - 1] = covariance @ (exposures @ active)
        self.specific = risk.specific[trades.stock]
        self.linear = trades.sign * (risk.specific * active)[trades.stock]
        self.scores = trades.sign * (market.scores - market.scores.mean())[trades.stock]

        reach = (
            1.1 * np.abs(self.rows)[:, _slots(trades)] @ trades.room + 1e-6
        )  # what no row's sum can exceed
        reach[TURNOVER] = 1.1 * float(trades.room.sum())
        free = np.full(len(extra), np.inf)
        self.low = np.maximum(np.concatenate([trades.row_low, -free]), -reach)
        self.high = np.minimum(np.concatenate([trades.row_high, free]), reach)

    def solve(self, tilt: float) -> Vector | None:
        """Amounts ``[c]`` of the best trades, or None where the method does not converge (then, as a rule, no trades
        satisfy every limit)."""
        with np.errstate(all="ignore"):  # without a solution the multipliers grow beyond all bounds
            try:
                return self._solve(tilt)
            except np.linalg.LinAlgError:
                return None

    def _solve(self, tilt: float) -> Vector | None:
        linear, row_linear = self.linear - tilt * self.scores, self.row_linear
        scale = float((linear + self.down(np.concatenate([[0.0], row_linear]))).std()) or 1.0
        linear, row_linear = linear / scale, row_linear / scale
        specific, covariance = self.specific / scale, self.covariance / scale
        buy, sell = self.pairs
        cross = specific[buy]

        # x: the columns and the ranged rows, for both have two bounds. state: the distances to the lower and to the
        # upper bounds and the multipliers of either, [4, c + m - 1]. Begin well centred: distance times multiplier
        # is the same everywhere.
        c, room = len(linear), self.trades.room
        lower = np.concatenate([np.zeros(c), self.low[1:]])
        width = np.concatenate([room, self.high[1:]]) - lower
        if not (c and width.min() > 0):
            return None
        typical = 0.5 * float(self.high[TURNOVER]) / c
        z = np.minimum(0.5 * room, typical)
        inside = np.minimum(0.1 * width[c:], 1e-3)
        r = np.clip(self.up(z)[1:] - lower[c:], inside, width[c:] - inside)
        state, step = np.empty((4, len(width))), np.empty((4, len(width)))
        state[0] = np.concatenate([z, r])
        state[1] = width - state[0]
        distance, multiplier = state[:2], state[2:]
        multiplier[:] = typical / distance
        p = np.zeros(len(self.low))

        for _ in range(ITERATIONS):
            z, r = state[0, :c], state[0, c:] + lower[c:]
            gradient = np.concatenate(
                [specific * z + linear + self.down(p), covariance @ r + row_linear - p[1:]]
            )
            gradient[buy] -= cross * z[sell]
            gradient[sell] -= cross * z[buy]
            off = self.up(z)
            off[INVESTED] -= self.low[INVESTED]
            off[1:] -= r
            gap = float(np.vdot(distance, multiplier))
            if gap < GAP and np.abs(off).max() < 1e-12 and np.abs(gradient - state[2] + state[3]).max() < GAP:
                return z
            if not np.isfinite(gap):
                return None
            self.iterations += 1
            slope = multiplier / distance
            newton = self._factorise(specific, covariance, slope[0] + slope[1], off)

            # predictor: straight for the solution
            step[0], _ = newton(-gradient)
            step[1] = -step[0]
            step[2:] = -multiplier - slope * step[:2]
            a = _longest(state, step)
            after = float(np.vdot(distance + a * step[:2], multiplier + a * step[2:]))
            # corrector: back towards the centre, and minus the predictor's second-order error
            push = (gap / distance.size * (after / gap) ** 3 - step[:2] * step[2:]) / distance
            step[0], dp = newton(push[0] - push[1] - gradient)
            step[1] = -step[0]
            step[2:] = push - multiplier - slope * step[:2]
            a = STEP * _longest(state, step)
            state += a * step
            p += a * dp
        return None

    @property
    def pairs(self) -> tuple[slice, slice]:
        """The columns of the stocks that may trade both ways: their buys, their sells."""
        first, buys = self.trades.first_sell, self.trades.buys
        return slice(first, buys), slice(buys, 2 * buys - first)

    def up(self, z: Vector) -> Vector:
        """J z: columns to rows."""
        buys, first = self.trades.buys, self.trades.first_sell
        change = np.zeros(self.rows.shape[1])
        change[:buys] = z[:buys]
        change[first:] -= z[buys:]
        out = self.rows @ change
        out[TURNOVER] = z.sum()
        return out

    def down(self, p: Vector) -> Vector:
        """J'p: rows to columns."""
        charge = p @ self.rows
        return np.concatenate([charge[: self.trades.buys], -charge[self.trades.first_sell :]]) + p[TURNOVER]

    def _factorise(
        self, specific: Vector, covariance: Vector, barrier: Vector, off: Vector
    ) -> Callable[[Vector], tuple[Vector, Vector]]:
        """A function that solves the Newton equations for a right side ``[c + m - 1]``; gives dx and dp ``[m]``."""
        rows, (buy, sell), c = self.rows, self.pairs, len(specific)
        buys, first = self.trades.buys, self.trades.first_sell
        k = barrier[:c] + specific
        # inverses of the 2 x 2 blocks [[k_buy, -d], [-d, k_sell]] of the pairs
        cross = specific[buy]
        det = k[buy] * k[sell] - cross**2
        k_inv = 1 / k
        k_inv[buy], k_inv[sell] = k[sell] / det, k[buy] / det
        k_cross = cross / det

        # J K^-1 J' stock by stock: a stock's buy and sell have opposite entries but in the turnover's row
        own, mixed = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
        own[:buys] = mixed[:buys] = k_inv[:buys]
        own[first:] += k_inv[buys:]
        mixed[first:] -= k_inv[buys:]
        own[first:buys] -= 2 * k_cross
        half = rows * np.sqrt(own)
        schur = half @ half.T  # a matrix times its own transpose costs half of a product
        schur[TURNOVER] = schur[:, TURNOVER] = rows @ mixed
        schur[TURNOVER, TURNOVER] = k_inv.sum() + 2 * k_cross.sum()
        # With s = (dp of the first row, dr) and dp = w s - (0, b): one small system, and no inverse of W.
        w = np.zeros_like(schur)
        w[0, 0] = 1
        w[1:, 1:] = covariance
        diagonal = np.arange(1, len(w))
        w[diagonal, diagonal] += barrier[c:]
        system = schur @ w
        system[diagonal, diagonal] += 1
        inverse = np.linalg.inv(system)

        def divide(v: Vector) -> Vector:
            out = k_inv * v
            out[buy] += k_cross * v[sell]
            out[sell] += k_cross * v[buy]
            return out

        def newton(right: Vector) -> tuple[Vector, Vector]:
            a = right[:c]
            total = self.up(divide(a)) + off + schur[:, 1:] @ right[c:]
            s = inverse @ total
            s += inverse @ (total - system @ s)  # an explicit inverse, refined once
            dp = w @ s
            dp[1:] -= right[c:]
            return np.concatenate([divide(a - self.down(dp)), s[1:]]), dp

        return newton


def _longest(state: Vector, step: Vector) -> float:
    """The longest step, at most 1, that keeps distances and multipliers >= 0."""
    shrink = float((step / state).min())
    return -1 / shrink if shrink < -1 else 1.0


def _slots(trades: Trades) -> NDArray[np.intp]:
    return np.concatenate([np.arange(trades.buys), np.arange(trades.first_sell, len(trades.traded))])


def _match(exposures: Vector, trades: Trades) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Row of each factor of ``exposures`` ``[k, n]``, and the factors that need rows of their own, after the rest.

    A factor that is the membership of an industry, or the size, is already among the rows.
    """
    k, m = len(exposures), len(trades.row_low)
    group = trades.group[(exposures != 0).argmax(axis=1)] if k else np.zeros(0, dtype=np.int32)
    row = np.full(k, -1)
    row[(exposures == (trades.group == group[:, None])).all(axis=1)] = FIRST_INDUSTRY
    row[row > 0] += group[row > 0]
    row[(exposures == trades.market.size).all(axis=1)] = SIZE
    first = np.zeros(k, dtype=bool)
    first[np.unique(row, return_index=True)[1]] = True  # a factor given twice has a row for each
    extra = np.flatnonzero((row < 0) | ~first)
    row[extra] = m + np.arange(len(extra))
    return row, extra

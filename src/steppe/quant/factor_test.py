"""The single-factor test: does a score order next week's returns?

RankIC and IC per date, how they decay, ten layers held for a week, and the same after industry and size are taken
out. The conventions are those of the published test the factor comes from: weekly dates, a 10-session label next to
a 5-session holding period, both entered at the vwap of t + 1, equal weights, NO costs. One of them looks ahead:
stocks that cannot be bought at t + 1 (no trade, or an open at the upper limit) are dropped before ranking,
which is not known at t. Judge an investable result by a backtest, not by this test.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from steppe.core.errors import DataError, SpecError
from steppe.quant import performance
from steppe.quant.labels import forward_returns_over
from steppe.quant.layers import form_layers, staggered_figures, top_figures
from steppe.quant.neutralise import Neutraliser
from steppe.quant.panel import Panel
from steppe.quant.ranking import Ordered, correlation, rank_autocorrelation

__all__ = ["HORIZONS", "FactorTest", "FactorTester", "factor_test", "stderr"]

HORIZONS = (1, 2, 3, 5, 10, 15, 20)
"""Sessions over which the decay of the RankIC is taken (ours)."""


@dataclass(frozen=True)
class FactorTest:
    """What `FactorTester.test` found. `holding` and `horizon` stand for their numbers of sessions (5 and 10).

    Attributes:
        ic: one row per evaluation date: date, stocks (scored, buyable, with a label), ic, rank_ic (label
            horizon), rank_ic_{holding}, rank_ic_neutral. Null where skipped.
        decay: horizon, rank_ic, rank_ic_stderr, dates: the mean RankIC of the same scores with the return over
            each horizon, over the dates that have it; not listed in `skipped`.
        layers: date, layer, ret: return over the holding period after the date; layer 1 has the lowest scores,
            the last layer the highest, layer 0 is the equal-weight universe. ret_{horizon}: the same stocks
            held for the label's horizon, null where that ends after the panel; entered: the share of the
            layer's stocks that were not in it on the layer date before.
        yearly: year, rank_ic, ic, rank_ic_ir, top_annual_excess, top_information_ratio, dates, by the year of
            the evaluation date; null where a year has too few.
        skipped: date, measure, reason: every date a measure could not be taken on.
        summary: see `FactorTester`.
    """

    ic: pl.DataFrame
    decay: pl.DataFrame
    layers: pl.DataFrame
    yearly: pl.DataFrame
    skipped: pl.DataFrame
    summary: dict[str, float]


class FactorTester:
    """Tests any number of factors on the same dates; what depends on the panel alone is prepared once.

    No costs; stocks not buyable at t + 1 are left out (see the module: this looks ahead). ICs are taken on
    every date. Layers are formed on the dates that lie at least `holding` sessions apart, counted from the
    first, so that holding periods never overlap: all of them, when dates are weekly.

    The summary of a test holds, for ic, rank_ic, rank_ic_5 (`holding`) and rank_ic_neutral each: the mean;
    ``_std`` over dates (ddof 1); ``_ir``, mean / std, the ICIR, not annualised; ``_positive``, share of dates
    above 0; ``_stderr`` of the mean, corrected for labels that overlap (`stderr`). For the top layer,
    annualised with 252 sessions: ``top_annual_return``, ``top_annual_excess`` over the equal-weight universe
    (period differences compounded), ``top_tracking_error``, ``top_information_ratio`` = annual excess /
    tracking error, ``top_max_drawdown`` of the excess, ``top_monthly_win_rate`` (share of calendar months
    with positive excess), ``top_turnover``, the mean of sum_i abs(w_i - w_i drifted) per rebalance
    (two-sided: 2 is a full exchange). ``top_annual_return_10``, ``top_annual_excess_10`` and
    ``top_information_ratio_10`` are the same for stocks held for the label's horizon; where that is longer
    than the layer dates lie apart, the mean over the series of every second (third, ...) date. Further
    ``rank_autocorrelation``, the mean Spearman correlation of scores on one layer date and the next, over the
    stocks scored on both; ``universe_annual_return``; and the counts ``dates``, ``layer_dates`` and
    ``stocks`` (mean per date).

    Args:
        panel: the market.
        rows: ``[D]`` increasing indices into ``panel.dates``, the evaluation dates.
        layers: layers by score; published 10 (20 is common for a whole market).
        horizon: sessions of the label of ic, rank_ic and rank_ic_neutral; published 10.
        holding: sessions a layer is held, and the return of ``rank_ic_5``; published 5.
        horizons: sessions of the decay.
        neutralise: form layers from scores neutralised to industry and size, as the published test does. Off
            by default (ours): a layer then is what the score itself would buy.

    Raises:
        DataError: rows that do not fit the panel.
        SpecError: fewer than two layers, or a horizon below 1.
    """

    def __init__(
        self,
        panel: Panel,
        rows: ArrayLike,
        *,
        layers: int = 10,
        horizon: int = 10,
        holding: int = 5,
        horizons: Sequence[int] = HORIZONS,
        neutralise: bool = False,
    ) -> None:
        if layers < 2:
            raise SpecError(f"layers {layers}: at least 2.")
        self.rows = at = panel.rows(rows)
        self.layers, self.horizon, self.holding, self.neutralise = layers, horizon, holding, neutralise
        self.horizons = tuple(horizons)
        self.dates = np.asarray(panel.dates[at])
        returns = forward_returns_over(panel, (horizon, holding, *horizons), rows=at)
        tomorrow = np.minimum(at + 1, len(panel.dates) - 1)  # beyond the end the return is NaN anyway
        # whoever trades at t + 1 has a return over every horizon that ends within the panel
        self.buyable = np.isfinite(returns[min(returns)]) & ~panel.limit_up[tomorrow]
        self.known = {sessions: at + 1 + sessions < len(panel.dates) for sessions in returns}
        self.order = {sessions: Ordered(values) for sessions, values in returns.items()}
        self.label_order = copy(self.order[horizon])  # of its own: neutral scores are known of other stocks
        self.returns = {sessions: returns[sessions] for sessions in (horizon, holding)}
        self.neutraliser = Neutraliser(np.asarray(panel.industry[at]), np.asarray(panel.float_cap[at]))
        self.layer_rows = _apart(at, holding)
        self.spacing = int(np.diff(at).min()) if len(at) > 1 else horizon

    def test(self, scores: ArrayLike) -> FactorTest:
        """Test one factor.

        Args:
            scores: ``[D, N]``, higher is better; NaN outside the universe of the date. float32 is fastest.

        Raises:
            DataError: shapes that do not fit, infinite scores, or a measure that cannot be taken on any date. On
                single dates a measure that cannot be taken (fewer than 2 x layers stocks, constant scores, a
                layer left empty by ties, a return beyond the panel's end) is skipped and listed in
                `FactorTest.skipped`; so is rank_ic_neutral throughout (NaN in the summary) for a panel
                without float caps.
        """
        x = self._checked(scores)
        order, valid = Ordered(x), np.isfinite(x) & self.buyable
        rank, scored = order.ranks(valid), np.where(valid, x, np.nan)
        neutral = self.neutraliser(scored)
        neutral_rank = Ordered(neutral).ranks(np.isfinite(neutral))

        by_horizon = {sessions: ordered.rank_ic(rank) for sessions, ordered in self.order.items()}
        held = f"rank_ic_{self.holding}"
        measures = {
            "rank_ic": (by_horizon[self.horizon].copy(), self.horizon, rank),
            held: (by_horizon[self.holding].copy(), self.holding, rank),
            "rank_ic_neutral": (self.label_order.rank_ic(neutral_rank), self.horizon, neutral_rank),
            "ic": (correlation(scored, self.returns[self.horizon]), self.horizon, rank),
        }
        skipped = _Skipped(2 * self.layers)
        summary = {"dates": float(len(x))}
        for key, (series, sessions, ranked) in measures.items():
            count = np.count_nonzero(ranked, axis=1)
            good = self._good(series, sessions, count)
            skipped.add(key, self.dates, ~good, self.known[sessions], count)
            if not good.any() and key != "rank_ic_neutral":  # a panel may have no float cap
                raise DataError(f"{key} cannot be taken on any of {len(x)} dates: {skipped.records[-1][2]}.")
            series[~good] = np.nan
            summary |= self._summary(key, series, sessions)
        stocks = np.where(self.known[self.horizon], np.count_nonzero(rank, axis=1), 0)
        summary["stocks"] = float(stocks.mean())
        ic = pl.DataFrame(
            {"date": self.dates, "stocks": stocks}
            | {key: measures[key][0] for key in ("ic", "rank_ic", held, "rank_ic_neutral")}
        ).fill_nan(None)

        at = self.layer_rows
        frame, top, layered = self._layer_test((neutral_rank if self.neutralise else rank)[at], skipped)
        summary |= top
        again = rank_autocorrelation(order.rows(at), np.isfinite(x[at]))
        summary["rank_autocorrelation"] = _mean(again[np.isfinite(again)])
        return FactorTest(
            ic=ic,
            decay=self._decay(by_horizon, np.count_nonzero(rank, axis=1)),
            layers=frame,
            yearly=self._yearly(measures["rank_ic"][0], measures["ic"][0], layered),
            skipped=skipped.frame(),
            summary=summary,
        )

    def _checked(self, scores: ArrayLike) -> NDArray[np.floating]:
        x = np.asarray(scores)
        if x.dtype != np.float32:
            x = x.astype(np.float64, copy=False)
        if x.shape != self.buyable.shape:
            raise DataError(
                f"scores are {x.shape}, expected {self.buyable.shape} [evaluation dates, stocks]."
            )
        infinite = np.isinf(x).any(axis=1)
        if infinite.any():
            day = self.dates[infinite][0]
            raise DataError(f"scores of {day} are infinite: mark what is outside the universe with NaN.")
        return x

    def _good(
        self, series: NDArray[np.float64], sessions: int, count: NDArray[np.integer]
    ) -> NDArray[np.bool_]:
        return self.known[sessions] & (count >= 2 * self.layers) & np.isfinite(series)

    def _summary(self, key: str, series: NDArray[np.float64], sessions: int) -> dict[str, float]:
        x = series[np.isfinite(series)]
        mean, std = _mean(x), float(np.std(x, ddof=1)) if len(x) > 1 else float("nan")
        return {
            key: mean,
            f"{key}_std": std,
            f"{key}_ir": mean / std if std > 0 else float("nan"),
            f"{key}_positive": _mean(x > 0),
            f"{key}_stderr": stderr(x, self._lags(sessions)),
        }

    def _lags(self, sessions: int) -> int:
        """Evaluation dates, less one, that a return over so many sessions reaches across."""
        return -(-sessions // self.spacing) - 1

    def _decay(self, by_horizon: dict[int, NDArray[np.float64]], count: NDArray[np.integer]) -> pl.DataFrame:
        kept = {h: by_horizon[h][self._good(by_horizon[h], h, count)] for h in self.horizons}
        return pl.DataFrame(
            {
                "horizon": list(kept),
                "rank_ic": [_mean(series) for series in kept.values()],
                "rank_ic_stderr": [stderr(series, self._lags(h)) for h, series in kept.items()],
                "dates": [len(series) for series in kept.values()],
            },
            schema_overrides=dict.fromkeys(("rank_ic", "rank_ic_stderr"), pl.Float64),
        ).fill_nan(None)

    def _layer_test(
        self, ranks: NDArray[np.float64], skipped: _Skipped
    ) -> tuple[pl.DataFrame, dict[str, float], tuple[NDArray[np.datetime64], NDArray[np.float64]]]:
        """The layers table, the top layer's figures, and the dates and returns of all layers."""
        at, last = self.layer_rows, self.layers
        dates, known = self.dates[at], self.known[self.holding][at]
        layers = form_layers(ranks, last)
        count = layers.size[:, 0]
        good = known & (count >= 2 * last) & (layers.size > 0).all(axis=1)
        skipped.add("layers", dates, ~good, known, count)
        if not good.any():
            raise DataError(
                f"layers cannot be formed on any of {len(dates)} dates: {skipped.records[-1][2]}."
            )
        layers, at, dates = layers.take(good), at[good], dates[good]
        held, later = self.returns[self.holding][at], self.returns[self.horizon][at]
        returns = layers.mean(held)
        longer = np.where(self.known[self.horizon][at][:, None], layers.mean(later), np.nan)
        long_name = f"ret_{self.horizon}"
        frame = pl.DataFrame(
            {
                "date": np.repeat(dates, last + 1),
                "layer": np.tile(np.arange(last + 1), len(dates)),
                "ret": returns.ravel(),
                long_name: longer.ravel(),
                "entered": layers.entered().ravel(),
            }
        ).with_columns(pl.col(long_name, "entered").fill_nan(None))
        figures = top_figures(returns, self.holding) | {
            "tracking_error": performance.tracking_error(
                returns[:, last], returns[:, 0], performance.SESSIONS_PER_YEAR / self.holding
            ),
            "max_drawdown": performance.max_drawdown(returns[:, last] - returns[:, 0]),
            "monthly_win_rate": performance.monthly_win_rate(returns[:, last], returns[:, 0], dates),
            "turnover": layers.turnover(held),
        }
        top = {f"top_{key}": value for key, value in figures.items()}
        top |= {
            f"top_{key}_{self.horizon}": value
            for key, value in staggered_figures(longer, self.rows[at], self.horizon).items()
        }
        top["layer_dates"] = float(len(dates))
        top["universe_annual_return"] = performance.annual_return(
            returns[:, 0], performance.SESSIONS_PER_YEAR / self.holding
        )
        return frame, top, (dates, returns)

    def _yearly(
        self,
        rank_ic: NDArray[np.float64],
        ic: NDArray[np.float64],
        layered: tuple[NDArray[np.datetime64], NDArray[np.float64]],
    ) -> pl.DataFrame:
        dates, returns = layered
        of_date, of_layers = (days.astype("datetime64[Y]").astype(int) + 1970 for days in (self.dates, dates))
        rows = []
        for year in np.unique(of_date):
            here = of_date == year
            ranked = self._summary("rank_ic", rank_ic[here], self.horizon)
            top = top_figures(returns[of_layers == year], self.holding)
            rows.append(
                {
                    "year": int(year),
                    "rank_ic": ranked["rank_ic"],
                    "ic": _mean(ic[here & np.isfinite(ic)]),
                    "rank_ic_ir": ranked["rank_ic_ir"],
                    "top_annual_excess": top["annual_excess"],
                    "top_information_ratio": top["information_ratio"],
                    "dates": int(here.sum()),
                }
            )
        return pl.DataFrame(rows).fill_nan(None)


def factor_test(
    scores: ArrayLike,
    panel: Panel,
    rows: ArrayLike,
    *,
    layers: int = 10,
    horizon: int = 10,
    holding: int = 5,
    horizons: Sequence[int] = HORIZONS,
    neutralise: bool = False,
) -> FactorTest:
    """Test one factor: `FactorTester` with these settings, and its `FactorTester.test` of `scores`."""
    settings = {"layers": layers, "horizon": horizon, "holding": holding}
    return FactorTester(panel, rows, **settings, horizons=horizons, neutralise=neutralise).test(scores)


def stderr(series: ArrayLike, lags: int = 0) -> float:
    """Standard error of the mean of a series that is correlated up to `lags` (Newey and West 1987, eq. 5).

    ``sqrt((g_0 + 2 sum_l (1 - l / (lags + 1)) g_l) / n)`` with the autocovariances g; lags 0 is std / sqrt(n)
    (ddof 1).
    """
    x = np.asarray(series, dtype=np.float64)
    n = len(x)
    if n < 2:
        return float("nan")
    d = x - x.mean()
    total = d @ d + 2 * sum(
        (1 - lag / (lags + 1)) * (d[lag:] @ d[:-lag]) for lag in range(1, min(lags, n - 1) + 1)
    )
    return float(np.sqrt(total / (n - 1) / n))


class _Skipped:
    """The dates a measure could not be taken on, each with its reason."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
        self.records: list[tuple[np.datetime64, str, str]] = []

    def add(
        self,
        measure: str,
        dates: NDArray[np.datetime64],
        bad: NDArray[np.bool_],
        known: NDArray[np.bool_],
        stocks: NDArray[np.integer],
    ) -> None:
        for d in np.flatnonzero(bad):
            if not known[d]:
                reason = "its return ends after the panel does"
            elif stocks[d] < self.needed:
                reason = f"{stocks[d]} stocks with a score and a return, {self.needed} needed"
            else:
                reason = "scores (or returns) are constant or tied so that a layer is empty"
            self.records.append((dates[d], measure, reason))

    def frame(self) -> pl.DataFrame:
        return pl.DataFrame(
            {
                "date": np.array([d for d, _, _ in self.records], dtype="datetime64[D]"),
                "measure": [m for _, m, _ in self.records],
                "reason": [r for _, _, r in self.records],
            },
            schema={"date": pl.Date, "measure": pl.String, "reason": pl.String},
        )


def _apart(rows: NDArray[np.int64], sessions: int) -> NDArray[np.int64]:
    """Positions of the rows that lie at least `sessions` after the one kept before."""
    kept = [0]
    for position in range(1, len(rows)):
        if rows[position] - rows[kept[-1]] >= sessions:
            kept.append(position)
    return np.array(kept)


def _mean(values: ArrayLike) -> float:
    """The mean; NaN of nothing (numpy's would warn)."""
    x = np.asarray(values, dtype=np.float64)
    return float(x.mean()) if len(x) else float("nan")

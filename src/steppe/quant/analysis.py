"""The analysis of a stock-factor study: factor tests and index-enhancement funds of every score, as tables.

A score is that of one optimizer and seed, of a part ("daily", "weekly") or their blend; where an optimizer has several
seeds, also the blend of its seeds' blends, with seed null. Beside them stands one that no model made (`no_model`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from steppe.problems.problem import Analysis
from steppe.quant.enhancement import PUBLISHED, Enhanced, enhance
from steppe.quant.factor_test import FactorTester
from steppe.quant.features import standardise
from steppe.quant.panel import Panel

__all__ = ["NO_MODEL", "Scores", "analyse", "blend", "no_model"]

NO_MODEL = "no_model"
"""What the tables call the score without a model in the place of an optimizer."""

BLEND = "blend"
COST = 0.002
"""Of the traded value, each side (published)."""


@dataclass(frozen=True)
class Scores:
    """One score and what the tables call it; ``values`` are ``[D, N]``, NaN outside the universe of the date."""

    optimizer: str
    seed: int | None
    part: str
    values: Tensor


def analyse(
    panel: Panel,
    rows: NDArray[np.intp],
    trained: Mapping[tuple[str, int], Mapping[str, Tensor]],
    reference: Tensor,
    *,
    horizon: int = 10,
    indices: Sequence[str] = (),
) -> Analysis:
    """All tables and facts of a study.

    Tables, each with optimizer, seed and part (or index, for the blends' funds) before its own columns: ``ic``,
    ``layers``, ``decay``, ``factor_yearly`` (`steppe.quant.factor_test.FactorTest`) and ``factor`` (its summary);
    ``fund_daily``, ``fund_rebalances``, ``fund_yearly`` (`steppe.quant.enhancement.Enhanced`) and ``fund`` (its
    summary), if there are indices. ``scores`` holds optimizer, date, symbol and score: the blend averaged over the
    seeds, or of the only one.

    Args:
        panel: the market, T dates and N stocks.
        rows: ``[D]`` the dates of the scores.
        trained: ``[D, N]`` scores by (optimizer, seed) and part. Without any, there are no tables.
        reference: ``[D, N]`` the score of `no_model`.
        horizon: sessions of the label.
        indices: index names, a fund on each for every blend.
    """
    if not trained:
        return Analysis({})
    scores = [*_with_blends(trained), Scores(NO_MODEL, None, BLEND, reference)]
    blends = [score for score in scores if score.part == BLEND]
    tables = _factor_tables(FactorTester(panel, rows, horizon=horizon), scores)
    tables["scores"] = _scores_table(panel, rows, blends)
    if not indices:
        return Analysis(tables)
    funds = [
        (score, enhance(panel, score.values.numpy(), rows, index, cost=COST))
        for index in indices
        for score in blends
    ]
    return Analysis(tables | _fund_tables(funds), {"fund": _fund_facts([fund for _, fund in funds])})


def blend(scores: Sequence[Tensor]) -> Tensor:
    """The equal-weight mean of ``[dates, stocks]`` scores, standardised per date over the stocks all of them score.

    A stock that one of them does not score is NaN.
    """
    stacked = torch.stack(list(scores))
    common = torch.isfinite(stacked).all(dim=0)
    blended = torch.full_like(scores[0], torch.nan)
    for date_row in range(len(blended)):
        stocks = common[date_row]
        blended[date_row, stocks] = standardise(stacked[:, date_row, stocks].T).mean(dim=-1)
    return blended


def no_model(
    close: NDArray[np.float32], rows: NDArray[np.intp], universe: NDArray[np.bool_], sessions: int = 20
) -> Tensor:
    """The blend of minus the return and minus the volatility of the last 20 sessions: what any model has to beat.

    Short-term reversal and low volatility, no parameters. Nothing after a date is read.

    Args:
        close: ``[T, N]`` adjusted closes, carried through suspensions.
        rows: ``[D]`` the dates of the scores, each at least `sessions` after the first.
        universe: ``[D, N]``.

    Returns:
        ``[D, N]`` float32; NaN outside the universe and for stocks listed for less than 20 sessions.
    """
    reversal = np.full((len(rows), close.shape[1]), np.nan, dtype=np.float32)
    calm = reversal.copy()
    for k, row in enumerate(rows):
        stocks = np.flatnonzero(universe[k])
        prices = close[row - sessions : row + 1, stocks].astype(np.float64)
        reversal[k, stocks] = 1 - prices[-1] / prices[0]
        calm[k, stocks] = -(prices[1:] / prices[:-1]).std(axis=0, ddof=1)
    return blend([torch.from_numpy(reversal), torch.from_numpy(calm)])


def _with_blends(trained: Mapping[tuple[str, int], Mapping[str, Tensor]]) -> list[Scores]:
    """The trained parts, the blend of each optimizer and seed, and where there are several seeds, over them."""
    found = []
    blends: dict[str, list[Tensor]] = defaultdict(list)
    for (optimizer, seed), parts in trained.items():
        whole = {**parts, BLEND: blend(list(parts.values()))}
        found += [Scores(optimizer, seed, part, values) for part, values in whole.items()]
        blends[optimizer].append(whole[BLEND])
    averages = {optimizer: blend(own) for optimizer, own in blends.items() if len(own) > 1}
    return found + [Scores(optimizer, None, BLEND, values) for optimizer, values in averages.items()]


def _factor_tables(tester: FactorTester, scores: Sequence[Scores]) -> dict[str, pl.DataFrame]:
    tables: dict[str, list[pl.DataFrame]] = defaultdict(list)
    for score in scores:
        test = tester.test(score.values.numpy())
        frames = {
            "ic": test.ic,
            "layers": test.layers,
            "decay": test.decay,
            "factor_yearly": test.yearly,
            "factor": pl.DataFrame([test.summary]),
        }
        for name, frame in frames.items():
            tables[name].append(_labelled(frame, score, part=score.part))
    return {name: pl.concat(frames, how="vertical_relaxed") for name, frames in tables.items()}


def _fund_tables(funds: Sequence[tuple[Scores, Enhanced]]) -> dict[str, pl.DataFrame]:
    tables: dict[str, list[pl.DataFrame]] = defaultdict(list)
    for score, fund in funds:
        frames = {
            "fund_daily": fund.daily,
            "fund_rebalances": fund.rebalances,
            "fund_yearly": fund.yearly,
            "fund": pl.DataFrame([fund.summary]),
        }
        for name, frame in frames.items():
            tables[name].append(_labelled(frame, score, index=fund.index))
    return {name: pl.concat(frames, how="vertical_relaxed") for name, frames in tables.items()}


def _fund_facts(funds: Sequence[Enhanced]) -> dict[str, Any]:
    """What the funds assume, and how much they would trade of the market."""
    by_index: dict[str, list[Enhanced]] = defaultdict(list)
    for fund in funds:
        by_index[fund.index].append(fund)
    limits = PUBLISHED
    return {
        "indices": {
            index: {"weights": found[0].weights, "benchmark": found[0].benchmark}
            for index, found in by_index.items()
        },
        "cost": COST,
        "limits": {
            "active weight of a stock": f"±{limits.active:.1%}",
            "weight in the index": f"at least {limits.in_index:.0%}",
            "active weight of an industry": f"±{limits.industry:.0%}",
            "active size": f"±{limits.size} standard deviations",
            "two-sided turnover": f"{limits.turnover:.0%} a rebalance",
        },
        "notes": [
            note
            for index, found in by_index.items()
            for note in (_copy(index, found[0]), _capacity(index, found))
        ],
    }


def _copy(index: str, fund: Enhanced) -> str:
    return (
        f"The weights of {index} that active weights are against, held without costs, stray from the index by "
        f"{fund.copy_tracking_error:.1%} a year: a part of every fund's tracking error that no optimizer can see."
    )


def _capacity(index: str, funds: Sequence[Enhanced]) -> str:
    mean, high = (
        fmean(fund.capacity[key] for fund in funds) for key in ("participation", "participation_95")
    )
    return (
        f"With {funds[0].capacity['assets'] / 1e6:,.0f} million in currency units, orders of a {index} fund would be "
        f"{mean:.2%} of the stock's traded value of the session in the mean and {high:.2%} at the 95th percentile."
    )


def _scores_table(panel: Panel, rows: NDArray[np.intp], blends: Sequence[Scores]) -> pl.DataFrame:
    averaged = {score.optimizer for score in blends if score.seed is None}
    frames = []
    for score in blends:
        if score.seed is None or score.optimizer not in averaged:
            values = score.values.numpy()
            date, stock = np.nonzero(np.isfinite(values))
            frames.append(
                pl.DataFrame(
                    {
                        "optimizer": np.full(len(date), score.optimizer),
                        "date": panel.dates[rows[date]],
                        "symbol": panel.symbols[stock],
                        "score": values[date, stock],
                    }
                )
            )
    return pl.concat(frames)


def _labelled(frame: pl.DataFrame, score: Scores, **label: str) -> pl.DataFrame:
    key = [pl.lit(score.optimizer).alias("optimizer"), pl.lit(score.seed, dtype=pl.Int64).alias("seed")]
    return frame.select(*key, *(pl.lit(value).alias(name) for name, value in label.items()), pl.all())

"""The flagship problem: daily and weekly GRU factors of one market, blended and put through the factor test."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from steppe.core.errors import DataError, SpecError, explain_validation, unknown
from steppe.quant.bars import daily_bars, rolling_bars
from steppe.quant.factor_model import FactorProblem, Split
from steppe.quant.factor_test import factor_test
from steppe.quant.features import standardise
from steppe.quant.labels import forward_returns
from steppe.quant.panel import Panel

__all__ = ["StockFactor", "blend", "make_split"]

WEEK = 5
"""Sessions in a weekly bar."""

Block = Annotated[tuple[date, date], Field(description="first and last date, both included")]


class StockFactorSpec(BaseModel):
    """Settings of `StockFactor`, with where each default comes from.

    Attributes:
        panel: ``"simulated"`` or the path of a long table, a folder of them, or a saved panel.
        schema: path of the panel's schema file, where it needs one.
        simulated: arguments of `steppe.quant.sources.simulated.simulated_market`; not read for another panel.
        train, validation, test: first and last date of each block, both included.
        universe: index names; a stock belongs on the dates it is a member of any. Empty: every listed stock.
        horizon: sessions of the label, vwap(t+1+horizon)/vwap(t+1) - 1 (published: 10).
        every: sessions between two dates of a block (published for another table of the same authors: 5).
        daily_window: sessions (published: 30).
        weekly_window: rolling five-session bars (ours: 20).
        hidden, layers: of each GRU (published: 64 and 2).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    panel: str = "simulated"
    schema_path: str | None = Field(default=None, alias="schema")
    simulated: dict[str, Any] = Field(default_factory=dict)
    train: Block
    validation: Block
    test: Block
    universe: tuple[str, ...] = ()
    horizon: int = Field(default=10, ge=1)
    every: int = Field(default=5, ge=1)
    daily_window: int = Field(default=30, ge=2)
    weekly_window: int = Field(default=20, ge=2)
    hidden: int = Field(default=64, ge=1)
    layers: int = Field(default=2, ge=1)


class StockFactor:
    """The stock-selection problem of a study (`steppe.problems.problem.StudyProblem`); see `StockFactorSpec`.

    Raises:
        SpecError: an unknown setting or a bad value.
        DataError: the panel cannot be read, lacks an index, or does not cover the blocks.
    """

    def __init__(self, **settings: Any) -> None:
        try:
            self.spec = StockFactorSpec.model_validate(settings)
        except ValidationError as error:
            raise SpecError(explain_validation(error, StockFactorSpec, "[problem]")) from error
        self.panel = _read(self.spec)
        self.split = make_split(self.panel, self.spec)

    @cached_property
    def parts(self) -> Mapping[str, FactorProblem]:
        """``daily`` and ``weekly``: one GRU each, trained apart."""
        spec = self.spec
        bars = daily_bars(self.panel)
        labels = forward_returns(self.panel, spec.horizon)
        universe = universe_mask(self.panel, spec.universe)
        size = {"hidden": spec.hidden, "layers": spec.layers}
        return {
            "daily": FactorProblem(bars, labels, universe, self.split, window=spec.daily_window, **size),
            "weekly": FactorProblem(
                rolling_bars(bars, WEEK),
                labels,
                universe,
                self.split,
                window=spec.weekly_window,
                stride=WEEK,
                **size,
            ),
        }

    @property
    def identity(self) -> Mapping[str, Any]:
        """The settings and the panel's fingerprint, not its path."""
        settings = self.spec.model_dump(mode="json", exclude={"panel", "schema_path", "simulated"})
        return settings | {"panel": self.panel.fingerprint}

    def describe(self) -> Mapping[str, Any]:
        """Facts of the panel for the report."""
        panel, (dates, stocks) = self.panel, self.panel.shape
        return {
            "name": panel.name,
            "simulated": panel.simulated,
            "dates": [str(panel.dates[0]), str(panel.dates[-1])],
            "sessions": dates,
            "stocks": stocks,
            "fingerprint": panel.fingerprint,
            "notes": list(panel.notes),
            "blocks": {
                block: {
                    "first": str(panel.dates[rows[0]]),
                    "last": str(panel.dates[rows[-1]]),
                    "dates": len(rows),
                }
                for block, rows in vars(self.split).items()
            },
            "samples per epoch": {name: part.samples for name, part in self.parts.items()},
        }

    def analyse(
        self, outputs: Mapping[tuple[str, int], Mapping[str, Mapping[str, Tensor]]]
    ) -> dict[str, pl.DataFrame]:
        """The factor test of every part and of the blend: tables ``ic``, ``layers``, ``factor``."""
        tables: dict[str, list[pl.DataFrame]] = {"ic": [], "layers": [], "factor": []}
        for (optimizer, seed), parts in outputs.items():
            scores = {part: output["scores"] for part, output in parts.items()}
            for part, score in (scores | {"blend": blend(list(scores.values()))}).items():
                test = factor_test(score.numpy(), self.panel, self.split.test, horizon=self.spec.horizon)
                key = [
                    pl.lit(optimizer).alias("optimizer"),
                    pl.lit(seed).alias("seed"),
                    pl.lit(part).alias("part"),
                ]
                frames = {"ic": test.ic, "layers": test.layers, "factor": pl.DataFrame([test.summary])}
                for name, frame in frames.items():
                    tables[name].append(frame.select(*key, pl.all()))
        return {name: pl.concat(frames) for name, frames in tables.items() if frames}


def blend(scores: list[Tensor]) -> Tensor:
    """The equal-weight mean of ``[dates, stocks]`` scores, standardised per date over the stocks all of them score.

    A stock that one of them does not score is NaN.
    """
    stacked = torch.stack(scores)
    common = torch.isfinite(stacked).all(dim=0)
    blended = torch.full_like(scores[0], torch.nan)
    for date_row in range(len(blended)):
        stocks = common[date_row]
        blended[date_row, stocks] = standardise(stacked[:, date_row, stocks].T).mean(dim=-1)
    return blended


def universe_mask(panel: Panel, indices: tuple[str, ...]) -> NDArray[np.bool_]:
    """``[T, N]`` bool: traded, not under special treatment, and a member of any of ``indices`` (of none if empty)."""
    mask = np.asarray(panel.traded) & ~np.asarray(panel.special)
    if not indices:
        return mask
    for name in indices:
        if name not in panel.members:
            raise DataError(f"panel {panel.name!r}: {unknown('index', name, panel.members)}")
    return mask & np.logical_or.reduce([panel.members[name] for name in indices])


def make_split(panel: Panel, spec: StockFactorSpec) -> Split:
    """The rows of each block, every ``spec.every`` sessions, blocks apart and each label known inside its block.

    A label of date t is complete at t + 1 + horizon, so the last ``horizon + 1`` sessions of the train and the
    validation block are dropped (embargo). The test block keeps all its dates: scores need no label.

    Raises:
        DataError: blocks overlap, are out of order or not covered by the panel, or the embargo leaves nothing.
    """
    blocks = {"train": spec.train, "validation": spec.validation, "test": spec.test}
    rows: dict[str, NDArray[np.intp]] = {}
    before: date | None = None
    for name, (first, last) in blocks.items():
        if first > last or (before is not None and first <= before):
            raise DataError(
                f"the {name} block {first} .. {last} must come after the block before it and not end before it starts."
            )
        before = last
        start = int(np.searchsorted(panel.dates, np.datetime64(first)))
        stop = int(np.searchsorted(panel.dates, np.datetime64(last), side="right"))
        embargo = 0 if name == "test" else spec.horizon + 1
        rows[name] = np.arange(start, stop - embargo, spec.every, dtype=np.intp)
        if len(rows[name]) == 0:
            raise DataError(
                f"the {name} block {first} .. {last} has {stop - start} sessions in panel {panel.name!r} "
                f"({panel.dates[0]} .. {panel.dates[-1]}), and an embargo of {embargo} leaves none."
            )
    return Split(**rows)


def _read(spec: StockFactorSpec) -> Panel:
    if spec.panel == "simulated":
        from steppe.quant.sources.simulated import simulated_market

        return simulated_market(**spec.simulated)
    from steppe.quant.sources.table import read_panel

    return read_panel(Path(spec.panel), None if spec.schema_path is None else Path(spec.schema_path))

"""The flagship problem: daily and weekly GRU factors of one market, blended, tested and made into funds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from steppe.core.errors import DataError, SpecError, explain_validation, unknown
from steppe.problems.problem import Analysis
from steppe.quant.analysis import analyse, no_model
from steppe.quant.bars import daily_bars, rolling_bars
from steppe.quant.factor_model import FactorProblem, Feed
from steppe.quant.gru import Precision, path
from steppe.quant.labels import forward_returns
from steppe.quant.panel import FIELDS, Panel
from steppe.quant.universe import universe_mask
from steppe.quant.walk_forward import Split, WalkForward, single_split, walk_forward_splits

__all__ = ["StockFactor", "StockFactorSpec", "make_splits"]

WEEK = 5
"""Sessions in a weekly bar."""

Block = Annotated[tuple[date, date], Field(description="first and last date, both included")]


class StockFactorSpec(BaseModel):
    """Settings of `StockFactor`, with where each default comes from.

    Attributes:
        panel: ``"simulated"`` or the path of a long table, a folder of them, or a saved panel.
        schema: path of the panel's schema file, where it needs one.
        simulated: arguments of `steppe.quant.sources.simulated.simulated_market`; not read for another panel.
        train, validation, test: first and last date of each block, both included: a single split.
        walk_forward: or blocks with retraining, see `steppe.quant.walk_forward.WalkForward`.
        universe: index names; a stock belongs on the dates it is a member of any. Empty: every listed stock.
        horizon: sessions of the label, vwap(t+1+horizon)/vwap(t+1) - 1 (published: 10).
        every: sessions between two dates of a block (published for another table of the same authors: 5).
        test_every: the same for the test dates alone. Default: `every` for a single split, 5 in a walk-forward.
        daily_window: sessions (published: 30).
        weekly_window: rolling five-session bars (ours: 20).
        hidden, layers: of each GRU (published: 64 and 2).
        precision: ``fp32``, ``bf16`` (needs a CPU with AMX and steppe-kernels), ``auto`` (bf16 where it is there, else
            fp32), or ``torch``, nn.GRU itself (`steppe.quant.gru`).
        funds: names of the indices that a fund follows with every blended score (`steppe.quant.enhancement`).
        batch_stocks: stocks drawn for a training batch; 0 takes all (`steppe.quant.factor_model.FactorProblem`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    panel: str = "simulated"
    schema_path: str | None = Field(default=None, alias="schema")
    simulated: dict[str, Any] = Field(default_factory=dict)
    train: Block | None = None
    validation: Block | None = None
    test: Block | None = None
    walk_forward: WalkForward | None = None
    universe: tuple[str, ...] = ()
    horizon: int = Field(default=10, ge=1)
    every: int = Field(default=5, ge=1)
    test_every: int | None = Field(default=None, ge=1)
    daily_window: int = Field(default=30, ge=2)
    weekly_window: int = Field(default=20, ge=2)
    hidden: int = Field(default=64, ge=1)
    layers: int = Field(default=2, ge=1)
    precision: Precision = "fp32"
    batch_stocks: int = Field(default=0, ge=0)
    funds: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_way_to_split(self) -> StockFactorSpec:
        blocks = {"train": self.train, "validation": self.validation, "test": self.test}
        given = [name for name, block in blocks.items() if block]
        if self.walk_forward and given:
            raise ValueError(
                f"walk_forward makes its own blocks: leave out {', '.join(given)}, or the table walk_forward"
            )
        if not self.walk_forward and len(given) < len(blocks):
            missing = ", ".join(name for name in blocks if name not in given)
            raise ValueError(f"{missing} missing: give train, validation and test, or the table walk_forward")
        if 0 < self.batch_stocks < FactorProblem.min_stocks:
            raise ValueError(
                f"batch_stocks {self.batch_stocks} is too few for a correlation: at least {FactorProblem.min_stocks}, "
                "or 0 for all"
            )
        return self


class StockFactor:
    """The stock-selection problem of a study (`steppe.problems.problem.StudyProblem`); see `StockFactorSpec`.

    Attributes:
        splits: the blocks by name; ``""`` is the name of a single split.

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
        self.splits = make_splits(self.panel.dates, self.spec)
        known = {*self.panel.members, *self.panel.weights}
        for index in self.spec.funds:  # what only the analysis reads must not fail after hours of training
            if index not in known:
                raise DataError(f"[problem] funds: {unknown('index', index, known)}")

    @cached_property
    def rows(self) -> NDArray[np.intp]:
        """``[D]`` panel rows of the test dates, all blocks together."""
        return np.concatenate([split.test for split in self.splits.values()])

    @cached_property
    def feeds(self) -> Mapping[str, Feed]:
        """What the models of each frequency read, shared by all blocks."""
        spec, panel = self.spec, self.panel
        bars = daily_bars(panel)
        labels = forward_returns(panel, spec.horizon)
        universe = universe_mask(panel, spec.universe)

        def feed(bars: NDArray[np.float32], window: int, stride: int) -> Feed:
            return Feed(bars, labels, universe, panel.dates, panel.symbols, window, stride)

        return {
            "daily": feed(bars, spec.daily_window, 1),
            "weekly": feed(rolling_bars(bars, WEEK), spec.weekly_window, WEEK),
        }

    @cached_property
    def parts(self) -> Mapping[str, FactorProblem]:
        """One GRU per block and frequency, trained apart: ``daily``, or ``daily-2016-12-30`` for a block."""
        spec = self.spec
        size = {"hidden": spec.hidden, "layers": spec.layers, "batch_stocks": spec.batch_stocks}
        return {
            part_name(frequency, block): FactorProblem(feed, split, **size, precision=spec.precision)
            for block, split in self.splits.items()
            for frequency, feed in self.feeds.items()
        }

    def stitched(self, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Frequency -> ``[D, N]`` scores at `rows`, from the outputs of all parts of one optimizer and seed."""
        return {
            frequency: torch.cat([parts[part_name(frequency, block)]["scores"] for block in self.splits])
            for frequency in self.feeds
        }

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
            "blocks": self._facts(self.splits.values()),
            "walk_forward": {name: self._facts([split]) for name, split in self.splits.items() if name},
            "GRU": f"{next(iter(self.parts.values())).precision} on {path(self.spec.precision)}",
            "samples per epoch": {name: part.samples for name, part in self.parts.items()},
        }

    def _facts(self, splits: Iterable[Split]) -> dict[str, dict[str, Any]]:
        """First, last and number of the dates of train, validation and test, over the given splits together."""
        facts = {}
        for block in ("train", "validation", "test"):
            dates = self.panel.dates[np.unique(np.concatenate([getattr(split, block) for split in splits]))]
            facts[block] = {"first": str(dates[0]), "last": str(dates[-1]), "dates": len(dates)}
        return facts

    def analyse(self, outputs: Mapping[tuple[str, int], Mapping[str, Mapping[str, Tensor]]]) -> Analysis:
        """Factor tests and funds of every score of which no part is missing: see `steppe.quant.analysis.analyse`."""
        whole = {key: parts for key, parts in outputs.items() if len(parts) == len(self.parts)}
        scores = {key: self.stitched(parts) for key, parts in whole.items()}
        universe = np.logical_and.reduce([feed.eligible[self.rows] for feed in self.feeds.values()])
        close = self.feeds["daily"].bars[:, :, FIELDS.index("close")]
        reference = no_model(close, self.rows, universe)
        return analyse(
            self.panel, self.rows, scores, reference, horizon=self.spec.horizon, indices=self.spec.funds
        )


def part_name(frequency: str, block: str) -> str:
    """The name of a part: the frequency's, with the block's where there are several."""
    return f"{frequency}-{block}" if block else frequency


def make_splits(dates: NDArray[np.datetime64], spec: StockFactorSpec) -> dict[str, Split]:
    """The blocks that the settings ask for, by name; one without a name for a single split."""
    if spec.walk_forward is None:
        assert spec.train  # all three, as the spec has checked
        assert spec.validation
        assert spec.test
        return {
            "": single_split(
                dates,
                spec.train,
                spec.validation,
                spec.test,
                horizon=spec.horizon,
                every=spec.every,
                test_every=spec.test_every,
            )
        }
    history = max(spec.daily_window - 1, WEEK * spec.weekly_window - 1)
    return walk_forward_splits(
        dates,
        spec.walk_forward,
        horizon=spec.horizon,
        every=spec.every,
        test_every=spec.test_every or WEEK,
        history=history,
    )


def _read(spec: StockFactorSpec) -> Panel:
    if spec.panel == "simulated":
        from steppe.quant.sources.simulated import simulated_market

        return simulated_market(**spec.simulated)
    from steppe.quant.sources.table import read_panel

    return read_panel(Path(spec.panel), None if spec.schema_path is None else Path(spec.schema_path))

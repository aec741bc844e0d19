"""The price-volume factor: a GRU over a stock's window of bars, trained on minus the IC of each cross-section.

Published: 6 fields, window 30 (daily), hidden 64, 2 layers, loss minus the information coefficient, AdamW
(Huatai AI series 84); series divided by its last value then standardised over the stocks (AI series 72).
Inferred: one date's cross-section per batch, every fifth date. Ours: window of 20 rolling five-session bars for the
weekly model, a single linear head without batch normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steppe.core.errors import DataError
from steppe.quant.features import cross_section, has_window, standardise
from steppe.quant.panel import FIELDS
from steppe.quant.ranking import correlation, rank_ic

__all__ = ["CrossSection", "FactorProblem", "GRUFactor", "Split", "ic_loss"]


class GRUFactor(nn.Module):
    """``[window, stocks, fields] -> [stocks]``: the last state of a GRU through a linear head."""

    def __init__(self, hidden: int = 64, layers: int = 2, fields: int = len(FIELDS)) -> None:
        super().__init__()
        self.gru = nn.GRU(fields, hidden, layers)
        self.head = nn.Linear(hidden, 1)

    def forward(self, windows: Tensor) -> Tensor:
        """Scores ``[stocks]``; higher is better."""
        states, _ = self.gru(windows)
        scores: Tensor = self.head(states[-1]).squeeze(-1)
        return scores


def ic_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Minus the information coefficient (Pearson correlation) of two vectors; 0 where one is constant."""
    scores, labels = scores - scores.mean(), labels - labels.mean()
    return -(scores * labels).sum() / (scores.norm() * labels.norm()).clamp_min(1e-12)


class CrossSection(NamedTuple):
    """One date's batch.

    Attributes:
        windows: ``[window, stocks, fields]`` standardised features of the date's universe.
        labelled: positions of the stocks that have a label.
        labels: their standardised labels.
    """

    windows: Tensor
    labelled: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Split:
    """Row numbers of the panel's dates. Train and validation rows end one label horizon before the block does."""

    train: NDArray[np.intp]
    validation: NDArray[np.intp]
    test: NDArray[np.intp]


class FactorProblem:
    """One frequency's GRU as a problem (`steppe.problems.problem.Problem`).

    Args:
        bars: ``[T, N, 6]`` float32, without holes (`steppe.quant.bars`).
        labels: ``[T, N]`` float32 forward returns; NaN where undefined.
        universe: ``[T, N]`` bool, the stocks whose scores are wanted at each date.
        split: the dates to train, validate and test on.
        window, stride: bars per window, sessions between them.
        hidden, layers: of the GRU.

    Raises:
        DataError: a date of the split has too few stocks with a full window.
    """

    watch = ("ic", 1)
    min_stocks = 20

    def __init__(
        self,
        bars: NDArray[np.float32],
        labels: NDArray[np.float32],
        universe: NDArray[np.bool_],
        split: Split,
        *,
        window: int,
        stride: int = 1,
        hidden: int = 64,
        layers: int = 2,
    ) -> None:
        self.bars, self.labels, self.split = bars, labels, split
        self.window, self.stride, self.hidden, self.layers = window, stride, hidden, layers
        self.eligible = universe & has_window(bars, window, stride)
        for block in ("train", "validation", "test"):
            rows = getattr(split, block)
            if block != "test":
                counts = (self.eligible[rows] & np.isfinite(labels[rows])).sum(axis=1)
            else:
                counts = self.eligible[rows].sum(axis=1)
            if len(rows) == 0 or counts.min() < self.min_stocks:
                where = (
                    f"date row {rows[counts.argmin()]} has {counts.min()}" if len(rows) else "it has no dates"
                )
                raise DataError(
                    f"the {block} block needs at least {self.min_stocks} stocks with a window of "
                    f"{window} x {stride} sessions on each date: {where}. Start the block later or widen the universe."
                )

    @property
    def samples(self) -> int:
        """Labelled stocks over all training dates."""
        rows = self.split.train
        return int((self.eligible[rows] & np.isfinite(self.labels[rows])).sum())

    def model(self, generator: torch.Generator) -> GRUFactor:
        """A `GRUFactor` with torch's default initialisation, drawn from the generator."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return GRUFactor(self.hidden, self.layers)

    def loss(self, model: nn.Module, batch: CrossSection) -> Tensor:
        """Minus the IC of the date's cross-section."""
        return ic_loss(model(batch.windows)[batch.labelled], batch.labels)

    def batches(self, generator: torch.Generator) -> Iterator[CrossSection]:
        """The training dates in random order, one date per batch."""
        for i in torch.randperm(len(self.split.train), generator=generator).tolist():
            yield self.batch(self.split.train[i])

    def full(self, split: str) -> Iterator[CrossSection]:
        """The dates of a split in order."""
        return (self.batch(date) for date in self._rows(split))

    def metrics(self, model: nn.Module, split: str) -> dict[str, float]:
        """``ic`` and ``rank_ic``: means over the dates; ``ir``: mean of the IC over its standard deviation."""
        rows = self._rows(split)
        scores, labels = self.scores(model, rows), self.labels[rows]
        # not nanmean: constant scores on a date mean a collapsed model, which must not go unseen
        ic, ranked = correlation(scores, labels), rank_ic(scores, labels)
        deviation = float(ic.std(ddof=1)) if len(ic) > 1 else float("nan")
        return {"ic": float(ic.mean()), "ir": float(ic.mean()) / deviation, "rank_ic": float(ranked.mean())}

    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """``scores``: [test dates, N] float32, NaN outside the universe; ``rows``: the panel rows of the dates."""
        scores = self.scores(model, self.split.test)
        return {
            "scores": torch.from_numpy(scores),
            "rows": torch.from_numpy(self.split.test.astype(np.int64)),
        }

    def batch(self, date: int) -> CrossSection:
        """The cross-section of one date. Features are standardised over the date's universe, labelled or not."""
        stocks = np.flatnonzero(self.eligible[date])
        labels = torch.from_numpy(self.labels[date, stocks])
        labelled = torch.nonzero(torch.isfinite(labels)).squeeze(-1)
        windows = cross_section(self.bars, date, stocks, self.window, self.stride)
        return CrossSection(windows, labelled, standardise(labels[labelled].unsqueeze(-1)).squeeze(-1))

    def scores(self, model: nn.Module, rows: Sequence[int] | NDArray[np.intp]) -> NDArray[np.float32]:
        """``[len(rows), N]`` float32 scores; NaN outside the universe. Reads nothing after each date."""
        scores = np.full((len(rows), self.bars.shape[1]), np.nan, dtype=np.float32)
        with torch.no_grad():
            for k, date in enumerate(rows):
                stocks = np.flatnonzero(self.eligible[date])
                windows = cross_section(self.bars, date, stocks, self.window, self.stride)
                scores[k, stocks] = model(windows).numpy()
        return scores

    def _rows(self, split: str) -> NDArray[np.intp]:
        rows: NDArray[np.intp] = getattr(self.split, split)
        return rows

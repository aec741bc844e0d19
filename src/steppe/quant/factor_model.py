"""The price-volume factor: a GRU over a stock's window of bars, trained on minus the IC of each cross-section.

Published: 6 fields, window 30 (daily), hidden 64, 2 layers, loss minus the information coefficient, AdamW
(Huatai AI series 84); series divided by its last value then standardised over the stocks (AI series 72).
Inferred: one date's cross-section per batch, every fifth date. Ours: window of 20 rolling five-session bars for the
weekly model, a single linear head without batch normalisation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steppe.core.errors import DataError
from steppe.quant.features import cross_section, has_window, standardise
from steppe.quant.gru import GRU, Precision, path, resolved
from steppe.quant.panel import FIELDS
from steppe.quant.ranking import correlation, rank_ic
from steppe.quant.walk_forward import Split

__all__ = ["CrossSection", "FactorProblem", "Feed", "GRUFactor", "ic_loss"]


class GRUFactor(nn.Module):
    """``[window, stocks, fields] -> [stocks]``: the last state of a GRU through a linear head."""

    def __init__(
        self, hidden: int = 64, layers: int = 2, fields: int = len(FIELDS), precision: Precision = "fp32"
    ) -> None:
        super().__init__()
        self.gru = GRU(fields, hidden, layers, precision=precision)
        self.head = nn.Linear(hidden, 1)

    def forward(self, windows: Tensor) -> Tensor:
        """Scores ``[stocks]``; higher is better."""
        scores: Tensor = self.head(self.gru(windows)).squeeze(-1)
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


@dataclass(frozen=True, eq=False)
class Feed:
    """All that the models of one frequency read of a market; made once and shared by them.

    Attributes:
        bars: ``[T, N, 6]`` float32, without holes (`steppe.quant.bars`).
        labels: ``[T, N]`` float32 forward returns; NaN where undefined.
        universe: ``[T, N]`` bool, the stocks whose scores are wanted at each date.
        dates: ``[T]`` datetime64[D].
        symbols: ``[N]`` str.
        window, stride: bars per window, sessions between them.
    """

    bars: NDArray[np.float32]
    labels: NDArray[np.float32]
    universe: NDArray[np.bool_]
    dates: NDArray[np.datetime64]
    symbols: NDArray[np.str_]
    window: int
    stride: int = 1

    @cached_property
    def eligible(self) -> NDArray[np.bool_]:
        """``[T, N]``: in the universe, with a full window."""
        return self.universe & has_window(self.bars, self.window, self.stride)

    def windows(self, date: int, stocks: NDArray[np.intp]) -> Tensor:
        """The stocks' features at a date row, ``[window, stocks, fields]``; reads nothing after it."""
        return cross_section(self.bars, date, stocks, self.window, self.stride)

    def digest(self, rows: NDArray[np.intp], *, labels: bool) -> str:
        """Hash of what a model reads on date rows: the dates, the eligible stocks, their windows and labels.

        A stock without bars leaves no trace, so neither later dates nor new listings change it.
        """
        found = hashlib.sha256(self.dates[rows].astype("datetime64[D]").astype(np.int64).tobytes())
        for row in np.unique(rows[:, None] - self.stride * np.arange(self.window)):
            found.update(self._bar_digests[row])
        for row in rows:
            stocks = self.eligible[row]
            found.update(self._stock_keys[stocks].tobytes())
            if labels:
                found.update(self.labels[row, stocks].tobytes())
        return found.hexdigest()

    @cached_property
    def _stock_keys(self) -> NDArray[np.uint64]:
        """``[N]``: a hash of each symbol, whatever column it stands in."""
        keys = b"".join(hashlib.blake2b(str(s).encode(), digest_size=8).digest() for s in self.symbols)
        return np.frombuffer(keys, dtype="<u8")

    @cached_property
    def _bar_digests(self) -> list[bytes]:
        """Per row; windows of many models overlap, so each row is hashed once."""
        known = ~np.isnan(self.bars[:, :, 0])
        return [
            hashlib.sha256(self._stock_keys[stocks].tobytes() + bars[stocks].tobytes()).digest()
            for bars, stocks in zip(self.bars, known, strict=True)
        ]


class FactorProblem:
    """One frequency's GRU on one split as a problem (`steppe.problems.problem.Problem`).

    Args:
        feed: what it reads.
        split: the dates to train, validate and test on.
        hidden, layers: of the GRU.
        precision: of its arithmetic (`steppe.quant.gru.GRU`); ``"auto"`` is settled here.
        batch_stocks: stocks of a training batch, drawn at random from the date's labelled ones for each epoch
            anew; 0 takes the whole cross-section. Steps get cheaper; features and labels are then standardised over
            the drawn stocks. Validation and scores always take the whole cross-section.

    Raises:
        DataError: a date of the split has too few stocks with a full window.
    """

    watch = ("ic", 1)
    min_stocks = 20

    def __init__(
        self,
        feed: Feed,
        split: Split,
        *,
        hidden: int = 64,
        layers: int = 2,
        batch_stocks: int = 0,
        precision: Precision = "fp32",
    ) -> None:
        path(precision)  # bf16 that this machine lacks is an error now, not in every trial
        self.precision = resolved(precision)
        self.feed, self.split = feed, split
        self.hidden, self.layers, self.batch_stocks = hidden, layers, batch_stocks
        for block in ("train", "validation", "test"):
            rows = getattr(split, block)
            wanted = feed.eligible[rows]
            counts = (wanted if block == "test" else wanted & np.isfinite(feed.labels[rows])).sum(axis=1)
            if len(rows) == 0 or counts.min() < self.min_stocks:
                where = (
                    f"{feed.dates[rows[counts.argmin()]]} has {counts.min()}"
                    if len(rows)
                    else "it has no dates"
                )
                raise DataError(
                    f"the {block} block needs at least {self.min_stocks} stocks with a window of {feed.window} x "
                    f"{feed.stride} sessions on each date: {where}. Start the block later or widen the universe."
                )

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """Model, batches, and the data of the training and validation dates."""
        return {
            "hidden": self.hidden,
            "layers": self.layers,
            "batch_stocks": self.batch_stocks,
            "window": self.feed.window,
            "stride": self.feed.stride,
            "train": self.feed.digest(self.split.train, labels=True),
            "validation": self.feed.digest(self.split.validation, labels=True),
            # the usual precision is not named: trials from before there was a choice keep their identity
            **({} if self.precision == "fp32" else {"precision": self.precision}),
        }

    @cached_property
    def output_identity(self) -> Mapping[str, Any]:
        """The data of the test dates, and where rows and columns of the scores lie in the panel."""
        return {
            "test": self.feed.digest(self.split.test, labels=False),
            "rows": self.split.test.tolist(),
            "symbols": hashlib.sha256("\n".join(self.feed.symbols.tolist()).encode()).hexdigest(),
        }

    @property
    def samples(self) -> int:
        """Stocks over all training batches of an epoch: the labelled ones, or `batch_stocks` of them."""
        rows = self.split.train
        counts = (self.feed.eligible[rows] & np.isfinite(self.feed.labels[rows])).sum(axis=1)
        return int(np.minimum(counts, self.batch_stocks or counts).sum())

    def model(self, generator: torch.Generator) -> GRUFactor:
        """A `GRUFactor` with torch's default initialisation, drawn from the generator."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return GRUFactor(self.hidden, self.layers, precision=self.precision)

    def loss(self, model: nn.Module, batch: CrossSection) -> Tensor:
        """Minus the IC of the date's cross-section."""
        return ic_loss(model(batch.windows)[batch.labelled], batch.labels)

    def batches(self, generator: torch.Generator) -> Iterator[CrossSection]:
        """The training dates in random order, one date per batch."""
        for i in torch.randperm(len(self.split.train), generator=generator).tolist():
            date = self.split.train[i]
            yield self._drawn(date, generator) if self.batch_stocks else self.batch(date)

    def full(self, split: str) -> Iterator[CrossSection]:
        """The dates of a split in order; of ``"test"``, those with too few labels (the last ones) are left out."""
        labelled = self.feed.eligible & np.isfinite(self.feed.labels)
        return (self.batch(date) for date in self._rows(split) if labelled[date].sum() >= self.min_stocks)

    def sample(self, split: str, dates: int, stocks: int) -> list[CrossSection]:
        """At most so many dates of `full`, each with at most so many labelled stocks, both evenly spaced.

        Features stay standardised over the date's universe, labels are over the stocks that are kept.
        """
        labelled = self.feed.eligible & np.isfinite(self.feed.labels)
        rows = self._rows(split)
        rows = rows[labelled[rows].sum(axis=1) >= self.min_stocks]
        return [self._thinned(self.batch(row), stocks) for row in rows[_spread(len(rows), dates)]]

    def metrics(self, model: nn.Module, split: str) -> dict[str, float]:
        """``ic`` and ``rank_ic``: means over the dates; ``ir``: mean of the IC over its standard deviation."""
        rows = self._rows(split)
        scores, labels = self.scores(model, rows), self.feed.labels[rows]
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
        return self._cross_section(date, np.flatnonzero(self.feed.eligible[date]))

    def scores(self, model: nn.Module, rows: Sequence[int] | NDArray[np.intp]) -> NDArray[np.float32]:
        """``[len(rows), N]`` float32 scores; NaN outside the universe. Reads nothing after each date."""
        eligible = self.feed.eligible
        scores = np.full((len(rows), eligible.shape[1]), np.nan, dtype=np.float32)
        with torch.no_grad():
            for k, date in enumerate(rows):
                stocks = np.flatnonzero(eligible[date])
                scores[k, stocks] = model(self.feed.windows(date, stocks)).numpy()
        return scores

    def _drawn(self, date: int, generator: torch.Generator) -> CrossSection:
        labelled = np.flatnonzero(self.feed.eligible[date] & np.isfinite(self.feed.labels[date]))
        chosen = torch.randperm(len(labelled), generator=generator)[: self.batch_stocks].sort().values
        return self._cross_section(date, labelled[chosen.numpy()])

    def _cross_section(self, date: int, stocks: NDArray[np.intp]) -> CrossSection:
        labels = torch.from_numpy(self.feed.labels[date, stocks])
        labelled = torch.nonzero(torch.isfinite(labels)).squeeze(-1)
        windows = self.feed.windows(date, stocks)
        return CrossSection(windows, labelled, standardise(labels[labelled].unsqueeze(-1)).squeeze(-1))

    def _thinned(self, batch: CrossSection, stocks: int) -> CrossSection:
        kept = torch.from_numpy(_spread(len(batch.labelled), stocks))
        labels = standardise(batch.labels[kept].unsqueeze(-1)).squeeze(-1)
        return CrossSection(
            batch.windows[:, batch.labelled[kept]].contiguous(), torch.arange(len(kept)), labels
        )

    def _rows(self, split: str) -> NDArray[np.intp]:
        rows: NDArray[np.intp] = getattr(self.split, split)
        return rows


def _spread(n: int, most: int) -> NDArray[np.intp]:
    """At most so many of ``0..n-1``, evenly spaced, both ends included."""
    return np.linspace(0, n - 1, min(n, most)).round().astype(np.intp)

"""What a source says of indices: membership, weights and levels, brought to the panel's dates and stocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steppe.core.errors import DataError
from steppe.quant.sources.checks import EXAMPLES, Ledger
from steppe.quant.sources.reading import index_of, side_table
from steppe.quant.sources.schema import Benchmarks, Members, Schema, Weights
from steppe.quant.sources.sides import NEVER

__all__ = ["IndexTables", "level_series", "member_planes", "weight_planes"]


@dataclass(frozen=True)
class IndexTables:
    """Tables about indices as the source has them; None where it has none.

    Attributes:
        spells: index, symbol, start, end (the last day in the index; null: still a member), dates.
        weights: index, symbol, date, known (the first day on which the row is known), weight; days since 1970.
        levels: index, date (days since 1970), close.
    """

    spells: pl.DataFrame | None = None
    weights: pl.DataFrame | None = None
    levels: pl.DataFrame | None = None

    @classmethod
    def read(cls, folder: Path, schema: Schema) -> IndexTables:
        """Read the side files that the schema names.

        Raises:
            DataError: a file or column is missing, a row lacks its index, symbol or date, a symbol of the schema is
                not in the file of levels.
        """
        return cls(
            spells=None if schema.members is None else _spells(folder, schema.members),
            weights=None if schema.weights is None else _weights(folder, schema.weights),
            levels=None if schema.benchmarks is None else _levels(folder, schema.benchmarks),
        )


def _spells(folder: Path, spec: Members) -> pl.DataFrame:
    names = {"symbol": spec.symbol, "start": spec.start, "end": spec.end}
    if spec.name is None:
        names["index"] = spec.index
    spells = side_table(folder / spec.file, names, ("start", "end"), "[members]")
    if spec.name is not None:
        spells = spells.with_columns(index=pl.lit(spec.name))
    spells = spells.with_columns(pl.col("index", "symbol").cast(pl.String)).unique(maintain_order=True)
    _no_holes(spells.select("index", "symbol", "start"), spec.file, "spells")
    if spec.ends == "exclusive":
        spells = spells.with_columns(pl.col("end") - pl.duration(days=1))
    return spells


def _weights(folder: Path, spec: Weights) -> pl.DataFrame:
    optional = {"index": None if spec.name is not None else spec.index, "known": spec.known}
    names = {"symbol": spec.symbol, "date": spec.date, "weight": spec.weight}
    names |= {key: name for key, name in optional.items() if name is not None}
    dates = ["date"] if spec.known is None else ["date", "known"]
    table = side_table(folder / spec.file, names, dates, "[weights]")
    if spec.name is not None:
        table = table.with_columns(index=pl.lit(spec.name))
    if spec.known is None:
        table = table.with_columns(known=pl.col("date") + pl.duration(days=spec.lag))
    early = table.filter(pl.col("known") < pl.col("date"))
    if early.height:
        raise DataError(
            f"{spec.file}: {early.height} weights are known before their date, such as that of "
            f"{early['symbol'][0]} on {early['date'][0]}; a snapshot holds closes of its date."
        )
    table = table.select(
        pl.col("index", "symbol").cast(pl.String),
        pl.col("date", "known").to_physical(),
        pl.col("weight").cast(pl.Float64).fill_nan(None),
    ).unique(maintain_order=True)
    _no_holes(table.drop("weight"), spec.file, "weights")
    return table


def _levels(folder: Path, spec: Benchmarks) -> pl.DataFrame:
    names = {"symbol": spec.symbol, "date": spec.date, "close": spec.close}
    table = side_table(folder / spec.file, names, ("date",), "[benchmarks]")
    table = table.with_columns(
        pl.col("symbol").cast(pl.String),
        pl.col("date").to_physical(),
        pl.col("close").cast(pl.Float64).fill_nan(None),
    )
    there = table["symbol"].unique()
    lacking = [symbol for symbol in spec.symbols.values() if symbol not in there]
    if lacking:
        raise DataError(
            f"{spec.file} has no {', '.join(lacking)}. It has: {', '.join(there.drop_nulls().sort().head(20))}. "
            "Correct [benchmarks] symbols in the schema."
        )
    parts = [
        table.filter(pl.col("symbol") == symbol).select(pl.lit(index).alias("index"), "date", "close")
        for index, symbol in spec.symbols.items()
    ]
    levels = pl.concat(parts) if parts else table.select(pl.lit("").alias("index"), "date", "close").clear()
    _no_holes(levels.select("date"), spec.file, "levels")
    return levels


def _no_holes(table: pl.DataFrame, file: str, what: str) -> None:
    holes = table.filter(pl.any_horizontal(pl.all().is_null()))
    if holes.height:
        raise DataError(
            f"{file}: {holes.height} {what} without {', '.join(table.columns)}; complete or drop them."
        )


def member_planes(
    spells: pl.DataFrame,
    days: NDArray[np.int32],
    symbols: NDArray[np.str_],
    ledger: Ledger,
    notes: list[str],
) -> dict[str, NDArray[np.bool_]]:
    """Point-in-time membership: index -> ``[T, N]`` bool. A spell counts on the sessions from its start to its end."""
    empty = pl.col("end") < pl.col("start")
    wrong = spells.filter(empty)
    ledger.add(
        "member_empty", wrong.height, map(" ".join, wrong.select("index", "symbol").head(5).iter_rows())
    )
    spells = spells.filter(empty.not_() | pl.col("end").is_null())

    sessions = len(days)
    first = np.searchsorted(days, spells["start"].to_physical().to_numpy(), "left")
    last = np.searchsorted(days, spells["end"].to_physical().fill_null(NEVER).to_numpy(), "right")
    stock = index_of(spells["symbol"], symbols)
    of_index = spells["index"].to_numpy()

    planes = {}
    for index in np.unique(of_index):
        spell = (of_index == index) & (first < last)
        absent = spell & (stock < 0)
        if absent.any():
            lost = spells["symbol"].filter(pl.Series(absent)).unique().sort()
            ledger.add("member_no_bars", len(lost), [f"{index} {symbol}" for symbol in lost.head(5)])
            share = (last - first)[absent].sum() / (last - first)[spell].sum()
            notes.append(f"{index}: {share:.1%} of its member-days belong to stocks without any bar")
        known = spell & (stock >= 0)
        steps = np.zeros((sessions + 1, len(symbols)), np.int16)
        np.add.at(steps, (first[known], stock[known]), 1)
        np.add.at(steps, (last[known], stock[known]), -1)
        depth = np.cumsum(steps, axis=0, out=steps)[:-1]
        doubled = np.flatnonzero((depth > 1).any(axis=0))
        ledger.add("member_overlap", len(doubled), [f"{index} {symbols[n]}" for n in doubled[:5]])
        planes[str(index)] = depth > 0
    return planes


def weight_planes(
    table: pl.DataFrame,
    days: NDArray[np.int32],
    symbols: NDArray[np.str_],
    price: NDArray[np.float32],
    members: Mapping[str, NDArray[np.bool_]],
    ledger: Ledger,
) -> dict[str, NDArray[np.float32]]:
    """Weights at the close of every session: index -> ``[T, N]`` float32, rows sum to 1, or 0 before the first.

    Args:
        table: `IndexTables.weights`.
        days: ``[T]`` sessions as days since 1970.
        symbols: ``[N]``.
        price: ``[T, N]`` adjusted closes, carried through suspensions.
        members: index -> ``[T, N]`` membership; members alone have weights, if the index is there.
        ledger: takes the rules that find something.
    """
    sound = (pl.col("weight").is_finite() & (pl.col("weight") >= 0)).fill_null(False)
    place = ("index", "symbol")
    wrong = table.filter(~sound)
    ledger.add("weight", wrong.height, map(" ".join, wrong.select(place).head(EXAMPLES).iter_rows()))
    table = table.filter(sound)
    twice = table.filter(pl.struct("index", "symbol", "date").is_duplicated())
    ledger.add("weight_conflict", twice.height, map(" ".join, twice.select(place).head(EXAMPLES).iter_rows()))
    absent = (
        table.filter(pl.Series(index_of(table["symbol"], symbols) < 0)).select(place).unique().sort(place)
    )
    ledger.add("weight_no_bars", absent.height, map(" ".join, absent.head(EXAMPLES).iter_rows()))

    planes = {}
    for index in sorted(table["index"].unique()):
        rows = table.filter(pl.col("index") == index)
        plane = np.zeros(price.shape, np.float32)
        for start, stop, date in _reigns(rows, days):
            snapshot = rows.filter((pl.col("date") == date) & (pl.col("known") <= int(days[start])))
            weight = np.zeros(len(symbols))
            stock = index_of(snapshot["symbol"], symbols)
            weight[stock[stock >= 0]] = snapshot["weight"].to_numpy()[stock >= 0]
            base = int(np.searchsorted(days, date, "right")) - 1  # the session whose closes made the weights
            with np.errstate(invalid="ignore"):
                drift = price[start:stop] / price[max(base, 0)].astype(np.float64)
            drifted = weight * np.where(np.isfinite(drift), drift, 1.0)
            if index in members:
                held = members[index][start:stop]
                drifted *= held
                new = np.flatnonzero((held & (weight == 0)).any(axis=0))
                ledger.add("weight_new_member", len(new), (f"{index} {symbols[n]}" for n in new))
            total = drifted.sum(axis=1, keepdims=True)
            plane[start:stop] = drifted / np.where(total > 0, total, 1.0)
        planes[str(index)] = plane
    return planes


def _reigns(rows: pl.DataFrame, days: NDArray[np.int32]) -> list[tuple[int, int, int]]:
    """(first session, session after the last, snapshot date) of the newest snapshot that is known."""
    # rows of one snapshot may become known on different days: each such day begins a new reign
    begins = rows.select("known", "date").unique().sort("known", "date")
    reigns: list[tuple[int, int]] = []
    for known, date in begins.iter_rows():
        start = int(np.searchsorted(days, known, "left"))
        newest = max(date, reigns[-1][1]) if reigns else date
        if reigns and reigns[-1][0] == start:
            reigns.pop()
        reigns.append((start, newest))
    ends = [start for start, _ in reigns[1:]] + [len(days)]
    return [(start, end, date) for (start, date), end in zip(reigns, ends, strict=True) if start < end]


def level_series(
    levels: pl.DataFrame, days: NDArray[np.int32], ledger: Ledger
) -> dict[str, NDArray[np.float64]]:
    """Closing levels: index -> ``[T]`` float64, NaN where the table has none."""
    sound = (pl.col("close").is_finite() & (pl.col("close") > 0)).fill_null(False)
    series = {}
    for index in levels["index"].unique(maintain_order=True):
        rows = levels.filter(pl.col("index") == index).unique(maintain_order=True)
        ledger.add("benchmark", rows.filter(~sound).height, [index])
        rows = rows.filter(sound)
        twice = rows.filter(pl.col("date").is_duplicated())
        ledger.add("benchmark_conflict", twice.height, (f"{index} {_date(d)}" for d in twice["date"]))
        at = np.searchsorted(days, rows["date"].to_numpy())
        here = np.append(days, NEVER)[at] == rows["date"].to_numpy()
        level = np.full(len(days), np.nan)
        level[at[here]] = rows["close"].to_numpy()[here]
        known = np.isfinite(level)
        between = np.maximum.accumulate(known) & np.maximum.accumulate(known[::-1])[::-1]
        gap = np.flatnonzero(between & ~known)
        ledger.add("benchmark_gap", len(gap), (f"{index} {_date(days[t])}" for t in gap))
        series[str(index)] = level
    return series


def _date(day: int) -> str:
    return str(np.datetime64(int(day), "D"))

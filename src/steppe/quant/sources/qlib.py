"""Qlib binary folders: calendars/day.txt, instruments/<market>.txt and features/<symbol>/<field>.day.bin.

A field file holds little-endian float32 numbers; the first is the index in the calendar of the second. Prices are
adjusted, factor = adjusted / raw price, volume is divided by the factor; suspended days are NaN.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steppe.core.errors import DataError
from steppe.quant.sources.indices import IndexTables
from steppe.quant.sources.reading import read_dates
from steppe.quant.sources.schema import REQUIRED, Columns

__all__ = ["QlibFolder", "is_qlib"]

ENDING: Final = ".day.bin"
LEVELS: Final = {
    "CSI100": "SH000903",
    "CSI300": "SH000300",
    "CSI500": "SH000905",
    "CSI800": "SH000906",
    "CSI1000": "SH000852",
    "SP500": "^GSPC",
    "NASDAQ100": "^NDX",
}
"""Markets whose index has a features folder of its own, under this symbol, in the sets that are passed around."""


def is_qlib(path: Path) -> bool:
    """Whether a folder is laid out like a Qlib data set."""
    return (path / "calendars" / "day.txt").is_file() and (path / "features").is_dir()


@dataclass(frozen=True)
class QlibFolder:
    """What lies in a Qlib folder, by name: nothing of the features is read yet.

    Attributes:
        path: the folder.
        features: symbol, upper case -> its folder.
        fields: symbol -> the fields it has.
        facts: relative path, size and modification time of every file: what a cache goes by.
    """

    path: Path
    features: Mapping[str, str]
    fields: Mapping[str, frozenset[str]]
    facts: tuple[tuple[str, int, int], ...]

    @classmethod
    def scan(cls, path: Path) -> QlibFolder:
        """List the folder."""
        features, fields, facts = {}, {}, []
        for name in ("calendars/day.txt", *sorted(f"instruments/{p.name}" for p in _markets(path))):
            stat = (path / name).stat()
            facts.append((name, stat.st_size, stat.st_mtime_ns))
        with os.scandir(path / "features") as folders:
            stocks = sorted((entry.name, entry.path) for entry in folders if entry.is_dir())
        for name, place in stocks:
            with os.scandir(place) as files:
                found = sorted((f.name, f.stat()) for f in files if f.name.endswith(ENDING))
            facts += [(f"{name}/{file}", stat.st_size, stat.st_mtime_ns) for file, stat in found]
            features[name.upper()] = place
            fields[name.upper()] = frozenset(file.removesuffix(ENDING) for file, _ in found)
        return cls(path, features, fields, tuple(facts))

    def columns(self, columns: Columns) -> Columns:
        """The columns with the money of community sets as the amount."""
        some = frozenset[str]().union(*self.fields.values())
        if columns.amount not in some and "money" in some and "amount" not in columns.model_fields_set:
            return columns.model_copy(update={"amount": "money"})
        return columns

    def read(self, columns: Columns) -> tuple[pl.DataFrame, IndexTables, list[str]]:
        """Bars in raw prices and volume (rows of suspended days are null), what is known of indices, and notes.

        Raises:
            DataError: a truncated or absurd file, named; a stock without a required field; an unreadable calendar or
                instruments file.
        """
        days = _calendar(self.path / "calendars" / "day.txt")
        spells = {path.stem: _spells(path) for path in _markets(self.path)}
        notes = []
        stocks = sorted(self.features)
        if "all" in spells:
            named = set(spells["all"]["symbol"])
            absent = sorted(named - self.features.keys())
            stocks = [symbol for symbol in stocks if symbol in named]
            if absent:
                notes.append(f"{len(absent)} instruments of all.txt have no features, such as {absent[0]}")
        if not stocks:
            raise DataError(f"{self.path}: no instrument of all.txt has a folder under features.")
        indices = self._indices(spells, days, set(stocks))
        bars = self._bars(stocks, days, self.columns(columns))
        return bars, indices, notes

    def _bars(self, stocks: list[str], days: NDArray[np.int32], columns: Columns) -> pl.DataFrame:
        own = {
            name: getattr(columns, name) for name in Columns.model_fields if name not in ("date", "symbol")
        }
        some = frozenset[str]().union(*(self.fields[symbol] for symbol in stocks))
        names = {name: field for name, field in own.items() if field in some or name in REQUIRED}
        parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
        sessions: list[NDArray[np.int32]] = []
        for symbol in stocks:
            place, there = self.features[symbol], self.fields[symbol]
            lacking = [names[name] for name in REQUIRED[2:] if names[name] not in there]
            if lacking:
                raise DataError(f"{place} has no {lacking[0]}{ENDING}.")
            series = {
                name: _series(f"{place}/{field}{ENDING}", len(days))
                for name, field in names.items()
                if field in there
            }
            start, close = series["close"]
            for name in names:
                parts[name].append(_aligned(*series.get(name, (start, close[:0])), start, len(close)))
            sessions.append(days[start : start + len(close)])
        long = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        if "factor" in long:
            with np.errstate(invalid="ignore", divide="ignore"):
                for name in {"open", "high", "low", "close", "vwap", "limit_up", "limit_down"} & long.keys():
                    long[name] /= long["factor"]
                long["volume"] *= long["factor"]
        stock = np.repeat(np.arange(len(stocks)), [len(part) for part in sessions])
        date = pl.Series(np.concatenate(sessions)).cast(pl.Date)
        symbols = pl.Series(stocks, dtype=pl.String).gather(stock)
        return pl.DataFrame(
            {columns.date: date, columns.symbol: symbols} | {names[name]: long[name] for name in names}
        )

    def _indices(
        self, spells: Mapping[str, pl.DataFrame], days: NDArray[np.int32], stocks: set[str]
    ) -> IndexTables:
        markets = {name.upper(): table for name, table in spells.items() if name != "all"}
        tables = [table.with_columns(index=pl.lit(name)) for name, table in markets.items()]
        levels = []
        for index in markets:
            symbol = LEVELS.get(index, "")
            if symbol in self.features and symbol not in stocks:
                place = f"{self.features[symbol]}/close{ENDING}"
                start, close = _series(place, len(days))
                there = np.isfinite(close)
                levels.append(
                    pl.DataFrame(
                        {
                            "index": [index] * int(there.sum()),
                            "date": days[start : start + len(close)][there],
                            "close": close[there].astype(np.float64),
                        }
                    )
                )
        return IndexTables(
            spells=pl.concat(tables) if tables else None, levels=pl.concat(levels) if levels else None
        )


def _markets(path: Path) -> list[Path]:
    return sorted((path / "instruments").glob("*.txt"))


def _calendar(path: Path) -> NDArray[np.int32]:
    text = pl.Series("day", path.read_text("utf-8").split("\n")).str.strip_chars()
    text = text.filter(text != "")
    read = pl.DataFrame(text).select(read_dates("day", pl.String()))["day"]
    if read.is_null().any() or not len(read):
        bad = text.filter(read.is_null())
        raise DataError(f"{path}: {f'unreadable day {bad[0]!r}' if len(bad) else 'no days'}.")
    days = read.to_physical().to_numpy()
    if (np.diff(days) <= 0).any():
        at = int(np.flatnonzero(np.diff(days) <= 0)[0]) + 1
        raise DataError(f"{path}: the days are not in order: {text[at]} comes after {text[at - 1]}.")
    return days


def _spells(path: Path) -> pl.DataFrame:
    """symbol, start, end of an instruments file; both ends count."""
    lines = [line.split("\t") for line in path.read_text("utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines, 1):
        if len(line) < 3:
            raise DataError(
                f"{path}, line {number}: expected symbol, start and end between tabs, not {line}."
            )
    columns = {name: [line[i].strip() for line in lines] for i, name in enumerate(("symbol", "start", "end"))}
    table = pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))
    read = table.select(
        pl.col("symbol").str.to_uppercase(),
        read_dates("start", pl.String()).alias("start"),
        read_dates("end", pl.String()).alias("end"),
    )
    bad = table.filter(read["start"].is_null() | read["end"].is_null())
    if bad.height:
        raise DataError(f"{path}: {bad.height} spells with unreadable dates, such as {bad.row(0)}.")
    return read


def _series(path: str, sessions: int) -> tuple[int, NDArray[np.float32]]:
    """The first session and the numbers of a field file."""
    try:
        with open(path, "rb", buffering=0) as stream:  # a third of what np.fromfile takes for so small a file
            raw = stream.read()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}.") from error
    if not len(raw) or len(raw) % 4:
        raise DataError(
            f"{path} is truncated: {len(raw)} bytes are no whole number of float32. Copy it again."
        )
    numbers = np.frombuffer(raw, "<f4")
    start = float(numbers[0])
    if not (start >= 0 and start == int(start) and start + len(numbers) - 1 <= sessions):
        raise DataError(
            f"{path} does not fit the calendar of {sessions} days: it starts at {start:g} and holds "
            f"{len(numbers) - 1} days."
        )
    return int(start), numbers[1:]


def _aligned(start: int, values: NDArray[np.float32], first: int, count: int) -> NDArray[np.float32]:
    """The values of `count` sessions from the `first`, NaN where there are none."""
    if start == first and len(values) == count:
        return values
    aligned = np.full(count, np.nan, np.float32)
    begin, end = max(start, first), min(start + len(values), first + count)
    if begin < end:
        aligned[begin - first : end - first] = values[begin - start : end - start]
    return aligned

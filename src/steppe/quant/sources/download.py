"""Downloads from data vendors into a folder that `read_panel` reads: parquet per stock and a schema.

Every stock is one file that appears whole or not at all: a broken download resumes with the same command.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import tomli_w

from steppe.core.errors import DataError, SpecError, SteppeError, unknown
from steppe.core.files import write_atomically
from steppe.quant.sources.adapters import ADAPTERS, Adapter
from steppe.quant.sources.schema import Benchmarks, Members, Schema, Securities, Weights
from steppe.quant.sources.vendors import CHINA_LIMITS, canonical, canonical_symbol, vendor_of

__all__ = ["download"]


def download(
    vendor: str,
    out: Path,
    *,
    symbols: Sequence[str] = (),
    index: str | None = None,
    start: dt.date,
    end: dt.date | None = None,
    show: Callable[[int, int], None] = lambda done, of: None,
) -> Path:
    """Download daily bars into a folder that `read_panel` reads; what is there already is not fetched again.

    Args:
        vendor: a key of `ADAPTERS`.
        out: the folder: bars/<symbol>.parquet, side files and panel.toml.
        symbols: stocks in any style of symbols.
        index: all stocks that were in this index in the time asked for (as far as the vendor knows), with its
            membership, its weights and its level where the vendor has them.
        start: first day.
        end: last day; default: that of the download in the folder, else today.
        show: called with the number of stocks done and of all.

    Returns:
        the folder.

    Raises:
        SpecError: an unknown vendor or index, neither symbols nor an index, dates the wrong way round.
        DataError: the vendor's package or token is missing, or the vendor fails: says for which stock; the folder
            holds another download.
    """
    if vendor not in ADAPTERS:
        raise SpecError(unknown("vendor", vendor, ADAPTERS))
    if end is None:
        end = _State.end(out) or dt.date.today()
    if end < start:
        raise SpecError(f"start {start} is after end {end}.")
    if not symbols and index is None:
        raise SpecError("name stocks with symbols, or an index.")
    if index is not None and index not in ADAPTERS[vendor].indices:
        known = ", ".join(ADAPTERS[vendor].indices) or "none"
        raise SpecError(f"{vendor} has no constituents of {index!r}; it has: {known}. Name symbols instead.")
    request = {
        "vendor": vendor,
        "index": index,
        "start": str(start),
        "end": str(end),
        "symbols": sorted(symbols),
    }
    state = _State.open(out, request)
    adapter = ADAPTERS[vendor]()
    try:
        _fetch(adapter, state, symbols, index, start, end, show)
    finally:
        adapter.close()
    return out


@dataclass(frozen=True)
class _State:
    """A download's folder: what was asked for, and what there is to tell of the stocks that are done."""

    folder: Path
    request: dict[str, Any]
    notes: dict[str, None]  # an ordered set

    @classmethod
    def open(cls, folder: Path, request: dict[str, Any]) -> _State:
        """Begin or resume.

        Raises:
            DataError: the folder holds another download.
        """
        (folder / "bars").mkdir(parents=True, exist_ok=True)
        path = folder / "download.json"
        notes: list[str] = []
        if path.is_file():
            found = json.loads(path.read_text("utf-8"))
            if found["request"] != request:
                raise DataError(
                    f"{folder} holds another download, {found['request']}: choose another folder."
                )
            notes = found["notes"]
        state = cls(folder, request, dict.fromkeys(notes))
        state.tell()
        return state

    @staticmethod
    def end(folder: Path) -> dt.date | None:
        """The last day of the download in a folder."""
        path = folder / "download.json"
        if not path.is_file():
            return None
        return dt.date.fromisoformat(json.loads(path.read_text("utf-8"))["request"]["end"])

    def tell(self, *notes: str) -> None:
        """Keep new notes, also for a run that resumes this one."""
        new = [note for note in notes if note not in self.notes]
        self.notes.update(dict.fromkeys(new))
        path = self.folder / "download.json"
        if new or not path.is_file():
            text = json.dumps(
                {"request": self.request, "notes": list(self.notes)}, ensure_ascii=False, indent=1
            )
            write_atomically(path, lambda file: file.write_text(text, "utf-8"))

    def write(self, table: pl.DataFrame, name: str) -> None:
        """Write a parquet file whole or not at all."""
        write_atomically(self.folder / name, table.write_parquet)


def _fetch(
    adapter: Adapter,
    state: _State,
    symbols: Sequence[str],
    index: str | None,
    start: dt.date,
    end: dt.date,
    show: Callable[[int, int], None],
) -> None:
    sides: dict[str, Any] = {}
    given = pl.DataFrame({"symbol": list(symbols)}, schema={"symbol": pl.String})
    stocks = sorted(given.select(canonical_symbol(pl.col("symbol"))).to_series().unique())
    if index is not None:
        state.tell(*adapter.notes)
        inside = _asked(adapter, index, lambda: adapter.constituents(index, start, end))
        assert inside is not None  # `download` has asked for a known index
        inside = inside.with_columns(canonical_symbol(pl.col("symbol")))
        stocks = sorted({*stocks, *inside["symbol"]})
        sides |= _index_files(state, index, inside)
        levels = _asked(adapter, f"the level of {index}", lambda: adapter.levels(index, start, end))
        if levels is not None:
            state.write(levels.with_columns(pl.lit(index).alias("symbol")), "levels.parquet")
            sides["benchmarks"] = Benchmarks(file="levels.parquet", symbols={index: index})
    listing = _asked(adapter, "the list of securities", lambda: adapter.securities(stocks))
    if listing is not None:
        listing = listing.with_columns(canonical_symbol(pl.col("symbol"))).filter(
            pl.col("symbol").is_in(stocks)
        )
        state.write(listing.unique("symbol", keep="first", maintain_order=True), "securities.parquet")
        sides["securities"] = Securities(
            file="securities.parquet", list_date="list_date", last_date="last_date"
        )
    _bars(adapter, state, stocks, start, end, show)
    schema = Schema(bars="bars/*.parquet", notes=tuple(state.notes), price_limit=CHINA_LIMITS, **sides)
    text = tomli_w.dumps(schema.model_dump(exclude_defaults=True, exclude_none=True))
    write_atomically(state.folder / "panel.toml", lambda path: path.write_text(text, "utf-8"))


def _bars(
    adapter: Adapter,
    state: _State,
    stocks: Sequence[str],
    start: dt.date,
    end: dt.date,
    show: Callable[[int, int], None],
) -> None:
    """Fetch the bars of every stock that is not there yet."""
    empty = []
    for done, symbol in enumerate(stocks):
        show(done, len(stocks))
        if (state.folder / "bars" / f"{symbol}.parquet").is_file():
            continue
        table = _asked(adapter, symbol, partial(adapter.bars, symbol, start, end))
        if table is None or not table.height:
            empty.append(symbol)
            continue
        vendor = vendor_of(table.columns)
        if vendor is None:
            raise DataError(
                f"{adapter.package}: the table of {symbol} has columns this version does not know: "
                f"{', '.join(table.columns)}."
            )
        bars, _, notes = canonical(vendor, table, symbol)
        state.tell(f"downloaded with {adapter.package}, {start} to {end}", *notes[1:])
        state.write(bars, f"bars/{symbol}.parquet")
    show(len(stocks), len(stocks))
    if empty:
        shown = f"{', '.join(empty[:5])} from {start} to {end}"
        if len(empty) == len(stocks):
            raise DataError(f"{adapter.package} has no bars of {shown}.")
        state.tell(f"{adapter.package} has no bars of {len(empty)} stocks, such as {shown}")


def _index_files(state: _State, index: str, inside: pl.DataFrame) -> dict[str, Any]:
    """Membership spells and weights from snapshots; nothing if they are undated (of today)."""
    if inside["date"].is_null().any():
        return {}
    days = inside["date"].unique().sort()
    until = pl.DataFrame({"start": days, "end": days.shift(-1) - dt.timedelta(days=1)})
    spells = inside.select(pl.lit(index).alias("index"), "symbol", pl.col("date").alias("start"))
    state.write(spells.join(until, on="start").unique(maintain_order=True), "members.parquet")
    sides: dict[str, Any] = {"members": Members(file="members.parquet", ends="inclusive")}
    if "weight" in inside.columns:
        snapshots = inside.select(
            pl.lit(index).alias("index"),
            "symbol",
            (pl.col("date") - pl.duration(days=1)).alias("date"),
            pl.col("weight").cast(pl.Float64),
        )
        state.write(snapshots, "weights.parquet")
        sides["weights"] = Weights(file="weights.parquet")
    return sides


def _asked(adapter: Adapter, what: str, question: Callable[[], pl.DataFrame | None]) -> pl.DataFrame | None:
    """An answer of the vendor; whatever its package raises is told with what was asked."""
    try:
        return question()
    except SteppeError:
        raise
    except Exception as error:  # packages of vendors raise anything
        raise DataError(
            f"{adapter.package}: {what}: {type(error).__name__}: {error}. "
            "What is there stays; the same command resumes."
        ) from error

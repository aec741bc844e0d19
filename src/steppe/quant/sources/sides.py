"""Side files of stocks: securities and float shares, brought to the panel's dates and stocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steppe.core.errors import DataError
from steppe.quant.sources.checks import Ledger
from steppe.quant.sources.reading import index_of, side_table
from steppe.quant.sources.schema import FloatShares, Securities

__all__ = ["NEVER", "Facts", "ShareEvents", "read_float_shares", "read_securities"]

NEVER = np.iinfo(np.int32).max
"""A day that has not come: unknown, or not limited."""


@dataclass(frozen=True)
class Facts:
    """What the securities file says of each stock of the panel.

    Attributes:
        industry: ``[N]`` int16 index into `industries`, -1 unknown; None without such a column.
        industries: sorted names.
        list_day: ``[N]`` int32, `NEVER` unknown.
        last_day: ``[N]`` int32 last day listed, `NEVER` if still listed or unknown.
    """

    industry: NDArray[np.int16] | None
    industries: tuple[str, ...]
    list_day: NDArray[np.int32]
    last_day: NDArray[np.int32]


def read_securities(folder: Path, spec: Securities, symbols: NDArray[np.str_], ledger: Ledger) -> Facts:
    """The securities file by stock of the panel.

    Raises:
        DataError: a symbol appears twice.
    """
    optional = {"industry": spec.industry, "list_date": spec.list_date, "last_date": spec.last_date}
    names = {"symbol": spec.symbol} | {key: name for key, name in optional.items() if name is not None}
    dates = [name for name in ("list_date", "last_date") if name in names]
    table = side_table(folder / spec.file, names, dates, "[securities]")
    twice = table.filter(pl.col("symbol").is_duplicated())
    if twice.height:
        raise DataError(f"{spec.file}: {twice['symbol'][0]} has more than one row; keep one row per symbol.")
    stock = index_of(table["symbol"], symbols)
    known = stock >= 0
    lacking = np.setdiff1d(np.arange(len(symbols)), stock[known])
    ledger.add("no_security", len(lacking), symbols[lacking[:5]])

    def days(name: str) -> NDArray[np.int32]:
        column = np.full(len(symbols), NEVER, np.int32)
        if name in names:
            column[stock[known]] = table[name].to_physical().fill_null(NEVER).to_numpy()[known]
        return column

    last_day = days("last_date")
    if spec.as_of is not None:
        last_day[last_day >= np.datetime64(spec.as_of, "D").astype(np.int64)] = NEVER
    industry, industries = None, ()
    if spec.industry is not None:
        text = table["industry"].cast(pl.String).replace("", None)
        unique = text.drop_nulls().unique().sort()
        industry = np.full(len(symbols), -1, np.int16)
        industry[stock[known]] = index_of(text, unique)[known]
        industries = tuple(unique)
    return Facts(industry, industries, days("list_date"), last_day)


@dataclass(frozen=True)
class ShareEvents:
    """New free-float share counts, in order of the session from which they are known.

    Attributes:
        bounds: ``[T + 1]``: the events of session t are ``bounds[t]:bounds[t + 1]``, the later known last.
        stock: ``[E]`` index of the stock.
        shares: ``[E]`` float64, shares.
    """

    bounds: NDArray[np.int64]
    stock: NDArray[np.int32]
    shares: NDArray[np.float64]


def read_float_shares(
    folder: Path, spec: FloatShares, days: NDArray[np.int32], symbols: NDArray[np.str_], ledger: Ledger
) -> ShareEvents:
    """The float-shares file as events; what was known before the first session counts from it.

    Raises:
        DataError: unreadable dates or months; shares that are not numbers.
    """
    time = spec.date if spec.date is not None else spec.month
    assert time is not None  # the schema guarantees one of them
    names = {"symbol": spec.symbol, "time": time, "shares": spec.shares}
    table = side_table(folder / spec.file, names, ("time",) if spec.date else (), "[float_shares]")
    if spec.month is not None:
        table = table.with_columns(_months(table["time"], spec))
    table = table.with_columns(
        pl.col("symbol").cast(pl.String), pl.col("shares").cast(pl.Float64).fill_nan(None) * spec.scale
    )
    bad = pl.any_horizontal(pl.col("time", "symbol").is_null()) | ~(
        pl.col("shares").is_finite() & (pl.col("shares") > 0)
    ).fill_null(False)
    ledger.add("float_shares", table.filter(bad).height, table.filter(bad)["symbol"].head(5))
    table = table.filter(~bad).unique()
    twice = table.filter(pl.struct("symbol", "time").is_duplicated()).sort("symbol", "time")
    ledger.add("float_conflict", twice.height, [f"{s} {d} {v:g}" for s, d, v in twice.head(5).iter_rows()])
    table = table.sort("time", "symbol")
    stock = index_of(table["symbol"], symbols)
    absent = table["symbol"].filter(pl.Series(stock < 0)).unique().sort()
    ledger.add("float_no_bars", len(absent), absent.head(5))
    session = np.searchsorted(days, table["time"].to_physical().to_numpy(), "left")
    kept = stock >= 0
    bounds = np.searchsorted(session[kept], np.arange(len(days) + 1), "left")
    return ShareEvents(bounds, stock[kept], table["shares"].to_numpy()[kept])


def _months(months: pl.Series, spec: FloatShares) -> pl.Series:
    """The day from which each monthly row is known."""
    if months.dtype.is_temporal():
        start = months.cast(pl.Date).dt.month_start()
    else:
        text = months.cast(pl.String).str.strip_chars()
        start = (text + "-01").str.to_date("%Y-%m-%d", strict=False)
        start = start.fill_null((text + "01").str.to_date("%Y%m%d", strict=False))
    bad = months.filter(start.is_null())
    if len(bad):
        raise DataError(
            f"{spec.file}: {len(bad)} unreadable months, such as {bad[0]!r}; write them like 2015-03."
        )
    known = start if spec.known == "month_start" else start.dt.offset_by("1mo")
    return known.alias("time")

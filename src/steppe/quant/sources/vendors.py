"""Tables as data vendors hand them out: recognised by their columns, brought to canonical columns and plain units."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Final

import polars as pl

from steppe.core.errors import DataError
from steppe.quant.sources.reading import read_dates
from steppe.quant.sources.schema import REQUIRED, PriceLimit, Schema

__all__ = [
    "CHINA_LIMITS",
    "VENDORS",
    "Vendor",
    "canonical",
    "canonical_symbol",
    "frame_of",
    "long_form",
    "vendor_of",
]

LOT: Final = 100

_MAIN, _CHINEXT, _STAR, _BEIJING = ("SH60", "SZ00"), ("SZ30",), ("SH68",), ("BJ",)
CHINA_LIMITS: Final = (
    PriceLimit(width=0.10, prefix=_MAIN + _CHINEXT),
    PriceLimit(width=0.10, prefix=_MAIN, start=date(2023, 4, 10), free_sessions=5),
    PriceLimit(width=0.05, prefix=_MAIN + _CHINEXT, special=True),
    PriceLimit(width=0.20, prefix=_CHINEXT, start=date(2020, 8, 24), free_sessions=5),
    PriceLimit(width=0.20, prefix=_STAR, free_sessions=5),
    PriceLimit(width=0.30, prefix=_BEIJING, free_sessions=1),
)
"""Daily price limits of the Chinese exchanges; the last rule that fits holds."""


@dataclass(frozen=True)
class Vendor:
    """How one vendor's daily table looks.

    Attributes:
        name: the vendor.
        columns: canonical column, `preclose` (reference price), `status` (1 traded), `paused` (1 suspended) or
            `adjusted` (adjustment flag) -> the vendor's names for it; the first that is there counts.
        marks: at least one of these must be there: what tells this vendor from others.
        volume: shares per unit of volume.
        amount: currency per unit of amount.
        late: volume and amount of after-hours trading that is not in volume and amount.
        factored: prices and limits are adjusted by the factor of the row, volume is divided by it.
    """

    name: str
    columns: Mapping[str, tuple[str, ...]]
    marks: frozenset[str]
    volume: float = 1.0
    amount: float = 1.0
    late: tuple[str, str] | None = None
    factored: bool = False

    def names(self, available: Sequence[str]) -> dict[str, str]:
        """Canonical name -> the name in a table."""
        found = {
            key: next((name for name in own if name in available), None) for key, own in self.columns.items()
        }
        return {key: name for key, name in found.items() if name is not None}

    def fits(self, available: Sequence[str]) -> bool:
        """Whether a table with these columns comes from the vendor; the symbol may be in the file's name."""
        needed = {name for name in REQUIRED if name != "symbol"}
        return needed <= self.names(available).keys() and not self.marks.isdisjoint(available)


def _same(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


_OHLC = _same("open", "high", "low", "close")

VENDORS: Final = (
    Vendor(
        "AKShare",
        {
            "date": ("日期",),
            "symbol": ("股票代码", "代码"),
            "open": ("开盘",),
            "high": ("最高",),
            "low": ("最低",),
            "close": ("收盘",),
            "volume": ("成交量",),
            "amount": ("成交额",),
            "factor": ("factor",),
        },
        frozenset({"日期"}),
        volume=LOT,
    ),
    Vendor(
        "AKShare (Sina)",
        {
            **_OHLC,
            **_same("date", "symbol", "volume", "amount"),
            "float_shares": ("outstanding_share",),
        },
        frozenset({"outstanding_share"}),
    ),
    Vendor(
        "Baostock",
        {
            **_OHLC,
            **_same("date", "volume", "amount", "preclose"),
            "symbol": ("code",),
            "special": ("isST",),
            "status": ("tradestatus",),
            "adjusted": ("adjustflag",),
        },
        frozenset({"preclose", "tradestatus", "adjustflag"}),
    ),
    Vendor(
        "Tushare",
        {
            **_OHLC,
            "date": ("trade_date",),
            "symbol": ("ts_code",),
            "volume": ("vol",),
            "amount": ("amount",),
            "preclose": ("pre_close",),
            "factor": ("adj_factor",),
            "limit_up": ("up_limit",),
            "limit_down": ("down_limit",),
        },
        frozenset({"ts_code"}),
        volume=LOT,
        amount=1000,
        late=("ah_vol", "ah_amount"),
    ),
    Vendor(
        "yfinance",
        {
            "date": ("Date", "Datetime"),
            "symbol": ("Ticker", "Symbol"),
            "open": ("Open",),
            "high": ("High",),
            "low": ("Low",),
            "close": ("Close",),
            "adj_close": ("Adj Close",),
            "volume": ("Volume",),
        },
        frozenset({"Date", "Datetime"}),
    ),
    Vendor(
        "RQData",
        {
            **_OHLC,
            **_same("volume", "limit_up", "limit_down"),
            "date": ("date", "datetime"),
            "symbol": ("order_book_id",),
            "amount": ("total_turnover",),
            "preclose": ("prev_close",),
        },
        frozenset({"order_book_id"}),
    ),
    Vendor(
        "JoinQuant",
        {
            **_OHLC,
            **_same("volume", "factor", "paused"),
            "date": ("time", "date"),
            "symbol": ("code", "security"),
            "amount": ("money",),
            "vwap": ("avg",),
            "limit_up": ("high_limit",),
            "limit_down": ("low_limit",),
            "preclose": ("pre_close",),
        },
        frozenset({"money", "high_limit", "paused"}),
        factored=True,
    ),
    Vendor(
        "gm",
        {
            **_OHLC,
            **_same("symbol", "volume", "amount"),
            "date": ("eob", "bob"),
            "preclose": ("pre_close",),
        },
        frozenset({"eob", "bob"}),
    ),
)

_PRICES = ("open", "high", "low", "close", "vwap", "limit_up", "limit_down")
_UNITS = {"shares": 1.0, "lots of 100 shares": float(LOT)}
_MONEY = {"currency": 1.0, "1000 of currency": 1e3, "10000 of currency": 1e4}


def vendor_of(available: Sequence[str]) -> Vendor | None:
    """The vendor whose table has these columns."""
    return next((vendor for vendor in VENDORS if vendor.fits(available)), None)


def canonical_symbol(symbol: pl.Expr) -> pl.Expr:
    """600000.SH, sh.600000, 600000.XSHG, 600000.SS, SHSE.600000, sh600000 and 600000 become SH600000.

    What is none of these (AAPL, 0700.HK) stays as it is. A bare number is of Shanghai if it begins with 6, 9 or 5, of
    Beijing with 4, 8 or 920, else of Shenzhen.
    """
    text = symbol.cast(pl.String).str.strip_chars()
    upper = text.str.to_uppercase()
    suffix = r"^(\d{6})\.(SH|SZ|BJ|SS|XSHG|XSHE|BSE)$"
    prefix = r"^(SHSE|SZSE|BJSE|SH|SZ|BJ)\.?(\d{6})$"
    place = pl.coalesce(upper.str.extract(suffix, 2), upper.str.extract(prefix, 1)).replace(
        {"SS": "SH", "XSHG": "SH", "SHSE": "SH", "XSHE": "SZ", "SZSE": "SZ", "BSE": "BJ", "BJSE": "BJ"}
    )
    code = pl.coalesce(upper.str.extract(suffix, 1), upper.str.extract(prefix, 2))
    bare = text.str.extract(r"^(\d{1,6})$", 1).str.zfill(6)
    beijing = bare.str.contains(r"^(4|8|920)")
    of_bare = pl.when(beijing).then(pl.lit("BJ")).when(bare.str.contains(r"^[569]")).then(pl.lit("SH"))
    return pl.coalesce(place + code, of_bare.otherwise(pl.lit("SZ")) + bare, text)


def frame_of(source: Any) -> pl.DataFrame:
    """A table in memory as polars: Arrow, or pandas without pyarrow; a named pandas index becomes columns."""
    if not hasattr(source, "reset_index"):
        return pl.DataFrame(source)
    if any(name is not None for name in source.index.names):
        source = source.reset_index()
    columns = {}
    for name in source.columns:
        column = source[name]
        plain = column.dtype.kind in "biuf"  # kind O: text and dates, with NaN or NaT for missing
        columns[str(name)] = column.to_numpy() if plain else [x if x == x else None for x in column.to_list()]
    return pl.DataFrame(columns)


def symbol_of_name(stem: str) -> str:
    """The symbol in a file's name: 600000_qfq, sh.600000 or AAPL."""
    code = re.search(r"(?i)(?<![a-z0-9])((?:sh|sz|bj)?[._]?)(\d{6})(\.[a-z]{2,4})?(?!\d)", stem)
    return stem if code is None else code[0].replace("_", "")


def long_form(table: pl.DataFrame) -> pl.DataFrame:
    """One row per stock and date of a wide table with column names like ('Close', 'AAPL'); others stay as they are.

    Such tables come from `yfinance.download` of several tickers: as a data frame with two levels of column names, in
    a parquet file with the levels as text, or in a CSV file whose first three lines are headers.
    """
    first = table.columns[0]
    if first == "Price" and table.height and table[first][0] == "Ticker":
        tickers = table.row(0)[1:]
        fields = [name.split("_duplicated_")[0] for name in table.columns[1:]]
        skip = 2 if table.height > 1 and table[first][1] in ("Date", "Datetime") else 1
        pairs = dict(zip(table.columns[1:], zip(fields, tickers, strict=True), strict=True))
        day, rows = first, table.slice(skip)
    else:
        pairs = {name: pair for name in table.columns if (pair := _pair(name)) is not None}
        days = [name for name in table.columns if name not in pairs or "Date" in pairs[name]]
        pairs = {name: pair for name, pair in pairs.items() if name not in days}
        if not pairs or len(days) != 1:
            return table
        day, rows = days[0], table
    fields_first = bool({"Close", "Open"} & {a for a, _ in pairs.values()})
    stocks: dict[str, dict[str, str]] = {}
    for name, (a, b) in pairs.items():
        field, ticker = (a, b) if fields_first else (b, a)
        stocks.setdefault(ticker, {})[field] = name
    parts = [
        rows.select(
            pl.col(day).alias("Date"),
            pl.lit(ticker).alias("Ticker"),
            *(pl.col(name).alias(field) for field, name in columns.items()),
        )
        for ticker, columns in stocks.items()
    ]
    long = pl.concat(parts, how="diagonal_relaxed")
    here = [name for name in ("Open", "High", "Low", "Close") if name in long.columns]
    nothing = [pl.col(name).cast(pl.Float64, strict=False).fill_nan(None).is_null() for name in here]
    return long.filter(~pl.all_horizontal(nothing)) if here else long


def _pair(name: str) -> tuple[str, str] | None:
    if not name.startswith("("):
        return None
    try:
        pair = ast.literal_eval(name)
    except (ValueError, SyntaxError):
        return None
    return (
        pair if isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(x, str) for x in pair) else None
    )


def canonical(
    vendor: Vendor, table: pl.DataFrame, where: str, *, adjusted: bool = False
) -> tuple[pl.DataFrame, Schema, list[str]]:
    """A vendor's table as canonical bars in plain units, its schema, and notes on what was recognised.

    The factor is the vendor's, or grows by previous close / reference price where unadjusted prices come with the
    reference price of the day (on an ex-date it is not the previous close).

    Args:
        vendor: whose columns the table has.
        table: all rows of all stocks.
        where: what the table is called in messages.
        adjusted: the prices are known to be adjusted (by the name of the file).

    Raises:
        DataError: no symbols; values that are not numbers; units in which amount / volume is no price.
    """
    names = vendor.names(table.columns)
    if "symbol" not in names:
        raise DataError(f"{where}: {vendor.name} columns without a symbol; add a column of symbols.")
    late = [name for name in vendor.late or () if name in table.columns]
    dates = read_dates(names["date"], table.schema[names["date"]])
    numbers = {key: _number(name) for key, name in names.items() if key not in ("date", "symbol")}
    try:
        bars = table.select(
            dates.alias("date"),
            canonical_symbol(pl.col(names["symbol"])).alias("symbol"),
            *(number.alias(key) for key, number in numbers.items()),
            *(_number(name).fill_null(0).alias(name) for name in late),
        )
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{where}: a value is not of the column's type: {error}.") from error
    bars = bars.sort("symbol", "date", maintain_order=True)
    notes = [f"recognised as {vendor.name} by its columns: {', '.join(table.columns[:8])} ..."]

    if "adjusted" in names and (bars["adjusted"].drop_nulls() != 3).any():
        adjusted = True
    if vendor.factored and "factor" in names:
        bars = _unadjusted(bars, notes)
    if late and len(late) == 2:
        bars = bars.with_columns(pl.col("volume") + pl.col(late[0]), pl.col("amount") + pl.col(late[1])).drop(
            late
        )
        notes.append(f"after-hours trading ({', '.join(late)}) is added to volume and amount")
    stopped = [pl.col(key) == value for key, value in (("status", 0), ("paused", 1)) if key in names]
    if stopped:
        off = pl.any_horizontal(stopped).fill_null(False)
        bars = bars.with_columns(pl.when(off).then(0.0).otherwise(pl.col("volume")).alias("volume"))
    if adjusted:
        bars = bars.drop("amount", "preclose", strict=False)
        notes.append(
            "prices were adjusted by the vendor: forward-adjusted ones (qfq) rewrite history at every dividend, "
            "price limits and vwap cannot be had from them; unadjusted prices with a factor are better"
        )
    bars = _plain_units(bars, vendor, where, notes)
    if "preclose" in bars.columns and not {"factor", "adj_close"} & set(bars.columns):
        bars = bars.with_columns(_grown_factor())
        notes.append("factor from the reference prices: previous close / reference price on ex-dates")
    if vendor.name == "yfinance" and "adj_close" not in names:
        notes.append("no Adj Close: prices adjusted by the vendor, which rewrites history at every dividend")
    bars = bars.drop("preclose", "status", "paused", "adjusted", strict=False)
    limits = () if adjusted else CHINA_LIMITS
    return bars, Schema(price_limit=limits), notes


def _number(name: str) -> pl.Expr:
    """Numbers, or text that holds them; empty text is missing."""
    text = pl.col(name).cast(pl.String).str.strip_chars()
    words = {"": None, "True": "1", "False": "0", "true": "1", "false": "0", "None": None, "nan": None}
    return text.replace(words).cast(pl.Float64).fill_nan(None)


def _unadjusted(bars: pl.DataFrame, notes: list[str]) -> pl.DataFrame:
    """Prices and volume of a table whose rows are adjusted by their own factor; one of 1 throughout says nothing."""
    if (bars["factor"].fill_null(1.0) == 1).all():
        return bars.drop("factor")
    prices = [pl.col(name) / pl.col("factor") for name in (*_PRICES, "preclose") if name in bars.columns]
    notes.append("prices and volume were adjusted by the factor of each row; it was taken out of them")
    return bars.with_columns(*prices, pl.col("volume") * pl.col("factor"))


def _plain_units(bars: pl.DataFrame, vendor: Vendor, where: str, notes: list[str]) -> pl.DataFrame:
    """Volume in shares, amount in currency. The vendor's units are verified: amount / volume is a price of the day."""
    if "amount" not in bars.columns:
        notes.append(f"volume taken as {_name(_UNITS, vendor.volume)}, which nothing in the table verifies")
        return bars.with_columns(pl.col("volume") * vendor.volume)
    documented = (vendor.volume, vendor.amount)
    pairs = [documented, *((v, a) for a in _MONEY.values() for v in _UNITS.values() if (v, a) != documented)]
    on = bars.filter((pl.col("volume") > 0) & (pl.col("amount") > 0))
    price = pl.col("amount") / pl.col("volume")
    inside = on.select(
        ((price * a / v).is_between(pl.col("low") - 0.0051, pl.col("high") + 0.0051)).mean().alias(f"{v}|{a}")
        for v, a in pairs
    )
    fits = [pair for pair, share in zip(pairs, inside.row(0), strict=True) if share is None or share >= 0.99]
    if not fits:
        typical = on.select(price.median(), pl.col("close").median()).row(0)
        raise DataError(
            f"{where}: amount / volume is no price in any known unit: its median is {typical[0]:.6g}, that of the "
            f"close {typical[1]:.6g}; {vendor.name} documents {_name(_UNITS, vendor.volume)} and "
            f"{_name(_MONEY, vendor.amount)}. Adjusted prices (qfq, hfq) look like this: take unadjusted ones, or "
            "write a schema with [columns] and [scale]."
        )
    volume, amount = fits[0]
    told = f"volume in {_name(_UNITS, volume)}, amount in {_name(_MONEY, amount)}"
    notes.append(told if fits[0] == documented else f"{told}: not as documented, but what low and high say")
    return bars.with_columns(pl.col("volume") * volume, pl.col("amount") * amount)


def _name(units: Mapping[str, float], value: float) -> str:
    return next(name for name, unit in units.items() if unit == value)


def _grown_factor() -> pl.Expr:
    """Cumulative product of previous close / reference price; differences of under half a cent are rounding."""
    before = pl.col("close").forward_fill().shift(1).over("symbol")
    reference = pl.col("preclose")
    ex = ((before - reference).abs() > 0.005) & (reference > 0) & (before > 0)
    step: Any = pl.when(ex.fill_null(False)).then(before / reference).otherwise(1.0)
    return step.cum_prod().over("symbol").alias("factor")

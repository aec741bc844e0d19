"""What the packages of data vendors are asked, and their answers as tables in the vendors' own columns.

The packages are optional extras and imported when they are asked for.
"""

from __future__ import annotations

import datetime as dt
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar, Final

import polars as pl

from steppe.core.errors import DataError
from steppe.quant.sources.reading import read_dates
from steppe.quant.sources.vendors import frame_of

__all__ = ["ADAPTERS", "Adapter"]

CODES: Final = {"CSI300": "000300", "CSI500": "000905", "CSI1000": "000852"}
"""Indices by the code of their level, all of Shanghai."""


class Adapter(ABC):
    """One vendor: every method asks its package and returns a table in the vendor's own columns.

    A vendor that does not know something returns None. Symbols are canonical (SH600000, AAPL) on this side.
    """

    package: ClassVar[str]
    indices: ClassVar[tuple[str, ...]] = ()
    notes: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        try:
            self.api = self.connect(importlib.import_module(self.package))
        except ModuleNotFoundError as error:
            if error.name != self.package:
                raise
            raise DataError(
                f"{self.package} is not installed: pip install 'steppe[{self.package}]'."
            ) from error

    def connect(self, module: ModuleType) -> Any:
        """What the other methods ask; logs in where the vendor wants it."""
        return module

    def close(self) -> None:  # noqa: B027  most vendors need none
        """Log out."""

    @abstractmethod
    def bars(self, symbol: str, start: dt.date, end: dt.date) -> pl.DataFrame:
        """Daily bars of one stock, both days included."""

    def constituents(self, index: str, start: dt.date, end: dt.date) -> pl.DataFrame | None:
        """Snapshots: date (from which a snapshot is known), symbol in any style, and weight where there is one."""
        return None

    def levels(self, index: str, start: dt.date, end: dt.date) -> pl.DataFrame | None:
        """Levels of a price index: date, close."""
        return None

    def securities(self, symbols: Sequence[str]) -> pl.DataFrame | None:
        """symbol in any style, list_date, last_date (text or dates, empty while listed)."""
        return None


class AKShare(Adapter):
    """Unadjusted bars of Eastmoney with the factor of Sina; only today's constituents are known."""

    package = "akshare"
    indices = tuple(CODES)
    notes = ("akshare knows today's constituents only: stocks of an index are chosen with hindsight",)

    def bars(self, symbol: str, start: dt.date, end: dt.date) -> pl.DataFrame:
        bars = frame_of(
            self.api.stock_zh_a_hist(
                symbol=symbol[2:],
                period="daily",
                start_date=f"{start:%Y%m%d}",
                end_date=f"{end:%Y%m%d}",
                adjust="",
            )
        )
        if not bars.height:
            return bars
        steps = frame_of(self.api.stock_zh_a_daily(symbol=symbol.lower(), adjust="hfq-factor")).select(
            pl.col("date").cast(pl.String).str.head(10).str.to_date().alias("日期"),
            pl.col("hfq_factor").cast(pl.Float64).alias("factor"),
        )
        bars = bars.with_columns(
            pl.col("日期").cast(pl.String).str.head(10).str.to_date(), 股票代码=pl.lit(symbol)
        )
        return bars.sort("日期").join_asof(steps.sort("日期"), on="日期")

    def constituents(self, index: str, start: dt.date, end: dt.date) -> pl.DataFrame:
        table = frame_of(self.api.index_stock_cons_csindex(symbol=CODES[index]))
        return table.select(pl.lit(None, pl.Date).alias("date"), pl.col("成分券代码").alias("symbol"))

    def levels(self, index: str, start: dt.date, end: dt.date) -> pl.DataFrame:
        return frame_of(self.api.stock_zh_index_daily(symbol=f"sh{CODES[index]}")).select("date", "close")


class Baostock(Adapter):
    """Unadjusted bars with reference price, suspension and ST flags; constituents of CSI 300 and 500 by date."""

    package = "baostock"
    indices = ("CSI300", "CSI500")
    notes = ("membership is sampled on the first of each month: changes are up to a month late, never early",)
    fields: ClassVar = (
        "date,code,open,high,low,close,preclose,volume,amount,adjustflag,turn,tradestatus,pctChg,isST"
    )

    def connect(self, module: ModuleType) -> Any:
        _checked(module.login())
        return module

    def close(self) -> None:
        self.api.logout()

    def bars(self, symbol: str, start: dt.date, end: dt.date) -> pl.DataFrame:
        return self._history(f"{symbol[:2].lower()}.{symbol[2:]}", self.fields, start, end)

    def _history(self, code: str, fields: str, start: dt.date, end: dt.date) -> pl.DataFrame:
        return _rows(
            self.api.query_history_k_data_plus(
                code, fields, start_date=str(start), end_date=str(end), frequency="d", adjustflag="3"
            )
        )

    def constituents(self, index: str, start: dt.date, end: dt.date) -> pl.DataFrame:
        query = {"CSI300": self.api.query_hs300_stocks, "CSI500": self.api.query_zz500_stocks}[index]
        days = pl.date_range(start.replace(day=1), end, "1mo", eager=True)
        return pl.concat(
            [
                _rows(query(date=str(max(day, start)))).select(
                    pl.lit(max(day, start)).alias("date"), pl.col("code").alias("symbol")
                )
                for day in days
            ]
        )

    def levels(self, index: str, start: dt.date, end: dt.date) -> pl.DataFrame:
        return self._history(f"sh.{CODES[index]}", "date,code,close", start, end).select("date", "close")

    def securities(self, symbols: Sequence[str]) -> pl.DataFrame:
        return _rows(self.api.query_stock_basic()).select(
            pl.col("code").alias("symbol"),
            pl.col("ipoDate").alias("list_date"),
            _day_before("outDate").alias("last_date"),
        )


class Tushare(Adapter):
    """Unadjusted bars with the adjustment factor; monthly index weights. Needs a token in TUSHARE_TOKEN."""

    package = "tushare"
    indices = tuple(CODES)
    notes = ("membership is that of the monthly weights: changes are up to a month late, never early",)

    def connect(self, module: ModuleType) -> Any:
        token = os.environ.get("TUSHARE_TOKEN")
        if not token:
            raise DataError("tushare needs a token in the environment variable TUSHARE_TOKEN.")
        return module.pro_api(token)

    def bars(self, symbol: str, start: dt.date, end: dt.date) -> pl.DataFrame:
        span = _span(start, end)
        bars = frame_of(self.api.daily(ts_code=_dotted(symbol), **span))
        factors = frame_of(self.api.adj_factor(ts_code=_dotted(symbol), **span))
        return bars.join(factors, on=["ts_code", "trade_date"], how="left") if bars.height else bars

    def constituents(self, index: str, start: dt.date, end: dt.date) -> pl.DataFrame:
        tables = []
        for year in range(start.year, end.year + 1):  # an answer is cut at some thousand rows
            for first, last in ((f"{year}0101", f"{year}0630"), (f"{year}0701", f"{year}1231")):
                answer = self.api.index_weight(
                    index_code=f"{CODES[index]}.SH", start_date=first, end_date=last
                )
                tables.append(frame_of(answer))
        weights = pl.concat([table for table in tables if table.height], how="vertical_relaxed")
        day = pl.col("trade_date").cast(pl.String).str.to_date("%Y%m%d")
        return weights.select(
            (day + pl.duration(days=1)).alias("date"), pl.col("con_code").alias("symbol"), "weight"
        )

    def levels(self, index: str, start: dt.date, end: dt.date) -> pl.DataFrame:
        table = frame_of(self.api.index_daily(ts_code=f"{CODES[index]}.SH", **_span(start, end)))
        return table.select(pl.col("trade_date").alias("date"), "close")

    def securities(self, symbols: Sequence[str]) -> pl.DataFrame:
        fields = "ts_code,list_date,delist_date"
        tables = [frame_of(self.api.stock_basic(list_status=state, fields=fields)) for state in "LDP"]
        # an empty answer has no types
        text = pl.col("ts_code", "list_date", "delist_date").cast(pl.String)
        return pl.concat([table.select(text) for table in tables if table.height]).select(
            pl.col("ts_code").alias("symbol"), "list_date", _day_before("delist_date").alias("last_date")
        )


class YFinance(Adapter):
    """Split-adjusted bars with Adj Close; no constituents, few delisted stocks."""

    package = "yfinance"
    notes = ("Yahoo keeps few delisted stocks: expect survivorship bias",)

    def bars(self, symbol: str, start: dt.date, end: dt.date) -> pl.DataFrame:
        ticker = symbol
        if symbol[:2] in ("SH", "SZ") and symbol[2:].isdigit():
            ticker = f"{symbol[2:]}.{'SS' if symbol[:2] == 'SH' else 'SZ'}"
        after = end + dt.timedelta(days=1)
        bars = frame_of(
            self.api.Ticker(ticker).history(
                start=str(start), end=str(after), auto_adjust=False, actions=False
            )
        )
        return bars.with_columns(Ticker=pl.lit(symbol)) if bars.height else bars


ADAPTERS: Final[dict[str, type[Adapter]]] = {
    adapter.package: adapter for adapter in (AKShare, Baostock, Tushare, YFinance)
}


def _rows(result: Any) -> pl.DataFrame:
    """All rows of an answer of baostock, as text."""
    _checked(result)
    rows = []
    while result.next():
        rows.append(result.get_row_data())
    _checked(result)  # a page may fail
    return pl.DataFrame(rows, schema=dict.fromkeys(result.fields, pl.String), orient="row")


def _checked(result: Any) -> None:
    if result.error_code != "0":
        raise DataError(f"baostock: {result.error_msg} (error {result.error_code}).")


def _day_before(name: str) -> pl.Expr:
    """The day before a delisting day: the last on which the stock is listed."""
    return read_dates(name, pl.String()) - pl.duration(days=1)


def _dotted(symbol: str) -> str:
    return f"{symbol[2:]}.{symbol[:2]}"


def _span(start: dt.date, end: dt.date) -> dict[str, str]:
    return {"start_date": f"{start:%Y%m%d}", "end_date": f"{end:%Y%m%d}"}

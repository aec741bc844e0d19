"""Vendors' tables as their packages hand them out: recognised, units verified, the panel of the canonical table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_table import BARS

from steppe.core.errors import DataError
from steppe.quant.panel import Panel
from steppe.quant.sources.table import read_panel
from steppe.quant.sources.vendors import canonical_symbol, vendor_of

# the bars of test_table under Shanghai symbols, prices without ex-dates, amounts from the vwap
ROWS = BARS.drop("factor").with_columns(
    (pl.lit("6") + pl.col("symbol").str.tail(5)).alias("code"),
    (pl.col("vwap") * pl.col("volume")).alias("amount"),
)
CODE = pl.col("code")
SH = pl.lit("SH") + CODE
TRUTH = read_panel(ROWS.with_columns(symbol=SH))


def akshare() -> pl.DataFrame:
    return ROWS.select(
        pl.col("date").alias("日期"),
        CODE.alias("股票代码"),
        pl.col("open").alias("开盘"),
        pl.col("close").alias("收盘"),
        pl.col("high").alias("最高"),
        pl.col("low").alias("最低"),
        (pl.col("volume") / 100).cast(pl.Int64).alias("成交量"),
        pl.col("amount").alias("成交额"),
        *(pl.lit(0.5).alias(name) for name in ("振幅", "涨跌幅", "涨跌额", "换手率")),
    )


def baostock() -> pl.DataFrame:
    """Text throughout; suspended days are rows with tradestatus 0 and empty volume."""
    gone = ROWS.filter(pl.col("code") == "600000").head(3)
    stopped = gone.with_columns(
        pl.col("date").dt.offset_by("-21d"), volume=pl.lit(None, pl.Float64), amount=pl.lit(None, pl.Float64)
    )
    rows = pl.concat([stopped.with_columns(status=pl.lit("0")), ROWS.with_columns(status=pl.lit("1"))])
    return rows.select(
        pl.col("date").cast(pl.String),
        (pl.lit("sh.") + CODE).alias("code"),
        *(pl.col(name).cast(pl.String) for name in ("open", "high", "low", "close")),
        pl.col("close").shift(1).over("code").fill_null(pl.col("open")).cast(pl.String).alias("preclose"),
        pl.col("volume").cast(pl.Int64).cast(pl.String).fill_null(""),
        pl.col("amount").cast(pl.String).fill_null(""),
        pl.lit("3").alias("adjustflag"),
        pl.lit("0.4").alias("turn"),
        pl.col("status").alias("tradestatus"),
        pl.lit("0.1").alias("pctChg"),
        pl.when(CODE == "600003").then(pl.lit("1")).otherwise(pl.lit("0")).alias("isST"),
    )


def tushare() -> pl.DataFrame:
    return ROWS.select(
        (CODE + ".SH").alias("ts_code"),
        pl.col("date").dt.strftime("%Y%m%d").alias("trade_date"),
        "open",
        "high",
        "low",
        "close",
        pl.col("close").shift(1).over("code").fill_null(pl.col("open")).alias("pre_close"),
        pl.lit(0.1).alias("change"),
        pl.lit(0.1).alias("pct_chg"),
        (pl.col("volume") / 100).alias("vol"),
        (pl.col("amount") / 1000).alias("amount"),
    ).sort("trade_date", "ts_code", descending=True)


def yfinance() -> pl.DataFrame:
    return ROWS.select(
        pl.col("date").cast(pl.Datetime("ns", "Asia/Shanghai")).alias("Date"),
        (CODE + ".SS").alias("Ticker"),
        pl.col("close").alias("Adj Close"),
        pl.col("close").alias("Close"),
        pl.col("high").alias("High"),
        pl.col("low").alias("Low"),
        pl.col("open").alias("Open"),
        pl.col("volume").cast(pl.Int64).alias("Volume"),
    )


def rqdata() -> pl.DataFrame:
    return ROWS.select(
        (CODE + ".XSHG").alias("order_book_id"),
        "date",
        "open",
        "close",
        "high",
        "low",
        pl.lit(99.0).alias("limit_up"),
        pl.lit(1.0).alias("limit_down"),
        pl.col("close").shift(1).over("code").alias("prev_close"),
        "volume",
        pl.col("amount").alias("total_turnover"),
        pl.lit(12).alias("num_trades"),
    )


def joinquant() -> pl.DataFrame:
    """Suspended days are rows with paused 1 and the last close."""
    stopped = (
        ROWS.filter(pl.col("code") == "600000")
        .head(1)
        .with_columns(pl.col("date").dt.offset_by("-7d"), volume=pl.lit(0.0), paused=pl.lit(1.0))
    )
    return pl.concat([stopped, ROWS.with_columns(paused=pl.lit(0.0))]).select(
        pl.col("date").alias("time"),
        (CODE + ".XSHG").alias("code"),
        "open",
        "close",
        "high",
        "low",
        "volume",
        pl.col("amount").alias("money"),
        pl.lit(1.0).alias("factor"),
        pl.lit(99.0).alias("high_limit"),
        pl.lit(1.0).alias("low_limit"),
        pl.col("vwap").alias("avg"),
        pl.col("close").shift(1).over("code").alias("pre_close"),
        "paused",
    )


def gm() -> pl.DataFrame:
    return ROWS.select(
        (pl.lit("SHSE.") + CODE).alias("symbol"),
        pl.col("date").cast(pl.Datetime).dt.replace_time_zone("Asia/Shanghai").alias("bob"),
        pl.col("date").cast(pl.Datetime).dt.offset_by("15h").alias("eob"),
        "open",
        "high",
        "low",
        "close",
        "volume",
        "amount",
    )


LAYOUTS: dict[str, Callable[[], pl.DataFrame]] = {
    "AKShare": akshare,
    "Baostock": baostock,
    "Tushare": tushare,
    "yfinance": yfinance,
    "RQData": rqdata,
    "JoinQuant": joinquant,
    "gm": gm,
}


def same_bars(panel: Panel, truth: Panel = TRUTH, fields: slice = slice(None)) -> None:
    assert list(panel.symbols) == list(truth.symbols)
    np.testing.assert_array_equal(panel.dates, truth.dates)
    np.testing.assert_array_equal(panel.traded, truth.traded)
    np.testing.assert_allclose(panel.values[..., fields], truth.values[..., fields], rtol=2e-6)


@pytest.mark.parametrize("vendor", LAYOUTS)
def test_every_layout_gives_the_same_panel(vendor: str, tmp_path: Path) -> None:
    table = LAYOUTS[vendor]()
    panel = read_panel(table)
    prices = [0, 1, 2, 3, 5] if vendor == "yfinance" else slice(None)
    same_bars(panel, fields=prices)
    assert any(note.startswith(f"recognised as {vendor} ") for note in panel.notes)
    assert any("volume" in note for note in panel.notes)
    folder = tmp_path / "bars"
    folder.mkdir()
    table.write_parquet(folder / "a.parquet")
    same_bars(read_panel(folder, cache=tmp_path / "cache"), fields=prices)
    table.write_csv(tmp_path / "a.csv")
    same_bars(read_panel(tmp_path / "a.csv", cache=tmp_path / "cache"), fields=prices)


def test_canonical_columns_are_never_taken_for_a_vendors() -> None:
    panel = read_panel(ROWS.with_columns(pl.col("amount").alias("money")).drop("code", "amount"))
    assert not any("recognised" in note for note in panel.notes)
    assert vendor_of(["day", "price"]) is None


def test_suspensions_are_flagged_or_absent_or_empty() -> None:
    panel = read_panel(baostock())
    assert {repair.rule: repair.count for repair in panel.repairs}["suspended"] == 3
    assert panel.special[panel.traded].any(axis=None)
    assert panel.special[:, list(panel.symbols).index("SH600003")][panel.traded[:, 3]].all()
    assert not panel.special[:, 0].any()
    assert {r.rule: r.count for r in read_panel(joinquant()).repairs}["suspended"] == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("600000.SH", "SH600000"),
        ("sh.600000", "SH600000"),
        ("600000.XSHG", "SH600000"),
        ("600000.SS", "SH600000"),
        ("SHSE.600000", "SH600000"),
        ("sh600000", "SH600000"),
        ("SH600000", "SH600000"),
        ("600000", "SH600000"),
        ("000001.XSHE", "SZ000001"),
        ("000001.sz", "SZ000001"),
        ("SZSE.000001", "SZ000001"),
        ("1", "SZ000001"),
        ("300750", "SZ300750"),
        ("688001", "SH688001"),
        ("900901", "SH900901"),
        ("920001", "BJ920001"),
        ("830799", "BJ830799"),
        ("430047.BJ", "BJ430047"),
        ("AAPL", "AAPL"),
        ("0700.HK", "0700.HK"),
        ("BRK-B", "BRK-B"),
    ],
)
def test_symbol_styles(given: str, expected: str) -> None:
    assert pl.select(canonical_symbol(pl.lit(given))).item() == expected


# ---- units


def test_units_that_low_and_high_contradict_are_corrected_or_errors() -> None:
    shares = akshare().with_columns(pl.col("成交量") * 100)
    panel = read_panel(shares)
    same_bars(panel)
    assert any("volume in shares, amount in currency: not as documented" in note for note in panel.notes)
    wan = akshare().with_columns(pl.col("成交额") / 1e4)
    same_bars(read_panel(wan))
    with pytest.raises(
        DataError, match=r"median is .* close .*AKShare documents lots of 100 shares and currency"
    ):
        read_panel(akshare().with_columns(pl.col("成交额") * 3))
    adjusted = akshare().with_columns(pl.col("开盘", "收盘", "最高", "最低") * 3)
    with pytest.raises(DataError, match="Adjusted prices"):
        read_panel(adjusted)


def test_adjusted_prices_are_told(tmp_path: Path) -> None:
    prices = pl.col("开盘", "收盘", "最高", "最低") * 0.5
    folder = tmp_path / "qfq"
    folder.mkdir()
    for code in ("600000", "600001"):
        table = akshare().filter(pl.col("股票代码") == code).drop("股票代码").with_columns(prices)
        table.write_csv(folder / f"{code}_qfq.csv")
    panel = read_panel(folder, cache=tmp_path / "cache")
    assert list(panel.symbols) == ["SH600000", "SH600001"]  # from the names of the files
    assert any("rewrite history" in note for note in panel.notes)
    assert any("no vwap" in note for note in panel.notes)
    flagged = read_panel(baostock().with_columns(adjustflag=pl.lit("2")))
    assert any("rewrite history" in note for note in flagged.notes)
    assert not flagged.limit_up.any()
    whole = read_panel(yfinance().drop("Adj Close"))
    assert any("no Adj Close" in note for note in whole.notes)


def test_after_hours_trading_is_added() -> None:
    late = tushare().with_columns(ah_vol=pl.col("vol") * 0.1, ah_amount=pl.col("amount") * 0.1)
    panel = read_panel(late)
    np.testing.assert_allclose(panel.field("volume"), TRUTH.field("volume") * 1.1, rtol=1e-6)
    np.testing.assert_allclose(panel.field("vwap"), TRUTH.field("vwap"), rtol=1e-6)


# ---- factors


def test_the_factor_grows_on_ex_dates() -> None:
    """A 2-for-1 split before the third day and a dividend of 0.20 before the fifth."""
    close = np.array([10.0, 10.5, 5.2, 5.3, 5.0])
    reference = np.array([9.9, 10.0, 5.25, 5.2, 5.1])
    days = np.busday_offset("2015-01-05", np.arange(5))
    table = pl.DataFrame(
        {
            "ts_code": "000001.SZ",
            "trade_date": [str(day).replace("-", "") for day in days],
            **dict.fromkeys(("open", "high", "low", "close"), close),
            "pre_close": reference,
            "vol": 1.0,
            "amount": close / 10,
        }
    )
    panel = read_panel(table)
    np.testing.assert_allclose(panel.factor[:, 0], np.cumprod([1, 1, 2, 1, 5.3 / 5.1]), rtol=1e-6)
    returns = panel.field("close")[1:, 0] / panel.field("close")[:-1, 0]
    np.testing.assert_allclose(returns, close[1:] / reference[1:], rtol=1e-6)
    assert any("factor from the reference prices" in note for note in panel.notes)
    given = read_panel(table.with_columns(adj_factor=pl.lit(7.0)))
    assert (given.factor == 7).all()


def test_joinquants_prices_are_adjusted_by_the_factor_of_the_row() -> None:
    step = pl.when(pl.col("time") > pl.date(2015, 2, 10)).then(1.0).otherwise(0.5)
    prices = ("open", "close", "high", "low", "avg", "high_limit", "low_limit", "pre_close")
    table = joinquant().with_columns(
        *(pl.col(name) * step for name in prices), pl.col("volume") / step, factor=step
    )
    panel = read_panel(table)
    before = panel.dates <= np.datetime64("2015-02-10")
    np.testing.assert_allclose(panel.values[~before], TRUTH.values[~before], rtol=2e-6)
    np.testing.assert_allclose(panel.values[before][..., :5], 0.5 * TRUTH.values[before][..., :5], rtol=2e-6)
    np.testing.assert_allclose(panel.values[before][..., 5], 2 * TRUTH.values[before][..., 5], rtol=2e-6)


def test_dividends_of_yfinance_make_the_factor() -> None:
    panel = read_panel(yfinance().with_columns((pl.col("Close") * 0.8).alias("Adj Close")))
    np.testing.assert_allclose(panel.factor[panel.traded], 0.8, rtol=1e-6)


# ---- shapes of files


def wide() -> tuple[list[str], list[str], pl.DataFrame]:
    """Price fields, tickers and the table (date first) of a download of several tickers."""
    long = yfinance().with_columns(pl.col("Date").dt.date())
    fields = ["Adj Close", "Close", "High", "Low", "Open", "Volume"]
    days = long.select("Date").unique().sort("Date")
    columns = [(field, ticker) for field in fields for ticker in sorted(long["Ticker"].unique())]
    for field, ticker in columns:
        own = long.filter(pl.col("Ticker") == ticker).select(
            "Date", pl.col(field).alias(str((field, ticker)))
        )
        days = days.join(own, on="Date", how="left", maintain_order="left")
    return [field for field, _ in columns], [ticker for _, ticker in columns], days


def test_several_tickers_side_by_side(tmp_path: Path) -> None:
    fields, tickers, table = wide()
    same_bars(read_panel(table), fields=[0, 1, 2, 3, 5])
    table.rename({"Date": "('Date', '')"}).write_parquet(tmp_path / "a.parquet")
    same_bars(read_panel(tmp_path / "a.parquet", cache=tmp_path / "c"), fields=[0, 1, 2, 3, 5])
    swapped = table.rename({str((f, t)): str((t, f)) for f, t in zip(fields, tickers, strict=True)})
    same_bars(read_panel(swapped), fields=[0, 1, 2, 3, 5])
    body = table.write_csv(include_header=False)
    head = [["Price", *fields], ["Ticker", *tickers], ["Date"] + [""] * len(fields)]
    (tmp_path / "b.csv").write_text("\n".join(",".join(line) for line in head) + "\n" + body)
    same_bars(read_panel(tmp_path / "b.csv", cache=tmp_path / "c"), fields=[0, 1, 2, 3, 5])


def test_one_file_per_day_or_stock(tmp_path: Path) -> None:
    for (day,), rows in tushare().group_by("trade_date"):
        rows.write_csv(tmp_path / f"{day}.csv")
    same_bars(read_panel(tmp_path, cache=tmp_path.parent / "cache"))


def test_misfits_are_told_and_vendors_not_mixed(tmp_path: Path) -> None:
    akshare().write_csv(tmp_path / "a.csv")
    pl.DataFrame({"x": [1]}).write_csv(tmp_path / "b.csv")
    panel = read_panel(tmp_path, cache=tmp_path.parent / "cache")
    assert "not read, no columns of bars: b.csv" in panel.notes
    tushare().write_csv(tmp_path / "c.csv")
    with pytest.raises(DataError, match=r"several vendors: a\.csv of AKShare, c\.csv of Tushare"):
        read_panel(tmp_path, cache=tmp_path.parent / "cache")


def test_errors_name_the_vendor() -> None:
    with pytest.raises(DataError, match="AKShare columns without a symbol"):
        read_panel(akshare().drop("股票代码"))
    with pytest.raises(DataError, match="not of the column's type"):
        read_panel(baostock().with_columns(close=pl.lit("ten")))


def test_pandas_tables_need_no_pyarrow() -> None:
    pd = pytest.importorskip("pandas")

    def pandas(table: pl.DataFrame) -> object:
        return pd.DataFrame({name: table[name].to_list() for name in table.columns})

    same_bars(read_panel(pandas(tushare())))
    same_bars(read_panel(pandas(yfinance()).set_index(["Ticker", "Date"])), fields=[0, 1, 2, 3, 5])
    fields, tickers, table = wide()
    side_by_side = pandas(table).set_index("Date")
    side_by_side.columns = pd.MultiIndex.from_tuples(
        zip(fields, tickers, strict=True), names=["Price", "Ticker"]
    )
    same_bars(read_panel(side_by_side), fields=[0, 1, 2, 3, 5])

"""Downloads with the vendors' packages replaced: recorded column layouts in, a panel out, resumed and atomic."""

from __future__ import annotations

import datetime as dt
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from test_vendors import ROWS, akshare, baostock, tushare, yfinance

from steppe import cli
from steppe.core.errors import DataError, SpecError
from steppe.quant.sources.adapters import ADAPTERS
from steppe.quant.sources.download import download
from steppe.quant.sources.table import read_panel

pd = pytest.importorskip("pandas")

DAYS = ROWS["date"].unique().sort()
START, END = DAYS[0], DAYS[-1]
SPAN = {"start": START, "end": END}


def pandas(table: pl.DataFrame) -> Any:
    return pd.DataFrame({name: table[name].to_list() for name in table.columns})


class Fakes:
    """The four packages: what they were asked, and whom they fail."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.broken: set[str] = set()

    def ask(self, symbol: str) -> None:
        self.asked.append(symbol)
        if symbol in self.broken:
            raise ConnectionError("the line is dead")

    # akshare

    def stock_zh_a_hist(self, symbol: str, period: str, start_date: str, end_date: str, adjust: str) -> Any:
        self.ask(symbol)
        assert (period, adjust, start_date) == ("daily", "", f"{START:%Y%m%d}")
        return pandas(akshare().filter(pl.col("股票代码") == symbol))

    def stock_zh_a_daily(self, symbol: str, adjust: str) -> Any:
        assert symbol.startswith("sh6")
        assert adjust == "hfq-factor"
        return pd.DataFrame({"date": [str(DAYS[20]), "1900-01-01"], "hfq_factor": ["2.0", "1.0"]})

    def index_stock_cons_csindex(self, symbol: str) -> Any:
        assert symbol == "000300"
        return pd.DataFrame({"日期": ["2026-01-01"] * 2, "成分券代码": ["600000", "600001"]})

    def stock_zh_index_daily(self, symbol: str) -> Any:
        assert symbol == "sh000300"
        return pd.DataFrame(
            {"date": DAYS.to_list(), "open": 1.0, "close": np.linspace(3000, 3100, len(DAYS))}
        )

    # baostock

    def login(self) -> Any:
        return SimpleNamespace(error_code="0", error_msg="success")

    def logout(self) -> None:
        self.asked.append("logout")

    def answer(self, table: pl.DataFrame) -> Any:
        rows = iter(table.rows())
        current: list[Any] = []

        def step() -> bool:
            row = next(rows, None)
            current[:] = row or ()
            return row is not None

        return SimpleNamespace(
            error_code="0",
            error_msg="success",
            fields=table.columns,
            next=step,
            get_row_data=lambda: list(current),
        )

    def query_history_k_data_plus(self, code: str, fields: str, **options: str) -> Any:
        assert options["adjustflag"] == "3"
        if code == "sh.000300":
            return self.answer(
                pl.DataFrame({"date": DAYS.cast(pl.String), "code": code, "close": ["3000.5"] * len(DAYS)})
            )
        self.ask(code)
        return self.answer(baostock().filter(pl.col("code") == code).select(fields.split(",")))

    def query_hs300_stocks(self, date: str) -> Any:
        late = date >= "2015-02-01"
        names = ["sh.600000", "sh.600002" if late else "sh.600001"]
        return self.answer(pl.DataFrame({"updateDate": [date] * 2, "code": names, "code_name": ["x"] * 2}))

    query_zz500_stocks = query_hs300_stocks

    def query_stock_basic(self) -> Any:
        table = {
            "code": ["sh.600000", "sh.600001", "sh.600002"],
            "code_name": ["a", "b", "c"],
            "ipoDate": ["1999-11-10"] * 3,
            "outDate": ["", "2015-03-02", ""],
        }
        return self.answer(pl.DataFrame(table))

    # tushare

    def pro_api(self, token: str) -> Fakes:
        assert token == "secret"
        return self

    def daily(self, ts_code: str, start_date: str, end_date: str) -> Any:
        self.ask(ts_code)
        return pandas(tushare().filter(pl.col("ts_code") == ts_code))

    def adj_factor(self, ts_code: str, start_date: str, end_date: str) -> Any:
        days = DAYS.dt.strftime("%Y%m%d").to_list()
        return pd.DataFrame({"ts_code": ts_code, "trade_date": days, "adj_factor": 3.0})

    def index_weight(self, index_code: str, start_date: str, end_date: str) -> Any:
        assert index_code == "000300.SH"
        table = pd.DataFrame(
            {
                "index_code": index_code,
                "con_code": ["600000.SH", "600001.SH", "600000.SH", "600002.SH"],
                "trade_date": ["20150130", "20150130", "20150227", "20150227"],
                "weight": [60.0, 40.0, 30.0, 70.0],
            }
        )
        return table[(table.trade_date >= start_date) & (table.trade_date <= end_date)]

    def index_daily(self, ts_code: str, start_date: str, end_date: str) -> Any:
        days = DAYS.dt.strftime("%Y%m%d").to_list()[::-1]
        return pd.DataFrame({"ts_code": ts_code, "trade_date": days, "close": 3000.0, "open": 1.0})

    def stock_basic(self, list_status: str, fields: str) -> Any:
        if list_status != "D":
            names = ["600000.SH", "600002.SH"] if list_status == "L" else []
            return pd.DataFrame(
                {"ts_code": names, "list_date": ["19991110"] * len(names), "delist_date": None}
            )
        return pd.DataFrame(
            {"ts_code": ["600001.SH"], "list_date": ["20000101"], "delist_date": ["20150302"]}
        )

    # yfinance

    def Ticker(self, name: str) -> Any:
        def history(start: str, end: str, auto_adjust: bool, actions: bool) -> Any:
            self.ask(name)
            assert not auto_adjust
            assert end == str(END + dt.timedelta(days=1))
            return pandas(yfinance().filter(pl.col("Ticker") == name).drop("Ticker")).set_index("Date")

        return SimpleNamespace(history=history)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fakes:
    fakes = Fakes()
    for name in ADAPTERS:
        monkeypatch.setitem(sys.modules, name, fakes)
    monkeypatch.setenv("TUSHARE_TOKEN", "secret")
    monkeypatch.setenv("STEPPE_CACHE", str(tmp_path / "cache"))
    return fakes


@pytest.mark.parametrize("vendor", ADAPTERS)
def test_stocks_become_a_panel(vendor: str, fakes: Fakes, tmp_path: Path) -> None:
    out = download(vendor, tmp_path / "out", symbols=["600000.SH", "sh600001"], **SPAN)
    panel = read_panel(out)
    truth = read_panel(
        ROWS.filter(pl.col("code").is_in(["600000", "600001"])).with_columns(symbol="SH" + pl.col("code"))
    )
    assert list(panel.symbols) == ["SH600000", "SH600001"]
    np.testing.assert_array_equal(panel.traded, truth.traded)
    raw = panel.field("close") / panel.factor
    np.testing.assert_allclose(raw, truth.field("close"), rtol=2e-6)
    np.testing.assert_allclose(panel.field("volume") * panel.factor, truth.field("volume"), rtol=2e-6)
    assert any(f"downloaded with {vendor}" in note for note in panel.notes)
    expected = {"akshare": 2.0, "tushare": 3.0}.get(vendor, 1.0)
    assert panel.factor[-1, 0] == expected
    if vendor == "akshare":
        assert panel.factor[0, 0] == 1
        assert panel.factor[19, 0] == 1
        assert panel.factor[20, 0] == 2


def test_baostocks_index_has_members_by_date_levels_and_delistings(fakes: Fakes, tmp_path: Path) -> None:
    out = download("baostock", tmp_path / "out", index="CSI300", **SPAN)
    panel = read_panel(out)
    assert list(panel.symbols) == ["SH600000", "SH600001", "SH600002"]
    january = panel.dates < np.datetime64("2015-02-01")
    held = panel.members["CSI300"]
    assert held[:, 0].all()
    np.testing.assert_array_equal(held[:, 1], january)
    np.testing.assert_array_equal(held[:, 2], ~january)
    assert (panel.benchmarks["CSI300"] == 3000.5).all()
    gone = (panel.dates >= np.datetime64("2015-03-02")) & ~panel.traded[:, 1]
    np.testing.assert_array_equal(panel.delisted[:, 1] & gone, gone)
    assert panel.traded[:, 1].any()  # in the panel until it left
    assert panel.age[0, 0] == (panel.dates[0] - np.datetime64("1999-11-10")).astype(int)
    assert fakes.asked[-1] == "logout"
    assert any("up to a month late" in note for note in panel.notes)


def test_tushares_index_has_weights_from_the_day_after_they_were_made(fakes: Fakes, tmp_path: Path) -> None:
    panel = read_panel(download("tushare", tmp_path / "out", index="CSI300", **SPAN))
    weights, held = panel.weights["CSI300"], panel.members["CSI300"]
    before = panel.dates <= np.datetime64("2015-01-30")
    assert not weights[before].any()
    assert not held[before].any()
    first = int(np.flatnonzero(~before)[0])
    assert weights[first].sum() == pytest.approx(1)
    assert weights[first, :2] == pytest.approx([0.6, 0.4], abs=0.05)
    march = panel.dates > np.datetime64("2015-02-27")
    assert (weights[march][:, 1] == 0).all()
    assert (panel.benchmarks["CSI300"] == 3000).all()
    assert panel.delisted[-1].tolist() == [False, not panel.traded[-1, 1], False]


def test_akshares_members_of_today_are_not_members_of_the_past(fakes: Fakes, tmp_path: Path) -> None:
    panel = read_panel(download("akshare", tmp_path / "out", index="CSI300", **SPAN))
    assert len(panel.symbols) == 2
    assert not panel.members
    assert any("hindsight" in note for note in panel.notes)
    assert panel.benchmarks["CSI300"][-1] == 3100


def test_a_broken_download_resumes(fakes: Fakes, tmp_path: Path) -> None:
    out = tmp_path / "out"
    symbols = ["SH600000", "SH600001", "SH600002"]
    fakes.broken = {"600001.SH"}
    with pytest.raises(DataError, match=r"tushare: SH600001: ConnectionError: the line is dead\. .* resumes"):
        download("tushare", out, symbols=symbols, **SPAN)
    assert [path.name for path in (out / "bars").iterdir()] == ["SH600000.parquet"]
    assert not (out / "panel.toml").exists()
    fakes.broken, fakes.asked = set(), []
    shown: list[tuple[int, int]] = []
    download("tushare", out, symbols=symbols, **SPAN, show=lambda done, of: shown.append((done, of)))
    assert fakes.asked == ["600001.SH", "600002.SH"]
    assert shown == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert len(read_panel(out).symbols) == 3
    with pytest.raises(DataError, match="holds another download"):
        download("tushare", out, symbols=symbols[:1], **SPAN)


def test_stocks_without_bars_are_told(fakes: Fakes, tmp_path: Path) -> None:
    out = download("tushare", tmp_path / "out", symbols=["600000", "600999"], **SPAN)
    assert any("no bars of 1 stocks, such as SH600999" in note for note in read_panel(out).notes)
    with pytest.raises(DataError, match="tushare has no bars of SH600999"):
        download("tushare", tmp_path / "none", symbols=["600999"], **SPAN)


def test_what_is_missing_or_wrong_is_said(
    fakes: Fakes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SpecError, match="Did you mean 'baostock'"):
        download("baostok", tmp_path, symbols=["600000"], **SPAN)
    with pytest.raises(SpecError, match="name stocks with symbols, or an index"):
        download("baostock", tmp_path, **SPAN)
    with pytest.raises(SpecError, match="no constituents of 'SP500'; it has: none"):
        download("yfinance", tmp_path, index="SP500", **SPAN)
    with pytest.raises(SpecError, match="is after end"):
        download("baostock", tmp_path, symbols=["600000"], start=END, end=START)
    monkeypatch.delenv("TUSHARE_TOKEN")
    with pytest.raises(DataError, match="TUSHARE_TOKEN"):
        download("tushare", tmp_path / "a", symbols=["600000"], **SPAN)
    monkeypatch.setitem(sys.modules, "akshare", None)
    with pytest.raises(DataError, match=r"akshare is not installed: pip install 'steppe\[akshare\]'"):
        download("akshare", tmp_path / "b", symbols=["600000"], **SPAN)
    monkeypatch.setattr(
        Fakes, "login", lambda self: SimpleNamespace(error_code="10001", error_msg="not logged in")
    )
    with pytest.raises(DataError, match=r"baostock: not logged in \(error 10001\)"):
        download("baostock", tmp_path / "c", symbols=["600000"], **SPAN)


def test_the_request_is_kept(fakes: Fakes, tmp_path: Path) -> None:
    out = download("yfinance", tmp_path / "out", symbols=["600000.SS"], **SPAN)
    assert json.loads((out / "download.json").read_text("utf-8"))["request"]["vendor"] == "yfinance"
    assert not list(out.rglob("*.tmp"))


def test_an_open_end_is_that_of_the_download_to_resume(fakes: Fakes, tmp_path: Path) -> None:
    out = download("tushare", tmp_path / "out", symbols=["600000"], **SPAN)
    fakes.asked = []
    download("tushare", out, symbols=["600000"], start=START)
    assert fakes.asked == []


# ---- the command


def steppe(*tokens: str | Path) -> None:
    cli.app([str(token) for token in tokens], result_action="return_value", exit_on_error=False)


def test_import_downloads(fakes: Fakes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    days = ("--start", str(START), "--end", str(END))
    steppe("data", "import", "baostock", "--out", tmp_path / "o", "--symbols", "600000", "600001", *days)
    text = capsys.readouterr().out
    assert "2 stocks" in text
    assert "recognised" not in text
    assert text.rstrip().endswith(str(tmp_path / "o"))
    steppe("data", "import", "baostock", "--out", tmp_path / "i", "--index", "CSI300", *days)
    assert "CSI300" in capsys.readouterr().out


def test_import_saves_what_it_reads(fakes: Fakes, tmp_path: Path) -> None:
    source = tmp_path / "bars.csv"
    tushare().write_csv(source)
    steppe("data", "import", source, "--out", tmp_path / "panel")
    panel = read_panel(tmp_path / "panel")
    assert panel.symbols[0] == "SH600000"
    steppe("data", "import", source, "--out", tmp_path / "panel")  # a saved panel is replaced
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="is there and no saved panel"):
        steppe("data", "import", source, "--out", tmp_path / "mine")
    with pytest.raises(DataError, match=r"there is no .*yahoo"):
        steppe("data", "import", "yahoo", "--out", tmp_path / "x")

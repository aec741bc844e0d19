"""Panels from tables: every rule, every format, no order, no future, the cache, and the real panels."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from test_panel import assert_same

from steppe.core.errors import DataError, SpecError
from steppe.quant.describe import check, describe
from steppe.quant.panel import FIELDS, Panel
from steppe.quant.sources import table as table_module
from steppe.quant.sources.checks import RULES
from steppe.quant.sources.schema import (
    Columns,
    FloatShares,
    Members,
    PriceLimit,
    Scale,
    Schema,
    Securities,
    load_schema,
)
from steppe.quant.sources.table import read_panel

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT / ".." / "shared"
SESSIONS, STOCKS = 60, 8


def make_bars(sessions: int = SESSIONS, stocks: int = STOCKS, seed: int = 0) -> pl.DataFrame:
    """A sound table: prices on the 0.01 grid, a factor that steps, suspensions, a late listing, a delisting."""
    rng = np.random.default_rng(seed)
    days = np.busday_offset("2015-01-05", np.arange(sessions))
    low = np.round(10 * np.exp(np.cumsum(rng.normal(0, 0.02, (sessions, stocks)), axis=0)), 2)
    high = np.round(low + rng.integers(2, 30, low.shape) / 100, 2)
    between = [np.round(low + rng.random(low.shape) * (high - low), 2) for _ in range(3)]
    here = rng.random(low.shape) < 0.9
    here[: sessions // 3, 1] = False
    here[2 * sessions // 3 :, 2] = False
    here[:, 0] = True
    columns = {
        "date": np.repeat(days, stocks),
        "symbol": np.tile([f"{i:06d}" for i in range(stocks)], sessions),
        "open": between[0],
        "high": high,
        "low": low,
        "close": between[1],
        "volume": rng.integers(1, 1000, low.shape) * 100.0,
        "vwap": between[2],
        "factor": np.round(1 + np.cumsum(rng.random(low.shape) < 0.02, axis=0) * 0.5, 2),
    }
    frame = pl.DataFrame({key: np.asarray(value).ravel() for key, value in columns.items()})
    return frame.filter(pl.Series(here.ravel())).with_columns(pl.col("date").cast(pl.Date))


BARS = make_bars()


def edit(frame: pl.DataFrame, column: str, row: int, value: Any) -> pl.DataFrame:
    return frame.with_columns(
        pl.when(pl.int_range(pl.len()) == row).then(pl.lit(value)).otherwise(pl.col(column)).alias(column)
    )


def found(panel: Panel) -> dict[str, int]:
    return {repair.rule: repair.count for repair in panel.repairs}


def without_provenance(panel: Panel) -> Panel:
    return Panel(**{**vars(panel), "fingerprint": "", "name": "", "repairs": ()})


# ---- what the arrays hold


def test_values_by_hand() -> None:
    panel = read_panel(BARS)
    assert found(panel) == {}
    assert panel.shape == (SESSIONS, STOCKS)
    assert panel.traded.sum() == BARS.height
    for row in BARS.sample(50, seed=1).iter_rows(named=True):
        t = int(np.searchsorted(panel.dates, np.datetime64(row["date"])))
        n = list(panel.symbols).index(row["symbol"])
        assert panel.traded[t, n]
        prices = [row[name] * row["factor"] for name in FIELDS[:5]]
        np.testing.assert_allclose(panel.values[t, n], [*prices, row["volume"] / row["factor"]], rtol=1e-6)
        assert panel.factor[t, n] == np.float32(row["factor"])
    assert np.isnan(panel.values[~panel.traded]).all()
    assert np.isnan(panel.factor[~panel.traded]).all()


def test_listing_without_securities_knows_no_future() -> None:
    panel = read_panel(BARS)
    first = panel.traded.argmax(axis=0)
    np.testing.assert_array_equal(panel.listed, np.arange(SESSIONS)[:, None] >= first)
    np.testing.assert_array_equal(panel.age >= 0, panel.listed)
    assert panel.age[-1, 0] == (panel.dates[-1] - panel.dates[0]).astype(int)


def test_securities_bound_the_listing(tmp_path: Path) -> None:
    pl.DataFrame(
        {
            "symbol": ["000000", "000001", "000002", "999999"],
            "list": ["2014-12-31", None, "2015-01-01", "2015-01-01"],
            "last": [None, "2015-12-31", "2015-03-05", None],
            "industry": ["steel", "banks", "", "shops"],
        }
    ).write_csv(tmp_path / "s.csv")
    side = Securities(
        file=str(tmp_path / "s.csv"),
        industry="industry",
        list_date="list",
        last_date="last",
        as_of=dt.date(2015, 12, 31),
    )
    panel = read_panel(BARS, Schema(securities=side))
    assert panel.age[0, :3].tolist() == [5, -1, 4]
    assert panel.listed[-1, :3].tolist() == [True, True, False]
    assert panel.listed[panel.dates <= np.datetime64("2015-03-05"), 2].all()
    assert panel.industries == ("banks", "shops", "steel")
    assert panel.industry[0, :4].tolist() == [2, 0, -1, -1]
    assert found(panel) == {"no_security": STOCKS - 3}


def limits(closes: list[float], opens: list[float], factors: list[float] | None = None, **rule: Any) -> Panel:
    """One stock, days with the given closes and opens, inside wide bars."""
    days = np.busday_offset("2020-08-20", np.arange(len(closes)))
    special = rule.pop("flag", None)
    frame = pl.DataFrame(
        {
            "date": days,
            "symbol": rule.pop("symbol", "SH600000"),
            "open": np.array(opens, float),
            "high": 100.0,
            "low": 1.0,
            "close": np.array(closes, float),
            "volume": 100.0,
            "vwap": np.array(closes, float),
            "factor": np.array(factors or [1] * len(closes), float),
        }
    )
    if special is not None:
        frame = frame.with_columns(special=pl.Series(special))
    rules = (
        (PriceLimit(width=0.10), PriceLimit(**{"width": 0.2, **rule})) if rule else (PriceLimit(width=0.10),)
    )
    return read_panel(frame, Schema(price_limit=rules))


def test_limits_are_exact_in_ticks() -> None:
    # 10.05 * 1.1 = 11.055 rounds half up to 11.06; 10.05 * 0.9 = 9.045 to 9.05
    panel = limits([10.05] * 6, [10, 11.05, 11.06, 9.05, 9.06, 10])
    assert panel.limit_up[:, 0].tolist() == [False, False, True, False, False, False]
    assert panel.limit_down[:, 0].tolist() == [False, False, False, True, False, False]


def test_limits_take_the_reference_price_of_an_ex_day() -> None:
    # a 10-for-10 bonus: the reference is 10.05 / 2 = 5.03 (half up), its limit 5.53
    panel = limits([10.05, 5.0, 5.0], [10, 5.53, 5.5], [1, 2, 2])
    assert panel.limit_up[:, 0].tolist() == [False, True, True]


def test_limit_rules() -> None:
    opens = [10.0, 11.0, 11.0, 12.0]
    up = [False, True, True, True]
    assert limits([10.0] * 4, opens).limit_up[:, 0].tolist() == up
    wide = [False, False, False, True]
    assert limits([10.0] * 4, opens, prefix=["SH60"]).limit_up[:, 0].tolist() == wide
    assert limits([10.0] * 4, opens, prefix=["SZ"]).limit_up[:, 0].tolist() == up
    later = limits([10.0] * 4, opens, start=dt.date(2020, 8, 24))  # the third day
    assert later.limit_up[:, 0].tolist() == [False, True, False, True]
    assert not limits([10.0] * 4, opens, free_sessions=5).limit_up.any()
    strict = limits([10.0] * 4, [10.0, 10.5, 10.5, 10.5], width=0.05, special=True, flag=[0, 0, 1, 1])
    assert strict.limit_up[:, 0].tolist() == [False, False, True, True]


def test_limit_prices_of_the_source_win() -> None:
    frame = BARS.with_columns(limit_up=pl.col("open"), limit_down=pl.col("open") - 0.01)
    panel = read_panel(frame, Schema(price_limit=(PriceLimit(width=0.1),)))
    np.testing.assert_array_equal(panel.limit_up, panel.traded)
    assert not panel.limit_down.any()


def test_float_shares_count_after_their_month(tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    pl.DataFrame({"symbol": "000000", "month": ["2015-01", "2015-02"], "n": [5, 7]}).write_csv(file)
    side = FloatShares(file=str(file), month="month", shares="n", scale=1e4)
    panel = read_panel(BARS, Schema(float_shares=side))
    months = panel.dates.astype("datetime64[M]")
    close = panel.field("close")[:, 0] / panel.factor[:, 0]
    january, march = months == np.datetime64("2015-01"), months == np.datetime64("2015-03")
    assert np.isnan(panel.float_cap[january, 0]).all()
    np.testing.assert_allclose(
        panel.float_cap[months == np.datetime64("2015-02"), 0],
        close[months == np.datetime64("2015-02")] * 5e4,
        rtol=1e-6,
    )
    np.testing.assert_allclose(panel.float_cap[march, 0], close[march] * 7e4, rtol=1e-6)
    early = read_panel(BARS, Schema(float_shares=side.model_copy(update={"known": "month_start"})))
    np.testing.assert_allclose(early.float_cap[january, 0], close[january] * 5e4, rtol=1e-6)


def test_float_cap_is_carried_through_suspensions() -> None:
    panel = read_panel(BARS.with_columns(float_cap=pl.col("close") * 100))
    n = int((~panel.traded & panel.listed).sum(axis=0).argmax())
    gap = np.flatnonzero(~panel.traded[:, n] & panel.listed[:, n])
    np.testing.assert_array_equal(panel.float_cap[gap, n], panel.float_cap[gap - 1, n])


@pytest.mark.parametrize(("ends", "last"), [("inclusive", True), ("exclusive", False)])
def test_members(tmp_path: Path, ends: str, last: bool) -> None:
    file = tmp_path / "m.csv"
    pl.DataFrame(
        {
            "index": ["I", "I", "I", "I", "J", "I", "I"],
            "symbol": ["000000", "000000", "000001", "777777", "000002", "000003", "000003"],
            "start": [
                "2015-01-06",
                "2015-02-02",
                "2010-01-01",
                "2015-01-06",
                "2015-01-06",
                "2015-01-06",
                "2015-01-07",
            ],
            "end": ["2015-01-08", "2015-02-03", None, None, "2015-01-05", "2015-01-09", "2015-01-12"],
        }
    ).write_csv(file)
    panel = read_panel(BARS, Schema(members=Members(file=str(file), ends=ends)))
    assert list(panel.members) == ["I"]
    plane = panel.members["I"]
    at = {str(day): t for t, day in enumerate(panel.dates)}
    first = ["2015-01-05", "2015-01-06", "2015-01-07", "2015-01-08", "2015-01-09"]
    assert plane[[at[day] for day in first], 0].tolist() == [False, True, True, last, False]
    assert plane[at["2015-02-02"], 0]
    assert plane[at["2015-02-03"], 0] == last
    assert plane[:, 1].all()
    assert plane[:, 3].sum() == (5 if last else 4)
    assert found(panel) == {"member_no_bars": 1, "member_overlap": 1, "member_empty": 1}


# ---- every rule


REPAIRED: dict[str, Callable[[pl.DataFrame], pl.DataFrame]] = {
    "suspended": lambda f: edit(f, "volume", 7, 0.0),
    "price": lambda f: edit(f, "open", 7, None),
    "range": lambda f: edit(f, "low", 7, 1000.0),
    "volume": lambda f: edit(f, "volume", 7, -5.0),
    "vwap_missing": lambda f: edit(f, "vwap", 7, None),
    "vwap_range": lambda f: edit(f, "vwap", 7, 0.001),
    "unsorted": lambda f: pl.concat([f.slice(1), f.head(1)]),
    "duplicate": lambda f: pl.concat([f, f.tail(1)]),
    "thin_session": lambda f: f.filter((pl.col("date") != f["date"][200]) | (pl.col("symbol") == "000000")),
    "session_gap": lambda f: f.filter(~pl.col("date").is_between(dt.date(2015, 2, 1), dt.date(2015, 2, 20))),
}


@pytest.mark.parametrize("rule", REPAIRED)
def test_repairs_are_counted_and_listed(rule: str) -> None:
    panel = read_panel(REPAIRED[rule](BARS))
    assert found(panel) == {rule: 1}
    (repair,) = panel.repairs
    assert len(repair.examples) == 1
    dropped = rule in ("suspended", "price", "range", "volume")
    if dropped:
        row = BARS.row(7, named=True)
        assert repair.examples[0].startswith(f"{row['symbol']} {row['date']}")
        assert panel.traded.sum() == BARS.height - 1
        lacking = BARS.filter(pl.int_range(pl.len()) != 7)
        np.testing.assert_array_equal(panel.values, read_panel(lacking).values)


def test_an_example_shows_place_and_values() -> None:
    bad = edit(edit(BARS, "low", 0, 10.2), "high", 0, 10.1)
    (repair,) = read_panel(bad).repairs
    day, symbol = BARS["date"][0], BARS["symbol"][0]
    assert repair.examples[0].startswith(f"{symbol} {day} open ")
    assert repair.examples[0].endswith(f"high 10.1, low 10.2, close {BARS['close'][0]:.7g}")


@pytest.mark.parametrize("rule", ["vwap_missing", "vwap_range"])
def test_a_mended_vwap_is_the_typical_price(rule: str) -> None:
    panel = read_panel(REPAIRED[rule](BARS))
    row = BARS.row(7, named=True)
    t = int(np.searchsorted(panel.dates, np.datetime64(row["date"])))
    typical = (row["high"] + row["low"] + row["close"]) / 3 * row["factor"]
    n = list(panel.symbols).index(row["symbol"])
    assert panel.field("vwap")[t, n] == pytest.approx(typical, rel=1e-6)


def test_half_a_tick_of_vwap_is_rounding() -> None:
    panel = read_panel(BARS.with_columns(vwap=pl.col("high") + 0.005))
    assert found(panel) == {}


BROKEN: dict[str, tuple[Callable[[pl.DataFrame], pl.DataFrame], str]] = {
    "price": (lambda f: f.with_columns(close=-pl.col("close")), "prices missing, infinite or <= 0"),
    "range": (lambda f: f.with_columns(low=pl.col("high") + 1), "Are the units declared"),
    "volume": (lambda f: f.with_columns(volume=pl.lit(None, pl.Float64)), "volume missing"),
    "factor": (
        lambda f: edit(f, "factor", 3, 0.0),
        r"1 factor missing, infinite or <= 0, such as: \d+ 2015-01-05 factor 0,",
    ),
    "vwap in other units": (lambda f: f.with_columns(vwap=pl.col("vwap") * 100), r"more than 1% of \d+ rows"),
    "conflict": (lambda f: pl.concat([f, edit(f.tail(1), "close", 0, f["low"][-1])]), "share stock and date"),
    "weekend": (lambda f: f.with_columns(pl.col("date").dt.offset_by("1d")), "Saturday or Sunday"),
    "no date": (lambda f: edit(f, "date", 3, None), "no symbol or no readable date"),
    "no symbol": (lambda f: edit(f, "symbol", 3, None), "no symbol or no readable date"),
    "odd dates": (lambda f: f.with_columns(date=pl.lit("31.03.2015")), "'31.03.2015'"),
    "empty": (lambda f: f.clear(), "no bars are left"),
    "all suspended": (lambda f: f.with_columns(volume=pl.lit(0.0)), "no bars are left"),
    "text": (lambda f: f.with_columns(close=pl.lit("ten")), "not of the column's type"),
    "renamed": (lambda f: f.rename({"close": "Close"}), r"no column 'close'.*It has: .*close = \"Close\""),
    "missing": (lambda f: f.drop("close", "volume"), "no column 'close', 'volume'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_errors_say_what_and_where(case: str) -> None:
    change, message = BROKEN[case]
    with pytest.raises(DataError, match=message):
        read_panel(change(BARS))


def test_all_errors_are_told_at_once() -> None:
    bad = edit(BARS.with_columns(vwap=pl.col("vwap") * 100), "factor", 3, -1.0)
    with pytest.raises(DataError, match=r"(?s)factor missing.*vwap more than"):
        read_panel(bad)


def test_weekends_and_strict_vwap_are_declared() -> None:
    sunday = BARS.with_columns(pl.col("date").dt.offset_by("1d"))
    assert found(read_panel(sunday, Schema(weekends=True))) == {}
    with pytest.raises(DataError, match="vwap missing"):
        read_panel(REPAIRED["vwap_missing"](BARS), Schema(vwap_fallback="error"))


def test_a_table_without_vwap_and_factor_says_so() -> None:
    panel = read_panel(BARS.drop("vwap", "factor"))
    assert found(panel) == {"vwap_missing": BARS.height, "no_factor": BARS.height}
    assert any("no vwap" in note for note in panel.notes)
    assert (panel.factor[panel.traded] == 1).all()


def test_float_conflict_and_bad_side_files(tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    side = FloatShares(file=str(file), date="day", shares="n")
    with pytest.raises(DataError, match=r"f\.csv is not there"):
        read_panel(BARS, Schema(float_shares=side))
    pl.DataFrame({"symbol": "000000", "day": ["2015-01-05"] * 2, "n": [5, 7]}).write_csv(file)
    with pytest.raises(DataError, match="given twice"):
        read_panel(BARS, Schema(float_shares=side))
    pl.DataFrame({"symbol": "000000", "day": ["2015-01-05"], "n": [-5]}).write_csv(file)
    assert found(read_panel(BARS, Schema(float_shares=side))) == {"float_shares": 1}
    with pytest.raises(DataError, match=r"\[float_shares\], such as shares = \"n\""):
        read_panel(BARS, Schema(float_shares=side.model_copy(update={"shares": "nn"})))


# ---- sources


class ArrowOnly:
    """A table that offers nothing but the Arrow C stream."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self._frame = frame

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._frame.__arrow_c_stream__(requested_schema)


def test_every_source_gives_the_same_panel(tmp_path: Path) -> None:
    expected = without_provenance(read_panel(BARS))
    BARS.write_csv(tmp_path / "bars.csv")
    BARS.write_parquet(tmp_path / "bars.parquet")
    years = tmp_path / "folder"
    years.mkdir()
    BARS.head(200).write_csv(years / "a.csv")
    BARS.slice(200).write_parquet(years / "b.parquet")
    (years / "README.md").write_text("not a table")
    for source in (tmp_path / "bars.csv", str(tmp_path / "bars.parquet"), years):
        assert_same(expected, without_provenance(read_panel(source, cache=tmp_path / "cache")))
    assert_same(expected, without_provenance(read_panel(ArrowOnly(BARS))))
    with pytest.raises(DataError, match="Arrow C stream"):
        read_panel(BARS.to_dict(as_series=False))
    with pytest.raises(DataError, match="there is no"):
        read_panel(tmp_path / "absent.csv")


def test_integers_with_scales_and_other_names(tmp_path: Path) -> None:
    prices = ["open", "high", "low", "close"]
    integers = BARS.with_columns(
        *((pl.col(name) * 100).round().cast(pl.Int32) for name in prices),
        (pl.col("vwap") * 1000).round().cast(pl.Int32),
        (pl.col("volume") / 100).cast(pl.Int32),
        pl.col("date").cast(pl.Datetime("ms")),
        pl.col("symbol").cast(pl.Categorical),
    ).rename({"close": "last", "symbol": "code"})
    schema = Schema(
        columns=Columns(close="last", symbol="code"),
        scale=Scale(open=0.01, high=0.01, low=0.01, close=0.01, vwap=0.001, volume=100),
    )
    assert_same(without_provenance(read_panel(BARS)), without_provenance(read_panel(integers, schema)))
    unscaled = read_panel(integers.drop("vwap"), schema.model_copy(update={"scale": Scale()}))
    assert unscaled.notes[0].startswith("open, high, low, last: integers without a [scale]")


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%Y%m%d", "%Y/%m/%d", "%Y-%m-%d 15:00:00", "number"])
def test_dates_in_every_usual_form(form: str) -> None:
    text = pl.col("date").dt.strftime("%Y%m%d" if form == "number" else form)
    frame = BARS.with_columns(date=text.cast(pl.Int64) if form == "number" else text)
    np.testing.assert_array_equal(read_panel(frame).dates, read_panel(BARS).dates)


def test_amount_and_adjusted_close_stand_in() -> None:
    frame = BARS.with_columns(
        amount=pl.col("vwap") * pl.col("volume"), adj_close=pl.col("close") * pl.col("factor")
    )
    panel, expected = read_panel(frame.drop("vwap", "factor")), read_panel(BARS)
    np.testing.assert_allclose(panel.values, expected.values, rtol=1e-5)
    assert found(panel) == {}


def test_files_that_hold_no_bars_are_left_out_and_named(tmp_path: Path) -> None:
    BARS.write_csv(tmp_path / "bars.csv")
    pl.DataFrame({"a": [1]}).write_csv(tmp_path / "other.csv")
    panel = read_panel(tmp_path, cache=tmp_path / "cache")
    assert "not read, no columns of bars: other.csv" in panel.notes
    BARS.drop("vwap").write_parquet(tmp_path / "index.parquet")
    with pytest.raises(DataError, match=r"differ in: vwap\. Name the files"):
        read_panel(tmp_path, cache=tmp_path / "cache")


def test_panel_toml_inside_the_folder_is_used(tmp_path: Path) -> None:
    BARS.rename({"close": "last"}).write_parquet(tmp_path / "x.parquet")
    (tmp_path / "panel.toml").write_text('name = "mine"\nbars = "*.parquet"\n[columns]\nclose = "last"\n')
    assert read_panel(tmp_path, cache=tmp_path / "cache").name == "mine"


# ---- invariants


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_row_order_is_irrelevant(seed: int) -> None:
    frame = BARS.with_columns(
        industry=pl.col("symbol").str.tail(1), special=pl.col("volume") > 5e4, float_shares=pl.col("volume")
    )
    shuffled = frame.sample(fraction=1, shuffle=True, seed=seed)
    schema = Schema(price_limit=(PriceLimit(width=0.02),))
    panel = read_panel(shuffled, schema)
    assert set(found(panel)) <= {"unsorted"}
    assert_same(without_provenance(read_panel(frame, schema)), without_provenance(panel))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(t=st.integers(1, SESSIONS - 2), seed=st.integers(0, 2**32 - 1), cut=st.booleans())
def test_the_future_changes_nothing_before_it(tmp_path: Path, t: int, seed: int, cut: bool) -> None:
    days = BARS["date"].unique().sort()
    now = days[t]
    rng = np.random.default_rng(seed)
    rich = BARS.with_columns(
        industry=pl.Series(rng.choice(["w", "x", "y"], BARS.height)),
        special=pl.Series(rng.random(BARS.height) < 0.1),
    )
    members = pl.DataFrame(
        {
            "index": "I",
            "symbol": rng.choice(rich["symbol"].unique().sort(), 30),
            "start": [days[int(i)] for i in rng.integers(0, SESSIONS - 5, 30)],
        }
    ).with_columns(end=pl.col("start") + pl.duration(days=pl.Series(rng.integers(0, 20, 30))))
    shares = pl.DataFrame(
        {
            "symbol": np.tile(rich["symbol"].unique().sort(), 3),
            "month": np.repeat(["2014-12", "2015-01", "2015-02"], STOCKS),
            "shares": rng.integers(1, 9, 3 * STOCKS),
        }
    )

    def build(bars: pl.DataFrame, members: pl.DataFrame, shares: pl.DataFrame) -> Panel:
        members.write_parquet(tmp_path / "m.parquet")
        shares.write_parquet(tmp_path / "f.parquet")
        schema = Schema(
            price_limit=(PriceLimit(width=0.02), PriceLimit(width=0.01, special=True)),
            members=Members(file=str(tmp_path / "m.parquet"), ends="inclusive"),
            float_shares=FloatShares(file=str(tmp_path / "f.parquet"), month="month"),
        )
        return read_panel(bars, schema)

    later = pl.col("date") > now
    up = pl.lit(float(rng.uniform(1.1, 2)))
    changed = rich.with_columns(
        *(pl.when(later).then(pl.col(name) * up).otherwise(pl.col(name)) for name in FIELDS),
        pl.when(later).then(pl.col("factor") * 3).otherwise(pl.col("factor")),
        pl.when(later).then(pl.lit("a new one")).otherwise(pl.col("industry")).alias("industry"),
        special=pl.col("special") ^ later,
    ).filter(~later | (pl.Series(rng.random(BARS.height)) < (0.0 if cut else 0.7)))
    changed = changed.filter(pl.col("symbol").is_in(changed.filter(~later)["symbol"].unique()))
    known = (pl.col("month") + "-01").str.to_date().dt.offset_by("1mo") <= now
    a = build(rich, members, shares)
    b = build(
        changed,
        members.filter(pl.col("start") <= now).with_columns(
            end=pl.when(pl.col("end") > now)
            .then(pl.col("end") + pl.duration(days=9))
            .otherwise(pl.col("end"))
        ),
        shares.with_columns(pl.when(known).then(pl.col("shares")).otherwise(pl.col("shares") + 5)),
    )
    same = np.isin(a.symbols, b.symbols)
    assert (~a.traded[: t + 1, ~same]).all()
    for key in (
        "values",
        "factor",
        "traded",
        "listed",
        "age",
        "limit_up",
        "limit_down",
        "special",
        "float_cap",
    ):
        np.testing.assert_array_equal(getattr(a, key)[: t + 1, same], getattr(b, key)[: t + 1], err_msg=key)
    np.testing.assert_array_equal(a.industry[: t + 1, same], b.industry[: t + 1])
    assert a.limit_up.any()
    assert np.isfinite(a.float_cap).any()
    if "I" in b.members:
        np.testing.assert_array_equal(a.members["I"][: t + 1, same], b.members["I"][: t + 1])


# ---- the cache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    BARS.write_parquet(tmp_path / "bars.parquet")
    return tmp_path


def no_building(*_: object) -> Panel:
    raise AssertionError("built again")


def test_the_second_read_opens_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPPE_CACHE", str(folder / "cache"))
    first = read_panel(folder / "bars.parquet")
    assert isinstance(first.values, np.memmap)
    with monkeypatch.context() as patch:
        patch.setattr(table_module, "build_panel", no_building)
        assert_same(first, read_panel(folder / "bars.parquet"))
        with pytest.raises(AssertionError, match="built again"):  # another schema
            read_panel(folder / "bars.parquet", Schema(tick=0.001))
        os.utime(folder / "bars.parquet", (1, 1))
        with pytest.raises(AssertionError, match="built again"):  # another file
            read_panel(folder / "bars.parquet")
    assert read_panel(folder / "bars.parquet").fingerprint == first.fingerprint  # same contents
    assert read_panel(folder / "bars.parquet", Schema(tick=0.001)).fingerprint != first.fingerprint
    assert not list((folder / "cache").glob("*.partial"))


def test_a_truncated_cache_is_built_again(folder: Path) -> None:
    first = without_provenance(read_panel(folder / "bars.parquet", cache=folder / "cache"))
    expected = np.array(first.values)
    (place,) = (folder / "cache").iterdir()
    for name in ("factor.npy", "manifest.json"):
        with (place / name).open("r+b") as stream:
            stream.truncate(200)
        again = read_panel(folder / "bars.parquet", cache=folder / "cache")
        np.testing.assert_array_equal(again.values, expected)
        assert np.isfinite(again.factor).any()


def test_tables_in_memory_are_cached_on_request_and_saved_panels_open(tmp_path: Path) -> None:
    panel = read_panel(BARS, cache=tmp_path)
    assert isinstance(panel.values, np.memmap)
    (place,) = tmp_path.iterdir()
    assert_same(panel, read_panel(place))
    assert not isinstance(read_panel(BARS).values, np.memmap)


# ---- schemas


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[columns]\nopne = 'o'", r"columns\.opne: unknown key 'opne'\. Did you mean 'open'"),
        ("nmae = 'x'", "Did you mean 'name'"),
        ("tick = '0.01'", "tick: "),
        ("[members]\nfile = 'm'", "members.ends: is missing"),
        ("[members]\nfile = 'm'\nends = 'sometimes'", "members.ends: .*inclusive"),
        ("[float_shares]\nfile = 'f'", "either the date or the month"),
        ("[[price_limit]]\nwidth = 2.0", "price_limit.0.width"),
        ("= 3", "cannot read the schema"),
    ],
)
def test_schema_errors_show_the_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(SpecError, match=message):
        load_schema(tmp_path / "s.toml")


def test_shipped_schemas_are_valid() -> None:
    names = {load_schema(path).name for path in (ROOT / "studies" / "schemas").glob("*.toml")}
    assert {"cn-ashare-daily", "us-equity-daily"} <= names


# ---- what a person sees


def test_check_prints_one_or_two_screens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPPE_CACHE", str(folder / "cache"))
    REPAIRED["range"](BARS).write_parquet(folder / "bars.parquet")
    text = str(check(folder / "bars.parquet"))
    lines = text.splitlines()
    assert len(lines) < 60
    assert f"{BARS.height - 1:,} bars" in lines[0]
    assert RULES["range"].text in text
    assert "none of" in text
    assert "vwap_range" in text


# ---- the real panels


def real(name: str, bars: str, cache: Path) -> tuple[Path, Panel]:
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"no shared/data/{name} beside the repository")
    schema = load_schema(ROOT / "studies" / "schemas" / f"{name}.toml").model_copy(update={"bars": bars})
    return folder, read_panel(folder, schema, cache=cache)


def test_cn_ashare_daily(tmp_path: Path) -> None:
    folder, panel = real("cn-ashare-daily", "daily_201[4-7].parquet", tmp_path)
    rows = pl.scan_parquet(folder / "daily_201[4-7].parquet").select(pl.len()).collect().item()
    assert panel.traded.sum() == rows
    counts = found(panel)
    assert not {"range", "price", "volume", "suspended", "unsorted", "duplicate", "thin_session"} & set(
        counts
    )
    assert 0 < counts["vwap_missing"] / rows < 0.0015  # 0.1 % in 2010-2018
    assert counts["vwap_range"] / rows < 1e-5
    assert (
        describe(panel).years[0].bars
        == pl.scan_parquet(folder / "daily_2014.parquet").select(pl.len()).collect().item()
    )

    spells = pl.read_parquet(folder / "index_members.parquet")
    for t in range(0, len(panel.dates), 97):
        day = pl.lit(panel.dates[t].astype(object))
        now = spells.filter((pl.col("start_date") <= day) & (pl.col("end_date") >= day))
        for index, size in (("CSI300", 300), ("CSI500", 500), ("CSI1000", 1000)):
            listed = now.filter(pl.col("index") == index)["symbol"]
            assert len(listed) in ({0, size} if index == "CSI1000" else {size})
            held = panel.symbols[panel.members[index][t]]
            assert set(held) == set(listed) & set(panel.symbols)
            assert len(held) >= 0.96 * len(listed)


def test_us_equity_daily(tmp_path: Path) -> None:
    folder, panel = real("us-equity-daily", "daily_201[2-6]_201[3-7].parquet", tmp_path)
    rows = pl.scan_parquet(folder / "daily_201[2-6]_201[3-7].parquet").select(pl.len()).collect().item()
    assert panel.traded.sum() == rows
    assert set(found(panel)) == {"vwap_missing", "member_no_bars"}
    for year, size in ((2012, 369), (2014, 381)):
        held = panel.members["SP500"][panel.dates.astype("datetime64[Y]") == np.datetime64(str(year))].sum(
            axis=1
        )
        assert held.min() - 5 <= size <= held.max() + 5

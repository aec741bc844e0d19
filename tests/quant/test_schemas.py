"""Side files of indices, delisting and price limits of whole sessions; the shipped schemas on the real panels."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st
from test_table import BARS, ROOT, SHARED, found

from steppe.core.errors import DataError
from steppe.quant.describe import describe, render
from steppe.quant.panel import Panel
from steppe.quant.sources.schema import (
    Benchmarks,
    Members,
    PriceLimit,
    Schema,
    Securities,
    Weights,
    load_schema,
)
from steppe.quant.sources.table import read_panel
from steppe.quant.sources.vendors import CHINA_LIMITS

DAYS = BARS["date"].unique().sort()


def weighted(
    tmp_path: Path,
    rows: list[tuple[str, int, float]],
    members: list[tuple[str, int, int | None]] = (),
    **spec: Any,
) -> Panel:
    """A panel of `BARS` with snapshots (symbol, session, weight) and spells (symbol, first, last session)."""
    table = pl.DataFrame(
        {
            "index": "I",
            "symbol": [symbol for symbol, _, _ in rows],
            "date": [DAYS[day] for _, day, _ in rows],
            "weight": [weight for *_, weight in rows],
        }
    )
    if "known" in spec:
        table = table.with_columns(seen=pl.Series([DAYS[t] for t in spec.pop("known")]))
        spec["known"] = "seen"
    table.write_parquet(tmp_path / "w.parquet")
    sides: dict[str, Any] = {}
    if members:
        pl.DataFrame(
            {
                "index": "I",
                "symbol": [symbol for symbol, _, _ in members],
                "start": [DAYS[first] for _, first, _ in members],
                "end": [None if last is None else DAYS[last] for *_, last in members],
            }
        ).write_parquet(tmp_path / "m.parquet")
        sides["members"] = Members(file=str(tmp_path / "m.parquet"), ends="inclusive")
    return read_panel(BARS, Schema(weights=Weights(file=str(tmp_path / "w.parquet"), **spec), **sides))


def last_close(panel: Panel, t: int, n: int) -> float:
    """The last adjusted close up to a session, found by looking back."""
    return next(float(panel.field("close")[s, n]) for s in range(t, -1, -1) if panel.traded[s, n])


A, B, C = "000000", "000003", "000004"


def test_weights_count_from_the_day_after_and_drift(tmp_path: Path) -> None:
    panel = weighted(tmp_path, [(A, 5, 60.0), (B, 5, 40.0), (A, 25, 1.0), (C, 25, 3.0)])
    w = panel.weights["I"]
    assert w.dtype == np.float32
    assert not w[:6].any()  # the snapshot of session 5 is not known before session 6
    for t in range(6, 26):  # nor is that of session 25 before session 26
        drifted = {n: x * last_close(panel, t, n) / last_close(panel, 5, n) for n, x in ((0, 60), (3, 40))}
        for n, x in drifted.items():
            assert w[t, n] == pytest.approx(x / sum(drifted.values()), rel=1e-5)
    assert w[25, 3] > 0
    drifted = {n: x * last_close(panel, 50, n) / last_close(panel, 25, n) for n, x in ((0, 1), (4, 3))}
    assert w[50, 0] == pytest.approx(drifted[0] / sum(drifted.values()), rel=1e-5)
    assert (w[26:, 3] == 0).all()
    np.testing.assert_allclose(w[6:].sum(axis=1), 1, rtol=1e-6)


def test_weights_of_members_alone(tmp_path: Path) -> None:
    snapshot = [(A, 5, 60.0), (B, 5, 30.0), (C, 5, 10.0)]
    spells = [(A, 0, None), (B, 0, 19), (C, 0, None), ("000005", 20, None)]
    panel = weighted(tmp_path, snapshot, spells)
    w = panel.weights["I"]
    assert (w[6:20, 3] > 0).all()
    assert not w[20:, 3].any()  # B has left
    assert not w[:, 5].any()  # the newcomer waits for the next snapshot
    np.testing.assert_allclose(w[6:].sum(axis=1), 1, rtol=1e-6)
    ratio = 60 * last_close(panel, 30, 0) / last_close(panel, 5, 0)
    other = 10 * last_close(panel, 30, 4) / last_close(panel, 5, 4)
    assert w[30, 0] == pytest.approx(ratio / (ratio + other), rel=1e-5)
    assert found(panel)["weight_new_member"] == 1


def test_when_a_snapshot_is_known_is_declared(tmp_path: Path) -> None:
    rows = [(A, 5, 1.0), (B, 5, 1.0)]
    assert np.flatnonzero(weighted(tmp_path, rows, lag=0).weights["I"].any(axis=1))[0] == 5
    later = weighted(tmp_path, rows, lag=(DAYS[9] - DAYS[5]).days).weights["I"]
    assert np.flatnonzero(later.any(axis=1))[0] == 9
    column = weighted(tmp_path, rows, known=[11, 11]).weights["I"]
    assert np.flatnonzero(column.any(axis=1))[0] == 11
    np.testing.assert_array_equal(column[11:], later[11:])  # drift counts from the snapshot's date
    with pytest.raises(DataError, match="known before their date"):
        weighted(tmp_path, rows, known=[4, 4])


def test_an_older_snapshot_that_comes_late_changes_nothing(tmp_path: Path) -> None:
    rows = [(A, 20, 1.0), (B, 5, 1.0)]
    w = weighted(tmp_path, rows, known=[21, 30]).weights["I"]
    np.testing.assert_allclose(w[21:, 0], 1)


@settings(max_examples=15, deadline=None)
@given(now=st.integers(8, 55), seed=st.integers(0, 99))
def test_weights_never_come_from_later_snapshots_or_prices(
    now: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("w")
    rng = np.random.default_rng(seed)
    rows = [(symbol, day, float(rng.random())) for day in (2, 15, 30, 45) for symbol in (A, B, C)]
    whole = weighted(folder, rows).weights["I"]
    known = [(symbol, day, weight) for symbol, day, weight in rows if day < now]
    np.testing.assert_array_equal(weighted(folder, known).weights["I"][: now + 1], whole[: now + 1])


def test_a_weight_before_the_first_bar_and_one_without_bars(tmp_path: Path) -> None:
    late = "000001"  # its first bar is in session 20 or later
    panel = weighted(tmp_path, [(A, 5, 1.0), (late, 5, 1.0), ("999999", 5, 2.0)])
    w = panel.weights["I"]
    assert found(panel)["weight_no_bars"] == 1
    np.testing.assert_allclose(w[6:].sum(axis=1), 1, rtol=1e-6)
    assert (w[6:, 1] > 0).all()


def test_bad_weights(tmp_path: Path) -> None:
    rows = [(A, 5, 1.0), (B, 5, float("nan")), (C, 5, -1.0)]
    panel = weighted(tmp_path, rows)
    assert found(panel)["weight"] == 2
    with pytest.raises(DataError, match="index weights given twice"):
        weighted(tmp_path, [(A, 5, 1.0), (A, 5, 2.0)])


def levels(tmp_path: Path, close: list[float | None], days: list[dt.date], **spec: Any) -> Panel:
    table = pl.DataFrame(
        {"symbol": "X1", "date": days, "close": close}, schema_overrides={"close": pl.Float64}
    )
    table.write_parquet(tmp_path / "l.parquet")
    spec = {"symbols": {"I": "X1"}, **spec}
    return read_panel(BARS, Schema(benchmarks=Benchmarks(file=str(tmp_path / "l.parquet"), **spec)))


def test_levels_by_date(tmp_path: Path) -> None:
    days = DAYS.to_list()
    saturday = days[4] + dt.timedelta(days=1)
    close = [float(3000 + i) for i in range(len(days))]
    panel = levels(tmp_path, [*close[:10], 1.0], [*days[:10], saturday])
    assert panel.benchmarks["I"][:10].tolist() == close[:10]
    assert np.isnan(panel.benchmarks["I"][10:]).all()
    assert found(panel) == {}
    holes = levels(tmp_path, [*close[:5], None, -1.0, *close[7:]], days)
    assert np.flatnonzero(np.isnan(holes.benchmarks["I"])).tolist() == [5, 6]
    assert found(holes) == {"benchmark": 2, "benchmark_gap": 2}
    with pytest.raises(DataError, match="index levels given twice"):
        levels(tmp_path, [1.0, 2.0], [days[0], days[0]])
    with pytest.raises(DataError, match=r"has no X2\. It has: X1\. Correct \[benchmarks\] symbols"):
        levels(tmp_path, close, days, symbols={"I": "X2"})


def test_delisted_from_the_first_session_after_the_last_day(tmp_path: Path) -> None:
    here = BARS.filter(pl.col("symbol") == "000002")
    last = here["date"].max()
    pl.DataFrame({"symbol": ["000002"], "last": [last]}).write_parquet(tmp_path / "s.parquet")
    side = Securities(file=str(tmp_path / "s.parquet"), last_date="last")
    panel = read_panel(BARS, Schema(securities=side))
    np.testing.assert_array_equal(panel.delisted[:, 2], panel.dates > np.datetime64(last))
    assert not np.delete(panel.delisted, 2, axis=1).any()
    assert not (panel.delisted & panel.listed).any()
    assert not read_panel(BARS).delisted.any()  # that a series ends is not known at its end


def session(symbol: str, bar: tuple[float, float, float, float], days: list[str], **flags: Any) -> Panel:
    """Some flat sessions at 10.00, then a bar (open, high, low, close)."""
    bars = [(10.0, 10.0, 10.0, 10.0)] * (len(days) - 1) + [bar]
    opened, high, low, close = zip(*bars, strict=True)
    table = {"open": opened, "high": high, "low": low, "close": close, "volume": 1e6, "vwap": close}
    frame = pl.DataFrame({"date": days, "symbol": symbol, "factor": 1.0, **table, **flags})
    return read_panel(frame, Schema(price_limit=CHINA_LIMITS))


@pytest.mark.parametrize(
    ("bar", "masks"),
    [
        ((11.0, 11.0, 11.0, 11.0), (True, False, True, False)),  # one price, at the limit
        ((11.0, 11.0, 10.5, 11.0), (True, False, False, False)),  # opened during the day
        ((10.5, 11.0, 10.5, 11.0), (False, False, False, False)),
        ((9.0, 9.0, 9.0, 9.0), (False, True, False, True)),
        ((9.0, 9.5, 9.0, 9.0), (False, True, False, False)),
        ((10.99, 10.99, 10.99, 10.99), (False, False, False, False)),
    ],
)
def test_sealed_sessions(bar: tuple[float, float, float, float], masks: tuple[bool, ...]) -> None:
    panel = session("SH600000", bar, ["2019-01-02", "2019-01-03"])
    flags = (panel.limit_up, panel.limit_down, panel.sealed_up, panel.sealed_down)
    assert tuple(bool(flag[-1, 0]) for flag in flags) == masks


@pytest.mark.parametrize(
    ("symbol", "last", "special", "width"),
    [
        ("SH600000", "2019-06-06", False, 0.10),
        ("SZ000001", "2019-06-06", True, 0.05),
        ("SZ300001", "2020-08-21", False, 0.10),
        ("SZ300001", "2020-08-24", False, 0.20),
        ("SZ300001", "2020-08-24", True, 0.20),
        ("SH688001", "2019-12-06", False, 0.20),
        ("BJ830799", "2022-01-07", False, 0.30),
        ("AAPL", "2022-01-07", False, None),
    ],
)
def test_limits_of_the_chinese_boards(symbol: str, last: str, special: bool, width: float | None) -> None:
    days = [str(day) for day in np.busday_offset(last, np.arange(-8, 1))]
    for wanted in (0.05, 0.10, 0.20, 0.30):
        price = round(10 * (1 + wanted), 2)
        panel = session(symbol, (price,) * 4, days, special=special)
        assert panel.sealed_up[-1, 0] == (width is not None and wanted >= width)


def test_new_listings_of_reformed_boards_are_free_for_five_sessions() -> None:
    for symbol, first, free in (
        ("SH688001", "2019-12-02", 5),
        ("SZ301001", "2021-06-07", 5),
        ("SH601001", "2024-01-01", 5),
        ("SH601001", "2019-12-02", 1),  # the first bar has no reference price
    ):
        for session_of in range(2, 8):
            days = [str(day) for day in np.busday_offset(first, np.arange(session_of))]
            panel = session(symbol, (13.0,) * 4, days)
            assert panel.sealed_up[-1, 0] == (session_of > free), (symbol, session_of)


def test_limit_prices_of_the_source_seal_too() -> None:
    frame = BARS.with_columns(limit_up=pl.col("low"), limit_down=pl.col("high") + 0.01)
    panel = read_panel(frame, Schema(price_limit=(PriceLimit(width=0.1),)))
    np.testing.assert_array_equal(panel.sealed_up, panel.traded)
    np.testing.assert_array_equal(panel.sealed_down, panel.traded)


# ---- the real panels


def real(name: str, cache: Path, bars: str | None = None) -> tuple[Path, Panel]:
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"no shared/data/{name} beside the repository")
    schema = load_schema(ROOT / "studies" / "schemas" / f"{name}.toml")
    if bars is not None:
        schema = schema.model_copy(update={"bars": bars})
    return folder, read_panel(folder, schema, cache=cache)


def test_us_equity_daily_loads_with_its_schema_alone(tmp_path: Path) -> None:
    folder, panel = real("us-equity-daily", tmp_path)
    level = pl.read_parquet(folder / "index_daily.parquet").with_columns(pl.col("date").cast(pl.Date))
    at = level.filter(pl.col("date").is_in(panel.dates.tolist()))["close"].to_numpy()
    np.testing.assert_array_equal(panel.benchmarks["SP500"], at)
    assert len(panel.industries) == 11
    assert (panel.factor[panel.traded] <= 1.001).all()
    close = panel.field("close")[panel.traded] / panel.factor[panel.traded]
    assert 1 < np.median(close) < 200  # dollars
    assert not panel.limit_up.any()
    text = render(describe(panel))
    assert "SP500" in text
    assert "no vwap" in text
    assert "no price limits" in text
    held = panel.members["SP500"]
    exclusive = pl.read_parquet(folder / "sp500_members.parquet").filter(
        pl.col("has_bars") & pl.col("end_date").is_between(dt.date(2013, 1, 1), dt.date(2017, 1, 1))
    )
    for symbol, _, end, _ in exclusive.head(20).iter_rows():
        t = int(np.searchsorted(panel.dates, np.datetime64(end.date(), "D")))
        n = int(np.flatnonzero(panel.symbols == symbol)[0])
        assert held[t - 1, n]
        assert not held[t, n]


def test_cn_ashare_daily_has_levels_limits_and_delistings(tmp_path: Path) -> None:
    folder, panel = real("cn-ashare-daily", tmp_path, "daily_201[01].parquet")
    assert set(panel.benchmarks) == {"CSI300", "CSI500", "CSI1000"}
    year = panel.dates.astype("datetime64[Y]").astype(int) + 1970
    assert np.isfinite(panel.benchmarks["CSI1000"][year == 2011]).sum() == 1  # the gap of the source
    assert np.isfinite(panel.benchmarks["CSI300"]).all()
    table = pl.read_parquet(folder / "index_daily.parquet").filter(pl.col("symbol") == "SH000905")
    assert panel.benchmarks["CSI500"][0] == table.sort("date")["close"][0]
    assert 0 < panel.sealed_up.sum() < panel.limit_up.sum()
    assert (panel.sealed_up <= panel.limit_up).all()
    assert not (panel.delisted & panel.listed).any()

"""Qlib folders: the same panel as a long table, overlapping spells, levels of indices, damaged files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from test_table import BARS, SESSIONS, found

from steppe.core.errors import DataError
from steppe.quant.panel import FIELDS, Panel
from steppe.quant.sources.qlib import QlibFolder, is_qlib
from steppe.quant.sources.schema import Columns
from steppe.quant.sources.table import read_panel

DAYS = BARS["date"].unique().sort()
SYMBOLS = [f"SH{600000 + i}" for i in range(8)]


def write_series(path: Path, values: np.ndarray, start: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.concatenate([[start], values]).astype("<f4").tofile(path)


def write_qlib(folder: Path, fields: tuple[str, ...] = (*FIELDS, "factor")) -> Path:
    """The bars of `BARS` as Qlib dumps them: adjusted, NaN where suspended, each file from the first bar on."""
    (folder / "calendars").mkdir(parents=True)
    (folder / "instruments").mkdir()
    (folder / "calendars" / "day.txt").write_text("\n".join(map(str, DAYS)) + "\n")
    spans = []
    for n, symbol in enumerate(SYMBOLS):
        rows = pl.DataFrame({"date": DAYS}).join(
            BARS.filter(pl.col("symbol") == f"{n:06d}"), on="date", how="left", maintain_order="left"
        )
        there = np.flatnonzero(rows["close"].is_not_null().to_numpy())
        rows = rows.slice(there[0], there[-1] - there[0] + 1)
        spans.append(f"{symbol}\t{rows['date'][0]}\t{rows['date'][-1]}")
        for field in fields:
            numbers = rows[field].cast(pl.Float64).fill_null(np.nan).to_numpy().copy()
            if field in FIELDS[:5]:
                numbers *= rows["factor"].fill_null(np.nan).to_numpy()
            if field == "volume":
                numbers /= rows["factor"].fill_null(np.nan).to_numpy()
            write_series(folder / "features" / symbol.lower() / f"{field}.day.bin", numbers, there[0])
    (folder / "instruments" / "all.txt").write_text("\n".join(spans) + "\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_qlib(tmp_path / "qlib")


def read(folder: Path) -> Panel:
    return read_panel(folder, cache=folder.parent / "cache")


def test_a_qlib_folder_gives_the_panel_of_the_long_table(folder: Path) -> None:
    assert is_qlib(folder)
    panel, table = read(folder), read_panel(BARS)
    assert list(panel.symbols) == SYMBOLS
    np.testing.assert_array_equal(panel.dates, table.dates)
    np.testing.assert_array_equal(panel.traded, table.traded)
    np.testing.assert_allclose(panel.values, table.values, rtol=1e-6)
    np.testing.assert_array_equal(panel.factor, table.factor)
    np.testing.assert_array_equal(panel.age, table.age)
    gaps = int((~table.traded & table.listed).sum()) - sum(
        int(SESSIONS - 1 - np.flatnonzero(column).max()) for column in table.traded.T
    )
    assert found(panel) == {"suspended": gaps}
    assert isinstance(panel.values, np.memmap)


def test_what_the_folder_says_is_in_the_fingerprint_and_the_cache(folder: Path) -> None:
    first = read(folder)
    assert read(folder).fingerprint == first.fingerprint
    (folder / "instruments" / "csi300.txt").write_text(f"SH600000\t{DAYS[0]}\t{DAYS[9]}\n")
    second = read(folder)
    assert second.fingerprint != first.fingerprint
    assert second.members["CSI300"].sum() == 10


def test_overlapping_spells_are_joined_and_counted(folder: Path) -> None:
    spells = [(0, 5, 10), (0, 8, 20), (0, 20, 25), (1, 0, 4), (1, 5, 9)]
    text = [f"{SYMBOLS[n]}\t{DAYS[a]}\t{DAYS[b]}" for n, a, b in spells]
    (folder / "instruments" / "csi300.txt").write_text("\n".join([*text, f"SZ999999\t{DAYS[0]}\t{DAYS[3]}"]))
    panel = read(folder)
    held = panel.members["CSI300"]
    assert np.flatnonzero(held[:, 0]).tolist() == list(range(5, 26))
    assert np.flatnonzero(held[:, 1]).tolist() == list(range(10))  # both ends count
    counts = found(panel)
    assert counts["member_overlap"] == 1
    assert counts["member_no_bars"] == 1
    assert "all" not in {name.lower() for name in panel.members}


def test_the_index_of_a_market_is_its_benchmark_and_no_stock(folder: Path) -> None:
    (folder / "instruments" / "csi300.txt").write_text(f"SH600000\t{DAYS[0]}\t{DAYS[9]}\n")
    level = np.linspace(3000, 3100, SESSIONS)
    level[7] = np.nan
    write_series(folder / "features" / "sh000300" / "close.day.bin", level)
    panel = read(folder)
    assert list(panel.symbols) == SYMBOLS
    np.testing.assert_allclose(panel.benchmarks["CSI300"], level, rtol=1e-6)
    assert found(panel)["benchmark_gap"] == 1


def test_vwap_is_optional_and_money_is_the_amount(tmp_path: Path) -> None:
    folder = write_qlib(tmp_path / "qlib", tuple(f for f in (*FIELDS, "factor") if f != "vwap"))
    panel = read(folder)
    assert any("no vwap" in note for note in panel.notes)
    for n, symbol in enumerate(SYMBOLS):
        rows = BARS.filter(pl.col("symbol") == f"{n:06d}")
        dense = np.full(SESSIONS, np.nan)
        dense[np.searchsorted(DAYS.to_numpy(), rows["date"].to_numpy())] = rows["vwap"] * rows["volume"]
        write_series(folder / "features" / symbol.lower() / "money.day.bin", dense)
    panel = read(folder)
    np.testing.assert_allclose(panel.field("vwap"), read_panel(BARS).field("vwap"), rtol=1e-5)


def test_a_delisted_stock_stays_until_its_last_bar(folder: Path) -> None:
    panel = read(folder)
    assert panel.traded[:, 2].any()
    assert not panel.traded[2 * SESSIONS // 3 :, 2].any()


def edit_file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return edit


CLOSE = "features/sh600003/close.day.bin"
DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (edit_file(CLOSE, lambda data: data[:-3]), r"sh600003/close\.day\.bin is truncated"),
    "empty": (edit_file(CLOSE, lambda data: b""), r"sh600003/close\.day\.bin is truncated: 0 bytes"),
    "too long": (edit_file(CLOSE, lambda data: data * 2), r"sh600003/close\.day\.bin does not fit"),
    "start": (edit_file(CLOSE, lambda d: np.float32(-1).tobytes() + d[4:]), "it starts at -1"),
    "half a start": (edit_file(CLOSE, lambda d: np.float32(0.5).tobytes() + d[4:]), r"it starts at 0\.5"),
    "no start": (edit_file(CLOSE, lambda d: np.float32("nan").tobytes() + d[4:]), "it starts at nan"),
    "missing": (lambda f: (f / CLOSE).unlink(), r"sh600003 has no close\.day\.bin"),
    "day": (edit_file("calendars/day.txt", lambda d: b"soon\n" + d), "unreadable day 'soon'"),
    "order": (
        edit_file("calendars/day.txt", lambda d: b"\n".join(d.split()[::-1])),
        "not in order: .* comes after",
    ),
    "no calendar": (edit_file("calendars/day.txt", lambda d: b"\n"), r"day\.txt: no days"),
    "spaces": (edit_file("instruments/all.txt", lambda d: d.replace(b"\t", b" ")), r"all\.txt, line 1"),
    "span": (edit_file("instruments/all.txt", lambda d: d.replace(b"2015-", b"x")), "unreadable dates"),
    "nothing": (edit_file("instruments/all.txt", lambda d: b"X\t2015-01-05\t2015-01-05"), "no instrument"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folders_are_errors_that_name_the_file(folder: Path, case: str) -> None:
    change, message = DAMAGED[case]
    change(folder)
    with pytest.raises(DataError, match=message):
        read(folder)


def test_absurd_numbers_fall_under_the_rules_of_tables(folder: Path) -> None:
    path = folder / CLOSE
    values = np.fromfile(path, "<f4")
    values[1:] = 1e30
    values.tofile(path)
    with pytest.raises(DataError, match="low > high, or open or close outside"):
        read(folder)


def test_unlisted_instruments_are_told(folder: Path) -> None:
    with (folder / "instruments" / "all.txt").open("a") as stream:
        stream.write(f"SZ000999\t{DAYS[0]}\t{DAYS[1]}\n")
    assert any("SZ000999" in note for note in read(folder).notes)


def test_bars_are_raw(folder: Path) -> None:
    bars, _, _ = QlibFolder.scan(folder).read(Columns())
    row = BARS.filter(pl.col("symbol") == "000005").row(30, named=True)
    same = bars.filter((pl.col("symbol") == "SH600005") & (pl.col("date") == row["date"])).row(0, named=True)
    assert same["close"] == pytest.approx(row["close"], rel=1e-6)
    assert same["volume"] == pytest.approx(row["volume"], rel=1e-6)

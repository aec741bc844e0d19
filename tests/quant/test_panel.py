"""The panel itself: shapes are checked, a round trip over the disk changes nothing, damage is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from panels import make_panel

from steppe.core.errors import DataError
from steppe.quant.describe import describe, render
from steppe.quant.panel import Panel, Repair

T, N = 30, 4


def small_panel(**changes: Any) -> Panel:
    """With suspensions, odd symbols, repairs and notes."""
    traded = np.random.default_rng(0).random((T, N)) < 0.9
    traded[[0, -1]] = True
    return make_panel(
        (T, N),
        **{
            "name": "small",
            "traded": traded,
            "symbols": np.array(["A", "B", "C", "株"]),
            "members": {"X 100": np.ones((T, N), np.bool_)},
            "weights": {"X 100": np.full((T, N), 1 / N, np.float32)},
            "benchmarks": {"X 100": np.linspace(1000, 1010, T)},
            "repairs": (Repair("range", 2, ("A 2015-01-01",)),),
            "notes": ("a note",),
        }
        | changes,
    )


def assert_same(a: Panel, b: Panel) -> None:
    for key, value in vars(a).items():
        other = getattr(b, key)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other, err_msg=key)
            assert value.dtype == other.dtype, key
        elif isinstance(value, dict):
            assert list(value) == list(other)
            for name in value:
                np.testing.assert_array_equal(value[name], other[name], err_msg=f"{key} {name}")
        else:
            assert value == other, key


def test_round_trip_is_memory_mapped_and_exact(tmp_path: Path) -> None:
    panel = small_panel()
    panel.save(tmp_path / "p")
    opened = Panel.open(tmp_path / "p")
    assert isinstance(opened.values, np.memmap)
    assert not opened.values.flags.writeable
    assert_same(panel, opened)


def test_field_is_a_view() -> None:
    panel = small_panel()
    assert np.shares_memory(panel.field("vwap"), panel.values)


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    small_panel().save(tmp_path / "p")
    small_panel(name="second").save(tmp_path / "p")
    assert Panel.open(tmp_path / "p").name == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="no space"):
        small_panel().save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 60, 500])
def test_a_truncated_array_is_an_error(tmp_path: Path, size: int) -> None:
    small_panel().save(tmp_path / "p")
    with (tmp_path / "p" / "values.npy").open("r+b") as stream:
        stream.truncate(size)
    with pytest.raises(DataError, match=r"damaged: values\.npy"):
        Panel.open(tmp_path / "p")


def test_not_a_panel(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a saved panel"):
        Panel.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="format 99"):
        Panel.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.zeros((T, N, 5), np.float32)}, "values"),
        ({"special": np.zeros((T, N + 1), np.bool_)}, "special"),
        ({"sealed_down": np.zeros((T, N + 1), np.bool_)}, "sealed_down"),
        ({"benchmarks": {"I": np.zeros(T + 1)}}, r"benchmarks\[I\].*\[dates\]"),
        ({"members": {"I": np.zeros((N, T), np.bool_)}}, r"members\[I\]"),
        ({"dates": np.full(T, np.datetime64("2015-01-01"))}, "strictly increasing"),
        ({"symbols": np.array([], np.str_)}, "is empty"),
    ],
)
def test_wrong_shapes_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        small_panel(**changes)


def test_description_counts_by_hand() -> None:
    panel = small_panel()
    d = describe(panel)
    assert (d.sessions, d.stocks, d.bars) == (T, N, int(panel.traded.sum()))
    assert d.suspended == pytest.approx(
        1 - d.bars / (T * N)
    )  # every stock trades on the first and last session
    assert sum(year.bars for year in d.years) == d.bars
    assert d.years[0].members == {"X 100": (N, N)}
    runs = ["".join("10"[int(x)] for x in column) for column in panel.traded.T]
    assert d.gaps[0].sessions == max(len(run) for column in runs for run in column.split("0"))
    text = render(d)
    assert "SIMULATED" in text
    assert "a note" in text
    assert f"X 100 with {T} levels and {T} sessions of weights" in text
    assert "low > high" in text

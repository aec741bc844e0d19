"""What is checked of the tables on the way in: the rules as data, and the ledger that counts their cases.

Every rule is an error or a repair that is counted and listed with examples; nothing is repaired in silence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import polars as pl

from steppe.core.errors import DataError
from steppe.quant.panel import Repair

__all__ = ["EXAMPLES", "RULES", "Ledger", "Rule", "row_codes"]

EXAMPLES = 5
"""Examples kept per rule."""


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong with the input.

    Attributes:
        action: what happens to a case: it stops the reading, its row is dropped, it is mended, or it is only listed.
        text: the case and its remedy, as a line of `steppe data check`.
        limit: the share of the bars above which a repair becomes an error: too many to be accidents.
        shown: the columns that an example shows.
        hint: what to do when the rule stops the reading.
    """

    action: Literal["error", "drop", "mend", "list"]
    text: str
    limit: float = 1.0
    shown: tuple[str, ...] = ()
    hint: str = ""


_SCALE = "Are the units declared under [scale]?"
_OHLC = ("open", "high", "low", "close")

RULES: dict[str, Rule] = {
    # rows, in this order: the first rule that fits a row decides
    "suspended": Rule("drop", "rows of no volume or of no values: suspensions, dropped"),
    "price": Rule("drop", "prices missing, infinite or <= 0: row dropped", 0.01, _OHLC),
    "range": Rule(
        "drop", "low > high, or open or close outside [low, high]: row dropped", 0.01, _OHLC, _SCALE
    ),
    "volume": Rule("drop", "volume missing, infinite or negative: row dropped", 0.01, ("volume",)),
    "factor": Rule(
        "error", "factor missing, infinite or <= 0", 0, ("factor", "close"), "Correct these rows."
    ),
    "vwap_missing": Rule("mend", "vwap missing: (high + low + close) / 3 instead", 1, ("vwap", "volume")),
    "vwap_range": Rule(
        "mend",
        "vwap more than half a tick outside [low, high]: (high + low + close) / 3 instead",
        0.01,
        ("vwap", "low", "high"),
        _SCALE + " A vwap made of amount / volume needs both in currency and shares.",
    ),
    # the table as a whole
    "no_factor": Rule("list", "bars in tables without factor or adj_close: prices taken as adjusted already"),
    "unsorted": Rule("mend", "rows that come after a later row of the same stock: sorted"),
    "duplicate": Rule("drop", "exact duplicates of a row: dropped"),
    "conflict": Rule(
        "error", "rows that share stock and date but not their values", 0, (), "Keep one of each."
    ),
    "weekend": Rule(
        "error", "sessions on a Saturday or Sunday", 0, (), "Drop them, or set weekends = true in the schema."
    ),
    "thin_session": Rule("list", "sessions on which fewer than half the usual number of stocks trade"),
    "session_gap": Rule("list", "more than 14 days without a session: is a file missing?"),
    # side files
    "unlisted_bar": Rule("list", "stocks with bars outside [list date, last date]: the bars count as listed"),
    "no_security": Rule("list", "stocks with bars that the securities file lacks"),
    "member_no_bars": Rule("list", "members of an index without any bar: their spells are left out"),
    "member_overlap": Rule("mend", "overlapping or repeated membership spells of one stock: joined"),
    "member_empty": Rule("drop", "membership spells that end before they start: dropped"),
    "float_shares": Rule("drop", "float shares missing, infinite or <= 0: dropped"),
    "float_conflict": Rule(
        "error", "float shares given twice for a stock and date", 0, (), "Keep one of each."
    ),
    "float_no_bars": Rule("list", "stocks with float shares but without any bar: left out"),
    "weight": Rule("drop", "index weights missing, infinite or negative: dropped"),
    "weight_conflict": Rule(
        "error", "index weights given twice for a stock and date", 0, (), "Keep one of each."
    ),
    "weight_no_bars": Rule("list", "stocks with an index weight but without any bar: the others share it"),
    "weight_new_member": Rule("list", "members that the snapshot of weights lacks: weight 0 until the next"),
    "benchmark": Rule("drop", "index levels missing, infinite or <= 0: dropped"),
    "benchmark_conflict": Rule("error", "index levels given twice for a date", 0, (), "Keep one of each."),
    "benchmark_gap": Rule("list", "sessions without a level between the first and last of an index"),
}
"""Every rule by name, in the order in which they are printed."""

_ROW_RULES = ("suspended", "price", "range", "volume", "factor", "vwap_missing", "vwap_range")


def row_codes(tick: float) -> pl.Expr:
    """UInt8 per row of canonical bars: 0, or 1 + the index in `RULES` of the first rule that the row breaks.

    NaN counts as missing. A vwap up to half a tick outside [low, high] is rounding and stays.
    """
    prices = [pl.col(name) for name in _OHLC]
    open_, high, low, close = prices
    slack = tick / 2 * (1 + 1e-4)  # float32 prices
    vwap = pl.col("vwap")

    def sound(column: pl.Expr) -> pl.Expr:
        return (column.is_finite() & (column > 0)).fill_null(False)

    nothing = pl.all_horizontal(*(price.is_null() for price in prices), pl.col("volume").is_null())
    broken = {
        "suspended": (pl.col("volume") == 0).fill_null(False) | nothing,
        "price": ~pl.all_horizontal(*(sound(price) for price in prices)),
        "range": (low > high) | (open_ > high) | (open_ < low) | (close > high) | (close < low),
        "volume": ~sound(pl.col("volume")),
        "factor": ~sound(pl.col("factor")),
        "vwap_missing": ~(vwap.is_finite()).fill_null(False),
        "vwap_range": (vwap < low - slack) | (vwap > high + slack),
    }
    names = list(RULES)
    code = pl.lit(0, pl.UInt8)
    for name in reversed(_ROW_RULES):
        code = pl.when(broken[name]).then(pl.lit(1 + names.index(name), pl.UInt8)).otherwise(code)
    return code.alias("rule")


@dataclass
class Ledger:
    """Counts the cases of every rule, keeps the first examples, and gives the verdict.

    A rule named in `fatal` stops the reading at its first case.
    """

    fatal: frozenset[str] = frozenset()
    rows: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RULES, 0))
    examples: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in RULES})

    def add(self, name: str, count: int, examples: Iterable[object] = ()) -> None:
        """Count cases of a rule."""
        self.counts[name] += int(count)
        room = EXAMPLES - len(self.examples[name])
        self.examples[name] += [str(example) for _, example in zip(range(room), examples, strict=False)]

    def add_rows(self, bars: pl.DataFrame) -> None:
        """Count the bars of a table with the column ``rule`` of `row_codes`."""
        self.rows += bars.height
        names = list(RULES)
        for code in np.flatnonzero(np.bincount(bars["rule"].to_numpy())):
            if code:
                name = names[code - 1]
                cases = bars.filter(pl.col("rule") == int(code))
                first = cases.head(EXAMPLES).iter_rows(named=True)
                self.add(name, cases.height, [_example(RULES[name].shown, row) for row in first])

    def verdict(self) -> None:
        """Raise if a rule says so.

        Raises:
            DataError: names every rule that stops the reading, with counts, examples and what to do.
        """
        faults = []
        for name, rule in RULES.items():
            count = self.counts[name]
            fatal = rule.action == "error" or name in self.fatal
            if not count or (not fatal and count <= rule.limit * self.rows):
                continue
            share = "" if fatal else f" (more than {rule.limit:.0%} of {self.rows} rows)"
            shown = "; ".join(self.examples[name])
            faults.append(f"{count} {rule.text}{share}, such as: {shown}. {rule.hint}".rstrip())
        if faults:
            raise DataError("the table cannot be used:\n  " + "\n  ".join(faults))

    def repairs(self) -> tuple[Repair, ...]:
        """The rules that found something, in the order of `RULES`."""
        return tuple(
            Repair(name, count, tuple(self.examples[name])) for name, count in self.counts.items() if count
        )


def _example(shown: tuple[str, ...], row: dict[str, object]) -> str:
    values = ", ".join(f"{key} {_number(row[key])}" for key in shown)
    return f"{row['symbol']} {row['date']} {values}".rstrip()


def _number(value: object) -> str:
    return f"{value:.7g}" if isinstance(value, float) else "missing"

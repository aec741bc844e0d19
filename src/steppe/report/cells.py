"""What every table of the report is made of: rows, columns, and how a value is written in a cell."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from markupsafe import Markup, escape

from steppe.report.results import NO_MODEL, Results

__all__ = [
    "DASH",
    "Column",
    "Row",
    "Table",
    "chip",
    "color",
    "finite",
    "flatten",
    "interval",
    "is_best",
    "number",
    "outcome",
    "percent",
    "plain",
    "score_name",
    "significant",
    "times",
    "two_lines",
    "whisker",
]

DASH = "–"
MINUS = "\N{MINUS SIGN}"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the page; ``show`` turns a row into what stands in the cell.

    Attributes:
        title: its heading.
        show: from the row to text or markup.
        numeric: right aligned, in figures of equal width.
        best: whether more (1) or less (-1) is better in this column, 0 for neither; the best cell is set bold.
        key: what the column is judged by; empty if it has no order.
    """

    title: str
    show: Callable[[Row], str]
    numeric: bool = True
    best: int = 0
    key: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of plain values, for a CSV file, and the columns that show them.

    Attributes:
        name: of the CSV file.
        caption: one line under or over the table.
        columns: of the page.
        rows: plain values by key; a row's ``optimizer`` gives it its colour.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row] = field(default_factory=list)

    def csv(self) -> str:
        """The rows as CSV, full precision, empty where a value is missing."""
        keys = list(dict.fromkeys(key for row in self.rows for key in row))
        file = io.StringIO()
        writer = csv.DictWriter(file, keys, restval="", lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({k: "" if v is None or v != v else v for k, v in row.items()})
        return file.getvalue()

    def is_best(self, column: Column, row: Row) -> bool:
        """Whether ``row`` holds the best value of ``column``, as `is_best` has it."""
        return bool(column.key) and is_best(
            row[column.key], [other[column.key] for other in self.rows], column.best
        )


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """Fixed decimals with a true minus sign and thousands apart; a dash if missing."""
    if not finite(value):
        return DASH
    text = f"{value:{'+' if sign else ''},.{digits}f}".replace("-", MINUS).replace(
        ",", "\N{NARROW NO-BREAK SPACE}"
    )
    return text.replace(MINUS, "", 1) if not any(c in "123456789" for c in text) else text


def significant(value: float | None, digits: int = 3) -> str:
    """Significant digits, for what may be of any size; a dash if missing."""
    if not finite(value):
        return DASH
    text, _, exponent = f"{value:#.{digits}g}".partition("e")
    text = text.rstrip(".")
    return (f"{text}e{int(exponent)}" if exponent else text).replace("-", MINUS)


def plain(value: float, digits: int) -> str:
    """At most so many significant digits, without zeros that only fill them up."""
    return f"{value:.{digits}g}".replace("-", MINUS)


def percent(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A share as per cent."""
    return number(None if value is None else 100 * value, digits, sign=sign) + (
        "\N{NO-BREAK SPACE}%" if finite(value) else ""
    )


def times(value: float | None) -> str:
    """A ratio to the baseline."""
    return number(value, 2) + ("×" if finite(value) else "")


def interval(low: float | None, high: float | None, digits: int = 4, *, sign: bool = False) -> str:
    """``[low, high]``, or nothing if there is none."""
    if not (finite(low) and finite(high)):
        return ""
    return f"[{number(low, digits, sign=sign)}, {number(high, digits, sign=sign)}]"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted names and text, in order."""
    flat: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flat.append((f"{prefix}{key}", ", ".join(map(str, value)) or "none"))
        else:
            flat.append((f"{prefix}{key}", str(value)))
    return flat


def score_name(part: str) -> str:
    """How a tested score is called in running text."""
    return {"blend": "blend of all parts", "model": "model's score"}.get(part, f"{part} score")


def chip(results: Results, label: str) -> Markup:
    """An optimizer's name beside its colour."""
    role = Markup(' <span class="role">baseline</span>') if label == results.baseline else ""
    name = "no model" if label == NO_MODEL else label
    return Markup('<span class="chip" style="--c: var({})">{}</span>{}').format(
        color(results, label), name, role
    )


def color(results: Results, label: str) -> str:
    """The CSS variable of an optimizer's colour: grey for the baseline, the same on the whole page."""
    return f"--opt-{results.optimizers.index(label)}" if label in results.optimizers else "--soft"


def two_lines(first: str, second: str) -> Markup:
    """A value over its interval."""
    return Markup("{}<small>{}</small>").format(first, second) if second else escape(first)


def outcome(text: str) -> Markup:
    """The outcome of a comparison as a coloured word."""
    css = {"better": "good", "worse": "bad"}.get(text, "quiet")
    return Markup('<span class="{}">{}</span>').format(css, text)


def whisker(results: Results, row: Row, scale: float) -> Markup:
    """An interval of the difference as a small drawing; the line marks no difference."""
    if not finite(row["difference_low"]) or not scale:
        return Markup("")
    low, mid, high = (
        60 + 54 * row[key] / scale for key in ("difference_low", "difference", "difference_high")
    )
    return Markup(
        '<svg class="whisker" viewBox="0 0 120 16" role="img" aria-label="interval of the difference">'
        '<line class="zero" x1="60" x2="60" y1="0" y2="16"/>'
        '<g style="stroke: var({c}); fill: var({c})"><line x1="{low:.1f}" x2="{high:.1f}" y1="8" y2="8"/>'
        '<circle cx="{mid:.1f}" cy="8" r="3.2"/></g></svg>'
    ).format(c=color(results, row["optimizer"]), low=low, mid=mid, high=high)


def is_best(value: float | None, among: Sequence[float | None], direction: int) -> bool:
    """Whether ``value`` is the best of at least two different finite ones; more is better where direction is 1."""
    known = [direction * other for other in among if finite(other)]
    return direction != 0 and finite(value) and direction * value == max(known) > min(known)


def finite(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a number that can be shown."""
    return isinstance(value, int | float) and math.isfinite(value)

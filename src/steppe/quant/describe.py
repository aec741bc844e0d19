"""What a person wants to know of a panel before trusting it: `steppe data check`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from steppe.quant.panel import FIELDS, Panel, Repair
from steppe.quant.sources.checks import RULES
from steppe.quant.sources.table import read_panel

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Description", "Gap", "Year", "check", "describe", "render"]

MOVES = (0.11, 0.21, 0.51)
"""Sizes of adjusted returns that are counted: beyond limits of 10 and 20 %, and beyond all likelihood."""

RECENT = 60
"""A stock without a bar in the last so many sessions counts as ended."""


@dataclass(frozen=True)
class Year:
    """One calendar year. `members` is (fewest, most) stocks per index on a session, of those in the panel."""

    year: int
    sessions: int
    stocks: int
    bars: int
    suspended: float
    float_cap: float
    members: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Gap:
    """A stock's longest stretch of sessions without a bar between two bars."""

    symbol: str
    sessions: int
    last: str
    next: str


@dataclass(frozen=True)
class Description:
    """Facts of a panel. Shares are of bars, unless they say otherwise."""

    name: str
    simulated: bool
    fingerprint: str
    first: str
    last: str
    sessions: int
    stocks: int
    bars: int
    bytes: int
    years: tuple[Year, ...]
    suspended: float
    """Share of the cells between a stock's first and last bar that have no bar."""
    gaps: tuple[Gap, ...]
    ended: int
    """Stocks without a bar in the last `RECENT` sessions."""
    delisted: int
    """Those of them that the source knows as delisted."""
    industries: tuple[tuple[str, int], ...]
    """Stocks per industry on the day of their last bar, the largest first."""
    industry_unknown: int
    float_cap: float
    special: float
    limit_up: float
    limit_down: float
    sealed_up: float
    sealed_down: float
    moves: tuple[tuple[float, int], ...]
    """(size, number of bars whose adjusted close is farther than that from the previous one)."""
    largest_moves: tuple[str, ...]
    indices: tuple[tuple[str, int, int], ...]
    """(index, sessions with a level of its price index, sessions with weights)."""
    repairs: tuple[Repair, ...]
    notes: tuple[str, ...]


def describe(panel: Panel) -> Description:
    """Count everything in one pass over the dates; a memory-mapped panel stays on disk."""
    sessions, stocks = panel.shape
    close, bars = FIELDS.index("close"), panel.traded.sum(axis=1)
    last_close = np.full(stocks, np.nan)
    first_bar, last_bar = np.full(stocks, -1), np.full(stocks, -1)
    gap, gap_end = np.zeros(stocks, np.int64), np.zeros(stocks, np.int64)
    moves = np.zeros(len(MOVES), np.int64)
    largest: list[tuple[float, str]] = []
    for t in range(sessions):
        on = np.flatnonzero(panel.traded[t])
        price = panel.values[t, on, close].astype(np.float64)
        change = price / last_close[on] - 1
        moves += [np.count_nonzero(np.abs(change) > size) for size in MOVES]
        odd = np.flatnonzero(np.abs(change) > MOVES[-1])
        largest += [(change[i], f"{panel.symbols[on[i]]} {panel.dates[t]} {change[i]:+.0%}") for i in odd]
        missed = np.where(last_bar[on] < 0, 0, t - last_bar[on] - 1)
        longer = missed > gap[on]
        gap[on[longer]], gap_end[on[longer]] = missed[longer], t
        first_bar[on[first_bar[on] < 0]] = t
        last_bar[on] = t
        last_close[on] = price

    inside = _between(first_bar, last_bar, sessions)
    capped = np.array([np.isfinite(panel.float_cap[t][panel.traded[t]]).sum() for t in range(sessions)])
    ended = (last_bar >= 0) & (last_bar < sessions - RECENT)
    industry = panel.industry[np.maximum(last_bar, 0), np.arange(stocks)]
    count = np.bincount(industry[industry >= 0], minlength=len(panel.industries))
    total = int(bars.sum())
    longest = np.argsort(-gap, kind="stable")[:5]
    largest.sort(key=lambda move: -abs(move[0]))
    return Description(
        name=panel.name,
        simulated=panel.simulated,
        fingerprint=panel.fingerprint,
        first=str(panel.dates[0]),
        last=str(panel.dates[-1]),
        sessions=sessions,
        stocks=stocks,
        bars=total,
        bytes=_bytes(panel),
        years=_years(panel, bars, inside, capped),
        suspended=1 - total / max(int(inside.sum()), 1),
        gaps=tuple(
            Gap(
                str(panel.symbols[n]),
                int(gap[n]),
                str(panel.dates[gap_end[n] - gap[n] - 1]),
                str(panel.dates[gap_end[n]]),
            )
            for n in longest
            if gap[n] > 0
        ),
        ended=int(ended.sum()),
        delisted=int((ended & ~panel.listed[-1]).sum()),
        industries=tuple(
            (panel.industries[i], int(count[i])) for i in np.argsort(-count, kind="stable") if count[i]
        ),
        industry_unknown=int((industry < 0).sum()),
        float_cap=float(capped.sum() / max(total, 1)),
        special=_share(panel.special, panel.traded, total),
        limit_up=_share(panel.limit_up, panel.traded, total),
        limit_down=_share(panel.limit_down, panel.traded, total),
        sealed_up=_share(panel.sealed_up, panel.traded, total),
        sealed_down=_share(panel.sealed_down, panel.traded, total),
        moves=tuple((size, int(number)) for size, number in zip(MOVES, moves, strict=True)),
        largest_moves=tuple(text for _, text in largest[:5]),
        indices=tuple((index, *_known(panel, index)) for index in {**panel.benchmarks, **panel.weights}),
        repairs=panel.repairs,
        notes=panel.notes,
    )


def _known(panel: Panel, index: str) -> tuple[int, int]:
    """Sessions with a level and sessions with weights."""
    level, weight = panel.benchmarks.get(index), panel.weights.get(index)
    return (
        0 if level is None else int(np.isfinite(level).sum()),
        0 if weight is None else int(weight.any(axis=1).sum()),
    )


def _between(first: NDArray[np.int64], last: NDArray[np.int64], sessions: int) -> NDArray[np.int64]:
    """``[T]`` stocks between their first and last bar."""
    alive = first >= 0
    steps = np.bincount(first[alive], minlength=sessions + 1) - np.bincount(
        last[alive] + 1, minlength=sessions + 1
    )
    return np.cumsum(steps)[:sessions]


def _share(flag: NDArray[np.bool_], traded: NDArray[np.bool_], bars: int) -> float:
    return float(np.count_nonzero(flag & traded) / max(bars, 1))


def _bytes(panel: Panel) -> int:
    arrays = [value for value in vars(panel).values() if isinstance(value, np.ndarray)]
    maps = (panel.members, panel.weights, panel.benchmarks)
    return sum(array.nbytes for array in [*arrays, *(plane for each in maps for plane in each.values())])


def _years(
    panel: Panel, bars: NDArray[np.int64], inside: NDArray[np.int64], capped: NDArray[np.int64]
) -> tuple[Year, ...]:
    of_date = panel.dates.astype("datetime64[Y]").astype(np.int64) + 1970
    size = {index: plane.sum(axis=1) for index, plane in panel.members.items()}
    years = []
    for year in np.unique(of_date):
        at = np.flatnonzero(of_date == year)
        number = int(bars[at].sum())
        years.append(
            Year(
                year=int(year),
                sessions=len(at),
                stocks=int(panel.traded[at[0] : at[-1] + 1].any(axis=0).sum()),
                bars=number,
                suspended=float(1 - number / max(int(inside[at].sum()), 1)),
                float_cap=float(capped[at].sum() / max(number, 1)),
                members={index: (int(n[at].min()), int(n[at].max())) for index, n in size.items()},
            )
        )
    return tuple(years)


def render(description: Description, *, checked: bool = False) -> str:
    """The description as plain text of about one screen.

    With ``checked`` (the panel comes from `read_panel`) the rules that found nothing are named too.
    """
    d = description
    label = " (SIMULATED)" if d.simulated else ""
    lines = [
        f"{d.name}{label}: {d.bars:,} bars, {d.stocks:,} stocks, {d.sessions:,} sessions {d.first} to {d.last}",
        f"{d.bytes / 2**20:,.0f} MiB on disk, fingerprint {d.fingerprint[:16]}",
        "",
        *_year_table(d),
        "",
        f"suspended     {d.suspended:.2%} of the sessions between a stock's first and last bar",
        *_wrapped("longest", [f"{g.symbol} {g.sessions} sessions ({g.last} to {g.next})" for g in d.gaps]),
        f"ended         {d.ended} stocks have no bar in the last {RECENT} sessions, {d.delisted} of them delisted",
        f"at the limit  {d.limit_up:.3%} of opens up, {d.limit_down:.3%} down; all session: {d.sealed_up:.3%} up, "
        f"{d.sealed_down:.3%} down",
        f"special       {d.special:.2%} of bars",
        "large moves   " + ", ".join(f"{number:,} beyond {size:.0%}" for size, number in d.moves),
        *_wrapped("largest", d.largest_moves),
        f"float cap     {d.float_cap:.2%} of bars",
        *_wrapped(
            "industries", [f"{name} {n}" for name, n in d.industries] + [f"unknown {d.industry_unknown}"]
        ),
        *_wrapped(
            "indices",
            [
                f"{index} with {level:,} levels and {weight:,} sessions of weights"
                for index, level, weight in d.indices
            ],
        ),
        "",
        "checks" if checked else "repairs",
    ]
    for repair in d.repairs:
        text = RULES[repair.rule].text if repair.rule in RULES else repair.rule
        lines.append(f"  {repair.count:>9,}  {text}")
        lines += [f"             {example}" for example in repair.examples[:3]]
    if checked:
        found = {repair.rule for repair in d.repairs}
        lines += _wrapped("  none of", [name for name in RULES if name not in found])
    elif not d.repairs:
        lines.append("  none")
    if d.notes:
        lines += ["", "notes", *(f"  - {note}" for note in d.notes)]
    return "\n".join(lines)


def _year_table(d: Description) -> list[str]:
    indices = list(d.years[0].members)
    head = ["year", "sessions", "stocks", "bars", "suspended", "float cap", *indices]
    rows = [
        [
            str(year.year),
            str(year.sessions),
            f"{year.stocks:,}",
            f"{year.bars:,}",
            f"{year.suspended:.1%}",
            f"{year.float_cap:.1%}",
            *("-".join(map(str, dict.fromkeys(year.members[index]))) for index in indices),
        ]
        for year in d.years
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]
    ]


def _wrapped(title: str, items: Sequence[str], width: int = 110) -> list[str]:
    """A titled list over as many lines as it needs."""
    lines, line = [], title.ljust(14)
    for i, item in enumerate(items):
        if len(line) + len(item) > width and line.strip():
            lines.append(line.rstrip())
            line = " " * 14
        line += item + (", " if i < len(items) - 1 else "")
    return [*lines, line.rstrip()] if items else []


def check(path: str | Path, schema: str | Path | None = None) -> Text:
    """Read a panel with all checks and return what there is to know of it, ready to print.

    Raises:
        DataError: the tables break a rule that cannot be repaired; the message lists every such rule.
        SpecError: the schema is wrong.
    """
    from rich.text import Text  # the lab extra; here, because describe() and render() need no more than numpy

    panel = read_panel(path, schema)
    return Text(render(describe(panel), checked=not (Path(path) / "manifest.json").is_file()))

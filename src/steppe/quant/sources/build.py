"""From checked bars to the dense panel. What a date holds is computed from that date and those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steppe.quant.bars import carried_closes
from steppe.quant.panel import FIELDS, Panel
from steppe.quant.sources.checks import EXAMPLES, Ledger
from steppe.quant.sources.indices import (
    IndexTables,
    level_series,
    member_planes,
    weight_planes,
)
from steppe.quant.sources.reading import Bars
from steppe.quant.sources.schema import PriceLimit, Schema
from steppe.quant.sources.sides import (
    NEVER,
    Facts,
    ShareEvents,
    read_float_shares,
    read_securities,
)

__all__ = ["build_panel"]

EPOCH = date(1970, 1, 1)
OPEN, HIGH, LOW, CLOSE, _, VOLUME = range(len(FIELDS))


def build_panel(
    bars: Bars,
    schema: Schema,
    folder: Path,
    indices: IndexTables,
    ledger: Ledger,
    notes: Sequence[str],
    name: str,
    fingerprint: str,
) -> Panel:
    """Check the bars as a whole, read the side files of stocks in `folder`, and assemble the panel.

    Takes the memory of `bars` over: its numbers are adjusted in place.

    Raises:
        DataError: a rule of `RULES` stops the reading.
    """
    notes = list(notes)
    _count_unsorted(bars, ledger)
    days = np.unique(bars.days)
    bars, cell = _without_duplicates(bars, days, ledger)
    shape = (len(days), len(bars.symbols))
    traded = np.zeros(shape, np.bool_)
    traded.reshape(-1)[cell] = True
    _check_calendar(days, traded, schema, ledger)

    members = {}
    if indices.spells is not None:
        members = member_planes(indices.spells, days, bars.symbols, ledger, notes)
    facts, shares = None, None
    if schema.securities is not None:
        facts = read_securities(folder, schema.securities, bars.symbols, ledger)
    if schema.float_shares is not None:
        shares = read_float_shares(folder, schema.float_shares, days, bars.symbols, ledger)
    listed, age = _listing(days, traded, facts, bars.symbols, ledger)

    planes = _Planes.scatter(bars, cell, shape)
    industries: tuple[str, ...] = ()
    if bars.industry is not None:
        planes.industry.reshape(-1)[cell], industries = _by_first_session(bars, cell)
    benchmarks, weights = {}, {}
    if indices.levels is not None:
        benchmarks = level_series(indices.levels, days, ledger)
    if indices.weights is not None:
        price = carried_closes(planes.close * planes.factor)
        weights = weight_planes(indices.weights, days, bars.symbols, price, members, ledger)
    ledger.verdict()
    carried = _carry(planes, traded, days, bars.symbols, age, schema, shares)
    if bars.industry is None and facts is not None and facts.industry is not None:
        industries = facts.industries
        planes.industry[:] = facts.industry
        notes.append("industries are one snapshot, used for every date: they look ahead")

    notes += _missing(bars, schema, indices, industries, ledger)
    values = np.full((*shape, len(FIELDS)), np.nan, np.float32)
    bars.numbers[:, :VOLUME] *= bars.factor[:, None]
    bars.numbers[:, VOLUME] /= bars.factor
    values.reshape(-1, len(FIELDS))[cell] = bars.numbers
    return Panel(
        name=name,
        simulated=schema.simulated,
        fingerprint=fingerprint,
        dates=days.astype("datetime64[D]"),
        symbols=bars.symbols,
        values=values,
        factor=planes.factor,
        traded=traded,
        listed=listed,
        delisted=(age >= 0) & ~listed,
        age=age,
        limit_up=carried.limit_up,
        limit_down=carried.limit_down,
        sealed_up=carried.sealed_up,
        sealed_down=carried.sealed_down,
        special=planes.special,
        industry=planes.industry,
        float_cap=np.where(listed, carried.float_cap, np.float32(np.nan)),
        industries=industries,
        members=members,
        weights=weights,
        benchmarks=benchmarks,
        repairs=ledger.repairs(),
        notes=(*notes, *schema.notes),
    )


def _count_unsorted(bars: Bars, ledger: Ledger) -> None:
    """Rows that come after a later row of the same stock. The panel is the same in any order; the source is odd."""
    # only the first and last row of a run of one stock matter between runs: few rows to sort in a sorted table
    fresh = np.diff(bars.stock, prepend=-1) != 0
    inside = np.diff(bars.days, prepend=bars.days[0]) < 0
    start = np.flatnonzero(fresh)
    end = np.append(start[1:], len(bars.days)) - 1
    order = np.argsort(bars.stock[start], kind="stable")
    start, end = start[order], end[order]
    later = bars.days[start[1:]] < bars.days[end[:-1]]
    later &= bars.stock[start[1:]] == bars.stock[start[:-1]]
    late = np.sort(np.concatenate([np.flatnonzero(inside & ~fresh), start[1:][later]]))
    ledger.add("unsorted", len(late), [_place(bars, row) for row in late[:EXAMPLES]])


def _place(bars: Bars, row: int) -> str:
    return f"{bars.symbols[bars.stock[row]]} {np.datetime64(int(bars.days[row]), 'D')}"


def _without_duplicates(
    bars: Bars, days: NDArray[np.int32], ledger: Ledger
) -> tuple[Bars, NDArray[np.int64]]:
    """The bars with one row per stock and date, and each row's cell in the raveled ``[T, N]`` plane."""
    session = np.zeros(days[-1] - days[0] + 1, np.int64)
    session[days - days[0]] = np.arange(len(days))
    cell = session[bars.days - days[0]] * len(bars.symbols) + bars.stock
    taken = np.zeros(len(days) * len(bars.symbols), np.bool_)
    taken[cell] = True
    if np.count_nonzero(taken) == len(cell):
        return bars, cell

    order = np.argsort(cell, kind="stable")
    again = np.flatnonzero(np.diff(cell[order]) == 0) + 1
    row, before = order[again], order[again - 1]
    columns: list[NDArray[Any]] = [bars.numbers, bars.factor, *bars.extras.values()]
    if bars.industry is not None:
        columns.append(bars.industry)
    same = np.ones(len(row), np.bool_)
    for column in columns:
        old, new = column[before].reshape(len(row), -1), column[row].reshape(len(row), -1)
        same &= ((old == new) | ((old != old) & (new != new))).all(axis=1)
    ledger.add("duplicate", int(same.sum()), [_place(bars, r) for r in np.sort(row[same])[:EXAMPLES]])
    conflicts = [
        f"{_place(bars, new)} close {bars.numbers[old, CLOSE]:.7g} and {bars.numbers[new, CLOSE]:.7g}"
        for old, new in zip(before[~same][:EXAMPLES], row[~same][:EXAMPLES], strict=True)
    ]
    ledger.add("conflict", int((~same).sum()), conflicts)
    kept = np.ones(len(cell), np.bool_)
    kept[row] = False
    return (
        replace(
            bars,
            days=bars.days[kept],
            stock=bars.stock[kept],
            numbers=bars.numbers[kept],
            factor=bars.factor[kept],
            extras={name: column[kept] for name, column in bars.extras.items()},
            industry=None if bars.industry is None else bars.industry[kept],
        ),
        cell[kept],
    )


def _check_calendar(
    days: NDArray[np.int32], traded: NDArray[np.bool_], schema: Schema, ledger: Ledger
) -> None:
    dates = days.astype("datetime64[D]")
    count = np.count_nonzero(traded, axis=1)
    if not schema.weekends:
        odd = np.flatnonzero((days + 3) % 7 >= 5)  # day 0, 1970-01-01, was a Thursday
        ledger.add("weekend", len(odd), [f"{dates[t]} ({count[t]} stocks)" for t in odd[:EXAMPLES]])
    around = np.lib.stride_tricks.sliding_window_view(
        np.pad(count, 10, "reflect" if len(days) > 10 else "edge"), 21
    )
    thin = np.flatnonzero(count < 0.5 * np.median(around, axis=1))
    ledger.add("thin_session", len(thin), [f"{dates[t]} ({count[t]} stocks)" for t in thin[:EXAMPLES]])
    gap = np.flatnonzero(np.diff(days) > 14)
    ledger.add("session_gap", len(gap), [f"{dates[t]} to {dates[t + 1]}" for t in gap[:EXAMPLES]])


def _listing(
    days: NDArray[np.int32],
    traded: NDArray[np.bool_],
    facts: Facts | None,
    symbols: NDArray[np.str_],
    ledger: Ledger,
) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """Listed and age, from the list date (or the first bar) to the last date of the securities file, if any."""
    first_bar = days[traded.argmax(axis=0)]
    start, end = first_bar, np.full_like(first_bar, NEVER)
    if facts is not None:
        start, end = np.minimum(facts.list_day, first_bar), facts.last_day
        last_bar = days[::-1][traded[::-1].argmax(axis=0)]
        known = facts.list_day != NEVER
        odd = np.flatnonzero((known & (first_bar < facts.list_day)) | (last_bar > end))
        ledger.add("unlisted_bar", len(odd), symbols[odd[:EXAMPLES]])
    begun = days[:, None] >= start
    listed = (begun & (days[:, None] <= end)) | traded
    return listed, np.where(begun, days[:, None] - start, np.int32(-1)).astype(np.int32, copy=False)


@dataclass(frozen=True)
class _Planes:
    """``[T, N]`` planes as the bars have them, empty where there is no bar."""

    open: NDArray[np.float32]
    high: NDArray[np.float32]
    low: NDArray[np.float32]
    close: NDArray[np.float32]
    factor: NDArray[np.float32]
    special: NDArray[np.bool_]
    industry: NDArray[np.int16]
    extras: dict[str, NDArray[np.float32]]

    @classmethod
    def scatter(cls, bars: Bars, cell: NDArray[np.int64], shape: tuple[int, int]) -> _Planes:
        def plane(column: NDArray[np.float32]) -> NDArray[np.float32]:
            dense = np.full(shape, np.nan, np.float32)
            dense.reshape(-1)[cell] = column
            return dense

        special = np.zeros(shape, np.bool_)
        if "special" in bars.extras:
            special.reshape(-1)[cell] = bars.extras["special"] != 0
        return cls(
            open=plane(bars.numbers[:, OPEN]),
            high=plane(bars.numbers[:, HIGH]),
            low=plane(bars.numbers[:, LOW]),
            close=plane(bars.numbers[:, CLOSE]),
            factor=plane(bars.factor),
            special=special,
            industry=np.full(shape, -1, np.int16),
            extras={name: plane(column) for name, column in bars.extras.items() if name != "special"},
        )


def _by_first_session(bars: Bars, cell: NDArray[np.int64]) -> tuple[NDArray[np.int16], tuple[str, ...]]:
    """Industry codes in order of first appearance, so that a code never depends on later rows."""
    assert bars.industry is not None
    count = len(bars.industries)
    first = np.full(count + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, bars.industry, cell // len(bars.symbols))  # -1, unknown, takes the last place
    order = np.lexsort((np.arange(count), first[:count]))
    rank = np.full(count + 1, -1, np.int16)
    rank[order] = np.arange(count)
    return rank[bars.industry], tuple(str(bars.industries[i]) for i in order)


@dataclass(frozen=True)
class _Carried:
    limit_up: NDArray[np.bool_]
    limit_down: NDArray[np.bool_]
    sealed_up: NDArray[np.bool_]
    sealed_down: NDArray[np.bool_]
    float_cap: NDArray[np.float32]


def _carry(
    planes: _Planes,
    traded: NDArray[np.bool_],
    days: NDArray[np.int32],
    symbols: NDArray[np.str_],
    age: NDArray[np.int32],
    schema: Schema,
    shares: ShareEvents | None,
) -> _Carried:
    """One pass over the dates with the last known close, shares, flags and industry of every stock.

    Fills `planes.special` and `planes.industry` forward in place. Limits are exact in ticks: the reference price is
    previous close x previous factor / factor, and it and the limits are rounded half up, as exchanges do.
    """
    shape = traded.shape
    up, down, sealed_up, sealed_down = (np.zeros(shape, np.bool_) for _ in range(4))
    out = _Carried(up, down, sealed_up, sealed_down, np.full(shape, np.nan, np.float32))
    limits = _Limits(schema.price_limit, days, symbols, age)
    tick, extras = schema.tick, planes.extras
    last_close, last_adjusted, last_shares, last_cap = np.full((4, shape[1]), np.nan)
    for t in range(shape[0]):
        on = traded[t]
        if t:
            planes.special[t] |= planes.special[t - 1] & ~on
            planes.industry[t] = np.where(on, planes.industry[t], planes.industry[t - 1])
        upper, lower = np.full((2, shape[1]), np.nan)
        if limits.rules:
            reference = _round(last_adjusted / planes.factor[t] / tick)
            width = limits.width(t, planes.special[t])
            upper, lower = _round(reference * (1 + width)), _round(reference * (1 - width))
        if "limit_up" in extras:
            upper = np.rint(extras["limit_up"][t] / tick)
        if "limit_down" in extras:
            lower = np.rint(extras["limit_down"][t] / tick)
        opened, high, low = (np.rint(plane[t] / tick) for plane in (planes.open, planes.high, planes.low))
        out.limit_up[t], out.sealed_up[t] = opened >= upper, low >= upper
        out.limit_down[t], out.sealed_down[t] = opened <= lower, high <= lower

        close = planes.close[t].astype(np.float64)
        np.copyto(last_close, close, where=on)
        np.copyto(last_adjusted, close * planes.factor[t], where=on)
        if "float_cap" in extras:
            np.copyto(last_cap, extras["float_cap"][t], where=extras["float_cap"][t] > 0)
            out.float_cap[t] = last_cap
            continue
        if "float_shares" in extras:
            np.copyto(last_shares, extras["float_shares"][t], where=extras["float_shares"][t] > 0)
        elif shares is not None:
            events = slice(shares.bounds[t], shares.bounds[t + 1])
            last_shares[shares.stock[events]] = shares.shares[events]
        out.float_cap[t] = last_close * last_shares
    return out


def _round(ticks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half up; the slack takes what the binary representation of a width like 0.1 lacks."""
    rounded: NDArray[np.float64] = np.floor(ticks + 0.5 + 1e-6)
    return rounded


class _Limits:
    """The width of the daily price limit by date and stock; NaN where there is none."""

    def __init__(
        self,
        rules: Sequence[PriceLimit],
        days: NDArray[np.int32],
        symbols: NDArray[np.str_],
        age: NDArray[np.int32],
    ) -> None:
        self.rules = rules
        self._start = [-NEVER if rule.start is None else (rule.start - EPOCH).days for rule in rules]
        self._days = days
        self._fits = [
            np.logical_or.reduce([np.char.startswith(symbols, prefix) for prefix in rule.prefix])
            if rule.prefix
            else np.ones(len(symbols), np.bool_)
            for rule in rules
        ]
        # session of the listing; a stock listed before the first session has its free sessions behind it
        self._listed = np.where(age[0] > 0, -NEVER, (age >= 0).argmax(axis=0))

    def width(self, t: int, special: NDArray[np.bool_]) -> NDArray[np.float64]:
        width = np.full(len(special), np.nan)
        for rule, start, fits in zip(self.rules, self._start, self._fits, strict=True):
            if self._days[t] >= start:
                here = fits & special if rule.special else fits
                free = t - self._listed < rule.free_sessions
                width = np.where(here, np.where(free, np.nan, rule.width), width)
        return width


def _missing(
    bars: Bars, schema: Schema, indices: IndexTables, industries: Sequence[str], ledger: Ledger
) -> list[str]:
    """A sentence for everything the panel would have but the source does not say."""
    limits = schema.price_limit or {"limit_up", "limit_down"} & set(bars.extras)
    floats = schema.float_shares or {"float_shares", "float_cap"} & set(bars.extras)
    securities = schema.securities
    found = {
        "no price limits: limit_up and limit_down are all False": limits,
        "no special-treatment flag: special is all False": "special" in bars.extras,
        "no industries": industries,
        "no free float: float_cap is all NaN": floats,
        "no index membership": indices.spells is not None,
        "no index weights": indices.weights is not None,
        "no levels of indices": indices.levels is not None,
        "no list dates: age counts from the first bar": securities and securities.list_date,
        "no delisting dates: stocks stay listed after their last bar": securities and securities.last_date,
        "no vwap: (high + low + close) / 3 instead": ledger.counts["vwap_missing"] < len(bars.days),
    }
    return [text for text, there in found.items() if not there]

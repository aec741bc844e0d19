"""Which dates a model trains, validates and is tested on: one split, or blocks that walk forward with retraining.

Published (Huatai AI series 71, 72 and 84): a model every half year, 6 years of training, 2 of validation. Each
block's scores are tested on the dates until the next block's begin, so every test date has the scores of the
newest model that was finished before it.
"""

from __future__ import annotations

import calendar
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from steppe.core.errors import DataError

__all__ = ["Split", "WalkForward", "add_months", "single_split", "walk_forward_splits"]

Rows = NDArray[np.intp]


@dataclass(frozen=True)
class Split:
    """Row numbers of the panel's dates. Train and validation rows end one label horizon before the block does."""

    train: Rows
    validation: Rows
    test: Rows


class WalkForward(BaseModel):
    """The table ``[problem.walk_forward]``.

    Attributes:
        first, last: first and last test date, both included; ``last`` may lie beyond the panel's end.
        train_months: calendar months of training, which end where the validation begins.
        validation_months: calendar months of validation, which end where the test dates begin.
        test_months: calendar months from one retraining to the next.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: date
    last: date
    train_months: int = Field(default=72, ge=1)
    validation_months: int = Field(default=24, ge=1)
    test_months: int = Field(default=6, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> WalkForward:
        if self.first > self.last:
            raise ValueError(f"first {self.first} lies after last {self.last}")
        return self


def single_split(
    dates: NDArray[np.datetime64],
    train: tuple[date, date],
    validation: tuple[date, date],
    test: tuple[date, date],
    *,
    horizon: int,
    every: int,
    test_every: int | None = None,
) -> Split:
    """The rows of three blocks, blocks apart and each label known inside its block.

    A label of date t is complete at t + 1 + horizon, so the last ``horizon + 1`` sessions of the train and the
    validation block are dropped (embargo). The test block keeps all its dates: scores need no label.

    Args:
        dates: ``[T]`` the panel's.
        train, validation, test: first and last date of each block, both included.
        horizon: sessions of the label.
        every: sessions from one date of a block to the next.
        test_every: the same for the test block alone; default `every`.

    Raises:
        DataError: blocks overlap, are out of order or not covered by the panel, or the embargo leaves nothing.
    """
    rows: dict[str, Rows] = {}
    before: date | None = None
    for name, (first, last) in {"train": train, "validation": validation, "test": test}.items():
        if first > last or (before is not None and first <= before):
            raise DataError(
                f"the {name} block {first} .. {last} must come after the block before it and not end before it starts."
            )
        before = last
        step = (test_every or every) if name == "test" else every
        rows[name] = _block(dates, name, first, last, step, 0 if name == "test" else horizon + 1)
    return Split(**rows)


def walk_forward_splits(
    dates: NDArray[np.datetime64],
    plan: WalkForward,
    *,
    horizon: int,
    every: int,
    test_every: int,
    history: int,
) -> dict[str, Split]:
    """The blocks by name, the date its test dates begin: each with the embargo of `single_split`.

    Test dates lie on one grid of `test_every` sessions that begins on the first session not before ``plan.first``
    and runs through all blocks, so that none is missing or double where one block follows another. A block that holds
    no date of the grid is left out.

    Args:
        dates: ``[T]`` the panel's.
        plan: the blocks.
        horizon: sessions of the label.
        every: sessions from one train or validation date to the next.
        test_every: sessions from one test date to the next.
        history: sessions before its first training date that a window reaches back to.

    Raises:
        DataError: the panel begins too late for the first block (says when it would have to), does not reach
            the first test date, or an embargo leaves nothing of a block.
    """
    start = int(np.searchsorted(dates, np.datetime64(plan.first)))
    stop = int(np.searchsorted(dates, np.datetime64(plan.last), side="right"))
    grid = np.arange(start, stop, test_every, dtype=np.intp)
    if len(grid) == 0:
        raise DataError(
            f"walk_forward: the panel ({dates[0]} .. {dates[-1]}) has no session from {plan.first} to {plan.last}."
        )
    _check_start(dates, plan, history)
    splits: dict[str, Split] = {}
    day = timedelta(days=1)
    months = 0  # from the first block to this one
    while (opens := add_months(plan.first, months)) <= plan.last:
        validates = add_months(plan.first, months - plan.validation_months)
        trains = add_months(plan.first, months - plan.validation_months - plan.train_months)
        months += plan.test_months
        closes = add_months(plan.first, months)
        test = grid[(dates[grid] >= np.datetime64(opens)) & (dates[grid] < np.datetime64(closes))]
        if len(test):
            splits[str(opens)] = Split(
                _block(dates, "train", trains, validates - day, every, horizon + 1),
                _block(dates, "validation", validates, opens - day, every, horizon + 1),
                test,
            )
    return splits


def add_months(day: date, months: int) -> date:
    """The same day of the month some months later (or earlier); the month's last day where it has no such day."""
    year, month = divmod(day.year * 12 + day.month - 1 + months, 12)
    return date(year, month + 1, min(day.day, calendar.monthrange(year, month + 1)[1]))


def _block(
    dates: NDArray[np.datetime64], name: str, first: date, last: date, every: int, embargo: int
) -> Rows:
    start = int(np.searchsorted(dates, np.datetime64(first)))
    stop = int(np.searchsorted(dates, np.datetime64(last), side="right"))
    rows = np.arange(start, stop - embargo, every, dtype=np.intp)
    if len(rows) == 0:
        raise DataError(
            f"the {name} block {first} .. {last} has {stop - start} sessions in the panel "
            f"({dates[0]} .. {dates[-1]}), and an embargo of {embargo} leaves none."
        )
    return rows


def _check_start(dates: NDArray[np.datetime64], plan: WalkForward, history: int) -> None:
    """The first block's training dates and their windows must lie in the panel."""

    def available(months: int) -> int:
        first = add_months(plan.first, -plan.validation_months - months)
        return int(np.searchsorted(dates, np.datetime64(first))) if np.datetime64(first) >= dates[0] else 0

    if available(plan.train_months) >= history:
        return
    first = add_months(plan.first, -plan.validation_months - plan.train_months)
    wanted = first - timedelta(days=history * 3 // 2)  # sessions in calendar days, holidays included
    fitting = next((m for m in range(plan.train_months - 1, 0, -1) if available(m) >= history), None)
    shorter = f" or shorten train_months to {fitting}" if fitting else ""
    raise DataError(
        f"walk_forward: the block of {plan.first} trains from {first} on, with windows that reach {history} sessions "
        f"further back, and the panel begins on {dates[0]}. It would have to begin about {wanted}: take a longer "
        f"panel, a later first{shorter}."
    )

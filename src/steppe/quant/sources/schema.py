"""The schema of a market's tables: which column is what, in which unit, and what the side files say.

A schema is a small TOML file; every key is optional. Tables that use the canonical column names in plain units
(currency, shares) need none.

    name = "my-market"
    bars = "daily_*.parquet"                   # default: every .csv and .parquet file with the columns of bars
    [columns]                                  # canonical name = name in the tables
    symbol = "ticker"
    [scale]                                    # canonical value = stored value * scale
    open = 0.01
    [[price_limit]]                            # the last rule that fits a stock and a date holds
    width = 0.10
    [members]                                  # index membership spells
    file = "members.parquet"
    ends = "inclusive"
    [weights]                                  # snapshots of index weights
    file = "weights.parquet"
    [benchmarks]                               # levels of price indices
    file = "indices.parquet"
    symbols = { CSI300 = "SH000300" }          # index name = its symbol in that file

Where a fact has two sources, the finer one wins: `vwap` over `amount` / `volume`, `factor` over `adj_close` / `close`,
`limit_up` and `limit_down` prices over `price_limit`, `float_cap` over `float_shares` over the float-shares file,
`industry` of the bars (point in time) over that of the securities file (a snapshot).
"""

from __future__ import annotations

import datetime as dt
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steppe.core.errors import SpecError, explain_validation

__all__ = [
    "Benchmarks",
    "Columns",
    "FloatShares",
    "Members",
    "PriceLimit",
    "Scale",
    "Schema",
    "Securities",
    "Weights",
    "load_schema",
]

REQUIRED = ("date", "symbol", "open", "high", "low", "close", "volume")
"""The canonical columns without which a table holds no bars."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]  # TOML has lists only


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Columns(_Table):
    """The source's name of each canonical column; a column that is not `REQUIRED` may be absent unless named here."""

    date: str = "date"
    symbol: str = "symbol"
    open: str = "open"
    high: str = "high"
    low: str = "low"
    close: str = "close"
    volume: str = "volume"
    vwap: str = "vwap"
    amount: str = "amount"
    factor: str = "factor"
    adj_close: str = "adj_close"
    limit_up: str = "limit_up"
    limit_down: str = "limit_down"
    special: str = "special"
    industry: str = "industry"
    float_shares: str = "float_shares"
    float_cap: str = "float_cap"


class Scale(_Table):
    """Canonical value = stored value x scale; prices in currency units, volume in shares, amount in currency."""

    open: Positive = 1.0
    high: Positive = 1.0
    low: Positive = 1.0
    close: Positive = 1.0
    volume: Positive = 1.0
    vwap: Positive = 1.0
    amount: Positive = 1.0
    factor: Positive = 1.0
    adj_close: Positive = 1.0
    limit_up: Positive = 1.0
    limit_down: Positive = 1.0
    float_shares: Positive = 1.0
    float_cap: Positive = 1.0


class PriceLimit(_Table):
    """One daily price-limit rule: upper and lower limit are the reference price x (1 +- width), rounded to the tick."""

    width: Annotated[float, Field(gt=0, lt=1)]
    prefix: Strings = ()
    """Only stocks whose symbol starts with one of these; empty: all."""
    start: dt.date | None = None
    """Only from this date on."""
    free_sessions: Annotated[int, Field(ge=0)] = 0
    """No limit in the first sessions after listing. The first bar never has one: it has no previous close."""
    special: bool = False
    """Only while the stock is under special treatment."""


class Members(_Table):
    """Index membership spells: one row per index, symbol and spell; an empty end means still a member."""

    file: str
    ends: Literal["inclusive", "exclusive"]
    """Whether the end date is the last day in the index or the first day out of it."""
    index: str = "index"
    symbol: str = "symbol"
    start: str = "start"
    end: str = "end"
    name: str | None = None
    """The index of every row, for a file without an index column."""


class Weights(_Table):
    """Snapshots of index weights, in any unit: one row per index, symbol and date.

    A snapshot holds the weights at the close of its date; it counts from the day it is known. From its date on every
    weight drifts with the adjusted close, and those of the date's members are scaled to sum 1 (of all stocks in the
    snapshot where the index has no membership). A member that the snapshot lacks has weight 0 until the next.
    """

    file: str
    index: str = "index"
    symbol: str = "symbol"
    date: str = "date"
    weight: str = "weight"
    name: str | None = None
    """The index of every row, for a file without an index column."""
    known: str | None = None
    """Column of the first day on which the row is known; default: `lag` days after its date."""
    lag: Annotated[int, Field(ge=0)] = 1
    """Calendar days."""


class Benchmarks(_Table):
    """Closing levels of indices: one row per symbol and date."""

    file: str
    symbols: dict[str, str]
    """Index name, as in the membership -> its symbol in the file."""
    symbol: str = "symbol"
    date: str = "date"
    close: str = "close"


class Securities(_Table):
    """One row per stock. Industries of this file are one snapshot, used for every date."""

    file: str
    symbol: str = "symbol"
    industry: str | None = None
    list_date: str | None = None
    last_date: str | None = None
    """Column of the last day listed; empty: still listed."""
    as_of: dt.date | None = None
    """The day the list was taken: a last day on or after it means still listed."""


class FloatShares(_Table):
    """Free-float shares by symbol and date or month, carried forward from the day they are known.

    A dated row counts from its date. A monthly row ("2015-03") counts from the first day after the month, or from the
    month's first day with ``known = "month_start"``.
    """

    file: str
    symbol: str = "symbol"
    date: str | None = None
    month: str | None = None
    shares: str = "shares"
    scale: Positive = 1.0
    known: Literal["month_end", "month_start"] = "month_end"

    @model_validator(mode="after")
    def _one_time_column(self) -> FloatShares:
        if (self.date is None) == (self.month is None):
            raise ValueError("name either the date or the month column")
        return self


class Schema(_Table):
    """How the tables of one market are read (module docstring)."""

    name: str | None = None
    """Name of the panel; default: that of the file or folder."""
    bars: str | None = None
    """Glob pattern of the bar files, relative to the folder; default: every .csv and .parquet file that fits."""
    simulated: bool = False
    """The data are made up: every report says so."""
    tick: Positive = 0.01
    """Price tick in currency units."""
    vwap_fallback: Literal["typical", "error"] = "typical"
    """For a missing vwap: (high + low + close) / 3, or an error."""
    weekends: bool = False
    """Whether the market trades on Saturdays or Sundays; if not, such dates are errors."""
    notes: Strings = ()
    """What a reader of the panel must know."""
    columns: Columns = Columns()
    scale: Scale = Scale()
    price_limit: Annotated[tuple[PriceLimit, ...], Field(strict=False)] = ()
    members: Members | None = None
    securities: Securities | None = None
    float_shares: FloatShares | None = None
    weights: Weights | None = None
    benchmarks: Benchmarks | None = None

    @property
    def side_files(self) -> tuple[str, ...]:
        """The files named besides the bars."""
        sides = (self.members, self.securities, self.float_shares, self.weights, self.benchmarks)
        return tuple(side.file for side in sides if side is not None)


def load_schema(path: str | Path) -> Schema:
    """Read and validate a schema file.

    Raises:
        SpecError: no such file, not TOML, an unknown key (with a did-you-mean) or a value of the wrong type.
    """
    try:
        text = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"cannot read the schema {path}: {error}.") from error
    try:
        return Schema.model_validate(text)
    except ValidationError as error:
        raise SpecError(explain_validation(error, Schema, f"schema {path}")) from error

"""Tables in: files, folders and Arrow tables become canonical bars, one batch at a time."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from steppe.core.errors import DataError
from steppe.quant.panel import FIELDS
from steppe.quant.sources.checks import RULES, Ledger, row_codes
from steppe.quant.sources.schema import REQUIRED, Columns, Scale, Schema

__all__ = ["Bars", "Source", "bar_sources", "column_names", "index_of", "read_bars", "side_table", "unscaled"]

SUFFIXES = (".csv", ".parquet")
BATCH = 16 << 20
"""Bytes of files read at once: small files are read together, large ones alone."""

NULLS = ["", "NA", "N/A", "NaN", "nan", "null", "None"]
EXTRAS = ("limit_up", "limit_down", "float_shares", "float_cap")


@dataclass(frozen=True)
class Source:
    """One table of bars: what it is called in messages, its rows, and canonical -> own column names."""

    where: str
    table: pl.LazyFrame
    names: Mapping[str, str]
    size: int = 0


@dataclass(frozen=True)
class Bars:
    """Checked bars in reading order. R rows.

    Attributes:
        days: ``[R]`` int32, days since 1970-01-01.
        stock: ``[R]`` int32, index into `symbols`.
        symbols: ``[N]``, sorted.
        numbers: ``[R, 6]`` float32, the `FIELDS`, unadjusted.
        factor: ``[R]`` float32.
        extras: optional canonical column -> ``[R]`` float32, special included as 0 and 1.
        industry: ``[R]`` int32 index into `industries`, -1 unknown; None without such a column.
        industries: sorted names.
    """

    days: NDArray[np.int32]
    stock: NDArray[np.int32]
    symbols: NDArray[np.str_]
    numbers: NDArray[np.float32]
    factor: NDArray[np.float32]
    extras: Mapping[str, NDArray[np.float32]]
    industry: NDArray[np.int32] | None
    industries: NDArray[np.str_]


def bar_sources(files: Sequence[Path], columns: Columns, declared: bool) -> tuple[list[Source], list[Path]]:
    """The files as sources, and those left out because they lack the columns of bars.

    With ``declared`` the schema has named the files, and each must fit.

    Raises:
        DataError: a declared file, or all files, lack required columns; files that fit disagree about the others.
    """
    sources, misfits = [], []
    for path in files:
        table = scan(path, columns)
        available = table.collect_schema().names()
        if not declared and not all(getattr(columns, name) in available for name in REQUIRED):
            misfits.append(path)
            continue
        sources.append(
            Source(path.name, table, column_names(available, columns, path.name), path.stat().st_size)
        )
    if not sources and misfits:
        column_names(scan(misfits[0], columns).collect_schema().names(), columns, misfits[0].name)
    if not declared and len({frozenset(source.names) for source in sources}) > 1:
        first = sources[0]
        other = next(source for source in sources if set(source.names) != set(first.names))
        odd = ", ".join(sorted(set(first.names) ^ set(other.names)))
        raise DataError(
            f"{first.where} and {other.where} both hold bars but differ in: {odd}. "
            'Name the files of bars in a schema, such as bars = "daily_*.parquet".'
        )
    return sources, misfits


def scan(path: Path, columns: Columns | None = None) -> pl.LazyFrame:
    """A file as a lazy table. CSV: columns that the schema knows to be text stay text ("000001" keeps its zeros)."""
    try:
        if path.suffix == ".parquet":
            table = pl.scan_parquet(path, glob=False)
        else:
            header = pl.scan_csv(path, glob=False, infer_schema=False, null_values=NULLS)
            if columns is None:
                return header
            numbers = {getattr(columns, name) for name in Scale.model_fields}
            types = {name: pl.Float64() for name in header.collect_schema().names() if name in numbers}
            table = pl.scan_csv(
                path, glob=False, infer_schema=False, schema_overrides=types, null_values=NULLS
            )
        table.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"cannot read {path}: {error}.") from error
    return table


def column_names(available: Sequence[str], columns: Columns, where: str) -> dict[str, str]:
    """Canonical -> own name of the columns that are there.

    Raises:
        DataError: a required or explicitly named column is missing; says what is there and what to map.
    """
    wanted = [name for name in Columns.model_fields if name in REQUIRED or name in columns.model_fields_set]
    missing = [name for name in wanted if getattr(columns, name) not in available]
    if missing:
        raise DataError(
            _missing({name: getattr(columns, name) for name in missing}, available, where, "[columns]")
        )
    return {
        name: getattr(columns, name) for name in Columns.model_fields if getattr(columns, name) in available
    }


def _missing(missing: Mapping[str, str], available: Sequence[str], where: str, place: str) -> str:
    lower = {name.lower(): name for name in available}
    hints = []
    for canonical, name in missing.items():
        near = difflib.get_close_matches(name.lower(), lower, n=1)
        hints.append(f'{canonical} = "{lower[near[0]]}"' if near else f'{canonical} = "..."')
    return (
        f"{where} has no column {', '.join(repr(name) for name in missing.values())}. "
        f"It has: {', '.join(available)}. "
        f"Name the columns in the schema under {place}, such as {', '.join(hints)}."
    )


def unscaled(sources: Sequence[Source], schema: Schema) -> list[str]:
    """A note if prices are stored as integers and no scale says in which unit."""
    source = sources[0]
    types = source.table.collect_schema()
    names = [
        source.names[name]
        for name in ("open", "high", "low", "close", "vwap")
        if name in source.names
        and types[source.names[name]].is_integer()
        and getattr(schema.scale, name) == 1
    ]
    text = f"{', '.join(names)}: integers without a [scale] in the schema, taken as whole currency units"
    return [text] if names else []


def read_bars(sources: Sequence[Source], schema: Schema, ledger: Ledger) -> Bars:
    """Read, check and mend all rows; dropped rows are gone, the rest keep the order of reading.

    Raises:
        DataError: dates or symbols missing or unreadable, values that are not numbers, no bars left.
    """
    extras = [name for name in (*EXTRAS, "special") if any(name in source.names for source in sources)]
    industry = any("industry" in source.names for source in sources)
    parts: list[dict[str, Any]] = []
    for batch in _batches(sources):
        bars = _read_batch(batch, schema, [*extras, *(["industry"] if industry else [])])
        bars = bars.with_columns(row_codes(schema.tick))
        ledger.add_rows(bars)
        ledger.add("no_factor", _rows_without_factor(batch, bars), [source.where for source in batch])
        parts.append(_compact(_mend(bars), extras, industry))
    symbols = _union([part["symbols"] for part in parts])
    industries = _union([part["industries"] for part in parts])
    if not len(symbols):
        ledger.verdict()
        raise DataError("no bars are left: the tables are empty or every row is a suspension.")
    return Bars(
        days=np.concatenate([part["days"] for part in parts]),
        stock=np.concatenate([np.searchsorted(symbols, p["symbols"])[p["stock"]] for p in parts]).astype(
            np.int32
        ),
        symbols=symbols,
        numbers=np.concatenate([part.pop("numbers") for part in parts]),
        factor=np.concatenate([part["factor"] for part in parts]),
        extras={name: np.concatenate([part[name] for part in parts]) for name in extras},
        industry=np.concatenate([_recode(p["industry"], p["industries"], industries) for p in parts])
        if industry
        else None,
        industries=industries,
    )


def _batches(sources: Sequence[Source]) -> Iterator[list[Source]]:
    batch: list[Source] = []
    size = 0
    for source in sources:
        if batch and size + source.size > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(source)
        size += source.size
    yield batch


def _read_batch(batch: Sequence[Source], schema: Schema, extras: Sequence[str]) -> pl.DataFrame:
    """The batch as canonical columns: date, symbol, the `FIELDS`, factor and the extras."""
    where = batch[0].where if len(batch) == 1 else f"{batch[0].where} ... {batch[-1].where}"
    try:
        tables = [source.table.select(_canonical(source, schema, extras)) for source in batch]
        bars = pl.concat(tables).collect()
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{where}: a value is not of the column's type: {error}.") from error
    if bars.height and bars.select(pl.any_horizontal(pl.col("date", "symbol").is_null().any())).item():
        raise DataError(_unreadable(batch))
    return bars


def _canonical(source: Source, schema: Schema, extras: Sequence[str]) -> list[pl.Expr]:
    types = source.table.collect_schema()

    def number(name: str) -> pl.Expr:
        column = pl.col(source.names[name]).cast(pl.Float64).fill_nan(None)
        scale = getattr(schema.scale, name)
        return column if scale == 1 else column * scale

    def optional(name: str) -> pl.Expr:
        return number(name) if name in source.names else pl.lit(None, pl.Float64)

    vwap = pl.coalesce(optional("vwap"), optional("amount") / optional("volume"))
    if "factor" in source.names:
        factor = number("factor")
    elif "adj_close" in source.names:
        factor = number("adj_close") / number("close")
    else:
        factor = pl.lit(1.0)
    numbers = {name: optional(name) for name in FIELDS} | {"vwap": vwap, "factor": factor}
    numbers |= {name: optional(name) for name in extras if name in EXTRAS}
    columns = [
        read_dates(source.names["date"], types[source.names["date"]]).alias("date"),
        pl.col(source.names["symbol"]).cast(pl.String).alias("symbol"),
        *(number.cast(pl.Float32).alias(name) for name, number in numbers.items()),
    ]
    for name in extras:
        own = source.names.get(name)
        if name == "special":
            flag = pl.lit(False) if own is None else _flag(own, types[own])
            columns.append(flag.cast(pl.Float32).fill_null(0).alias(name))
        elif name == "industry":
            text = pl.lit(None, pl.String) if own is None else pl.col(own).cast(pl.String)
            columns.append(text.alias(name))
    return columns


def _flag(name: str, kind: pl.DataType) -> pl.Expr:
    if kind != pl.String:
        return pl.col(name).cast(pl.Boolean)
    words = {"0": False, "false": False, "1": True, "true": True, None: False}
    return pl.col(name).str.to_lowercase().replace_strict(words, return_dtype=pl.Boolean)


def read_dates(name: str, kind: pl.DataType) -> pl.Expr:
    """A column as dates: dates, timestamps, 20150331, "2015-03-31", "2015/03/31" or "20150331"; else null."""
    column = pl.col(name)
    if kind == pl.Date:
        return column
    if kind == pl.Datetime:
        return column.dt.date()
    text = column.cast(pl.String).str.strip_chars()
    day = text.str.head(10)  # a time of day after the date is dropped
    formats = (("%Y-%m-%d", day), ("%Y%m%d", text), ("%Y/%m/%d", day))
    return pl.coalesce(*(value.str.to_date(form, strict=False) for form, value in formats))


def _unreadable(batch: Sequence[Source]) -> str:
    """Says which dates or symbols could not be read."""
    for source in batch:
        date, symbol = source.names["date"], source.names["symbol"]
        read = read_dates(date, source.table.collect_schema()[date])
        bad = source.table.filter(read.is_null() | pl.col(symbol).is_null()).select(symbol, date).collect()
        if bad.height:
            shown = "; ".join(f"{name} {day!r}" for name, day in bad.head(5).iter_rows())
            return (
                f"{source.where}: {bad.height} rows have no symbol or no readable date, such as: {shown}. "
                "Dates are date columns, timestamps, or text and numbers like 2015-03-31, 2015/03/31, 20150331."
            )
    raise AssertionError("no unreadable row")


def _mend(bars: pl.DataFrame) -> pl.DataFrame:
    codes = {
        action: [1 + i for i, rule in enumerate(RULES.values()) if rule.action == action]
        for action in ("drop", "mend")
    }
    low, high, close = pl.col("low"), pl.col("high"), pl.col("close")
    typical = ((low + high + close) / 3).clip(low, high)  # clip: rounding alone can leave a one-price day
    mended = pl.when(pl.col("rule").is_in(codes["mend"])).then(typical).otherwise(pl.col("vwap"))
    return bars.filter(~pl.col("rule").is_in(codes["drop"])).with_columns(mended.alias("vwap"))


def _rows_without_factor(batch: Sequence[Source], bars: pl.DataFrame) -> int:
    bare = [source for source in batch if not {"factor", "adj_close"} & set(source.names)]
    if len(bare) == len(batch):
        return bars.height
    return sum(int(source.table.select(pl.len()).collect().item()) for source in bare)


def _compact(bars: pl.DataFrame, extras: Sequence[str], industry: bool) -> dict[str, Any]:
    """Numpy arrays of a batch, text as codes into the batch's own sorted names."""
    part: dict[str, Any] = {
        "days": bars["date"].to_physical().to_numpy(),
        "numbers": bars.select(FIELDS).to_numpy(order="c"),
        "factor": bars["factor"].to_numpy(),
        **{name: bars[name].to_numpy() for name in extras},
    }
    part["stock"], part["symbols"] = _encode(bars["symbol"])
    part["industry"], part["industries"] = _encode(
        bars["industry"] if industry else pl.Series([], dtype=pl.String)
    )
    return part


def _encode(text: pl.Series) -> tuple[NDArray[np.int32], NDArray[np.str_]]:
    names = text.drop_nulls().unique().sort()
    return index_of(text, names), names.to_numpy().astype(np.str_)


def index_of(text: pl.Series, names: pl.Series | NDArray[np.str_]) -> NDArray[np.int32]:
    """Index of every text in the (unique) names; -1 for null and unknown."""
    known = pl.Enum(pl.Series(names, dtype=pl.String))
    codes = text.cast(pl.String).cast(known, strict=False).to_physical()
    return codes.cast(pl.Int32).fill_null(-1).to_numpy()


def _union(names: Sequence[NDArray[np.str_]]) -> NDArray[np.str_]:
    return np.unique(np.concatenate(names)) if names else np.empty(0, np.str_)


def _recode(codes: NDArray[np.int32], own: NDArray[np.str_], names: NDArray[np.str_]) -> NDArray[np.int32]:
    places = np.append(np.searchsorted(names, own), -1).astype(np.int32)  # the code -1 takes the last place
    return places[codes]


def side_table(path: Path, names: Mapping[str, str], dates: Sequence[str], place: str) -> pl.DataFrame:
    """A side file as canonical columns; those in ``dates`` are read as dates, where null stays null.

    Raises:
        DataError: no such file, missing columns, unreadable dates.
    """
    if not path.is_file():
        raise DataError(f"{path} is not there: correct {place} file in the schema.")
    table = scan(path)
    types = table.collect_schema()
    missing = {canonical: name for canonical, name in names.items() if name not in types}
    if missing:
        raise DataError(_missing(missing, types.names(), path.name, place))
    wanted = [
        (read_dates(name, types[name]) if canonical in dates else pl.col(name)).alias(canonical)
        for canonical, name in names.items()
    ]
    read = table.select(*wanted, *(pl.col(names[date]).alias(f"{date} as given") for date in dates)).collect()
    for date in dates:
        bad = read.filter(pl.col(date).is_null() & pl.col(f"{date} as given").is_not_null())
        if bad.height:
            raise DataError(
                f"{path.name}: {bad.height} unreadable dates, such as {bad[f'{date} as given'][0]!r}."
            )
    return read.select(list(names))

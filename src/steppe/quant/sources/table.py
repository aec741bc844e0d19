"""A panel from a path or a table: long tables in CSV or parquet, vendors' tables, Qlib folders, any Arrow table."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from steppe.core.errors import DataError
from steppe.quant.panel import FORMAT, Panel
from steppe.quant.sources.build import build_panel
from steppe.quant.sources.checks import Ledger
from steppe.quant.sources.indices import IndexTables
from steppe.quant.sources.qlib import QlibFolder, is_qlib
from steppe.quant.sources.reading import (
    SUFFIXES,
    Bars,
    Source,
    bar_sources,
    column_names,
    read_bars,
    scan,
    unscaled,
)
from steppe.quant.sources.schema import REQUIRED, Schema, load_schema
from steppe.quant.sources.vendors import Vendor, canonical, frame_of, long_form, symbol_of_name, vendor_of

__all__ = ["read_panel"]

READER = 1
"""Raised whenever the same tables would give another panel: part of cache keys and fingerprints."""


def read_panel(
    source: Any, schema: Schema | str | Path | None = None, *, cache: str | Path | None = None
) -> Panel:
    """Read, check and assemble a panel; files are read once and memory-mapped from then on.

    Args:
        source: a .csv or .parquet file; a folder of them; a Qlib folder; the folder of a saved panel; or any object
            with the Arrow C stream interface (a polars, pandas or pyarrow table), one row per stock and session.
        schema: the `Schema` or its file; default: ``panel.toml`` inside the folder, else canonical columns in plain
            units (module `steppe.quant.sources.schema`), else the columns and units of a known vendor (module
            `steppe.quant.sources.vendors`; the panel's notes say which). Side files are looked for beside the bars;
            for a table in memory in the working directory.
        cache: folder of built panels; default: the environment variable ``STEPPE_CACHE``, else
            ``~/.cache/steppe/panels``. A panel is found again by names, sizes and modification times of its files.
            A table in memory is cached only if a folder is given here.

    Raises:
        DataError: the tables are missing, lack columns, or break a rule that cannot be repaired (`checks.RULES`).
        SpecError: the schema is wrong.
    """
    if not isinstance(source, (str, Path)):
        if not hasattr(source, "__arrow_c_stream__"):
            raise DataError(
                f"cannot read a panel from {type(source).__name__}: "
                "give a path, or a table with the Arrow C stream interface (polars, pandas, pyarrow)."
            )
        panel = _build_memory(long_form(frame_of(source)), schema)
        return (
            panel if cache is None else _saved(panel, Path(cache) / f"{panel.name}-{panel.fingerprint[:16]}")
        )

    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"there is no {path}.")
    if (path / "manifest.json").is_file():
        return Panel.open(path)
    folder = path if path.is_dir() else path.parent
    if schema is None and (folder / "panel.toml").is_file() and path.is_dir():
        schema = folder / "panel.toml"
    declared = None if schema is None else _schema(schema)
    schema = declared or Schema()
    name = schema.name or (path.stem if path.is_file() else path.resolve().name)
    if is_qlib(path):
        qlib = QlibFolder.scan(path)
        facts: list[Any] = [_recipe(schema), str(path.resolve()), *qlib.facts]
        facts += _facts(_side_files(folder, schema))
        return _cached(facts, name, cache, lambda: _build_qlib(qlib, schema, name))
    files = _bar_files(path, schema)
    facts = [_recipe(schema), *_facts([*files, *_side_files(folder, schema)])]
    return _cached(facts, name, cache, lambda: _build_files(files, folder, declared, name))


def _schema(schema: Schema | str | Path | None) -> Schema:
    if schema is None:
        return Schema()
    return schema if isinstance(schema, Schema) else load_schema(schema)


def _bar_files(path: Path, schema: Schema) -> list[Path]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path} is neither .csv nor .parquet.")
        return [path]
    pattern = schema.bars or "*"
    files = sorted(file for file in path.glob(pattern) if file.suffix in SUFFIXES and file.is_file())
    if schema.bars is None:
        sides = _side_files(path, schema)
        files = [file for file in files if file not in sides]
    if not files:
        raise DataError(f"{path} holds no .csv or .parquet file that matches {pattern!r}.")
    return files


def _side_files(folder: Path, schema: Schema) -> list[Path]:
    return [folder / name for name in schema.side_files]


def _build_files(files: Sequence[Path], folder: Path, declared: Schema | None, name: str) -> Panel:
    schema = declared or Schema()
    vendor = _vendor_of_files(files) if declared is None else None
    misfits: list[Path] = []
    notes: list[str] = []
    if vendor is None:
        named = schema.bars is not None or len(files) == 1
        sources, misfits = bar_sources(files, schema.columns, named)
    else:
        table, misfits = _vendor_table(files, vendor)
        adjusted = any("qfq" in text or "hfq" in text for text in (files[0].stem, files[0].parent.name))
        bars, schema, told = canonical(vendor, table, folder.name, adjusted=adjusted)
        sources, notes = [_source(bars, schema, folder.name)], told
    if misfits:
        notes.append(f"not read, no columns of bars: {', '.join(path.name for path in misfits)}")
    digest = hashlib.sha256(_recipe(schema).encode())
    left_out = set(misfits)
    for path in [*(file for file in files if file not in left_out), *_side_files(folder, schema)]:
        if not path.is_file():
            raise DataError(f"{path} is named in the schema but not there.")
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return _build(sources, schema, folder, IndexTables.read(folder, schema), notes, name, digest.hexdigest())


def _build_qlib(qlib: QlibFolder, schema: Schema, name: str) -> Panel:
    table, indices, notes = qlib.read(schema.columns)
    schema = schema.model_copy(update={"columns": qlib.columns(schema.columns)})
    named = IndexTables.read(qlib.path, schema)  # what a schema names wins over the instruments files
    indices = IndexTables(
        named.spells if schema.members else indices.spells,
        named.weights,
        named.levels if schema.benchmarks else indices.levels,
    )
    sources = [_source(table, schema, qlib.path.name)]
    return _build(sources, schema, qlib.path, indices, notes, name, None)


def _build_memory(table: pl.DataFrame, schema: Schema | str | Path | None) -> Panel:
    where = "the table"
    told: list[str] = []
    declared = None if schema is None else _schema(schema)
    if declared is None and (vendor := _vendor(table.columns)) is not None:
        table, declared, told = canonical(vendor, table, where)
    schema = declared or Schema()
    sources, indices = [_source(table, schema, where)], IndexTables.read(Path(), schema)
    return _build(sources, schema, Path(), indices, told, schema.name or "table", None)


def _build(
    sources: Sequence[Source],
    schema: Schema,
    folder: Path,
    indices: IndexTables,
    notes: Sequence[str],
    name: str,
    fingerprint: str | None,
) -> Panel:
    """Read the bars and assemble; without a fingerprint it is that of the bars and of the side files."""
    ledger = _ledger(schema)
    bars = read_bars(sources, schema, ledger)
    notes = [*notes, *unscaled(sources, schema)]
    return build_panel(
        bars,
        schema,
        folder,
        indices,
        ledger,
        notes,
        name,
        fingerprint or _fingerprint(bars, schema, folder, indices),
    )


def _fingerprint(bars: Bars, schema: Schema, folder: Path, indices: IndexTables) -> str:
    digest = hashlib.sha256(_recipe(schema).encode())
    digest.update("\n".join(bars.symbols).encode())
    columns = (bars.days, bars.stock, bars.numbers, bars.factor, *bars.extras.values())
    for column in columns if bars.industry is None else (*columns, bars.industry):
        digest.update(column.tobytes())
    digest.update("\n".join(bars.industries).encode())
    for path in _side_files(folder, schema):
        digest.update(path.read_bytes() if path.is_file() else b"")
    for table in (indices.spells, indices.levels):
        digest.update(b"" if table is None else table.write_csv().encode())
    return digest.hexdigest()


def _source(table: pl.DataFrame, schema: Schema, where: str) -> Source:
    return Source(where, table.lazy(), column_names(table.columns, schema.columns, where))


def _vendor(columns: Sequence[str]) -> Vendor | None:
    """The vendor of a table, unless its columns are canonical."""
    return None if set(REQUIRED) <= set(columns) else vendor_of(columns)


def _vendor_of_files(files: Sequence[Path]) -> Vendor | None:
    """The vendor whose tables the files are; None if any holds canonical columns, or none is known."""
    found: dict[str, tuple[Vendor, str]] = {}
    for path in files:
        columns = long_form(scan(path).head(3).collect()).columns
        vendor = _vendor(columns)
        if vendor is None and {"date", "symbol", "close"} <= set(columns):
            return None
        if vendor is not None:
            found.setdefault(vendor.name, (vendor, path.name))
    if len(found) > 1:
        told = ", ".join(f"{path} of {name}" for name, (_, path) in found.items())
        raise DataError(f"tables of several vendors: {told}. Keep one vendor in a folder, or write a schema.")
    return next(iter(found.values()))[0] if found else None


def _vendor_table(files: Sequence[Path], vendor: Vendor) -> tuple[pl.DataFrame, list[Path]]:
    """All rows of the files that are the vendor's, with symbols from the files' names where rows have none."""
    tables, misfits = [], []
    for path in files:
        table = long_form(scan(path).collect())
        if not vendor.fits(table.columns):
            misfits.append(path)
            continue
        if "symbol" not in vendor.names(table.columns):
            table = table.with_columns(pl.lit(symbol_of_name(path.stem)).alias(vendor.columns["symbol"][0]))
        tables.append(table)
    try:
        return pl.concat(tables, how="diagonal_relaxed"), misfits
    except pl.exceptions.PolarsError as error:
        raise DataError(f"the files do not fit together: {error}.") from error


def _ledger(schema: Schema) -> Ledger:
    return Ledger(fatal=frozenset({"vwap_missing"} if schema.vwap_fallback == "error" else ()))


def _recipe(schema: Schema) -> str:
    return json.dumps([READER, FORMAT, schema.model_dump(mode="json")], sort_keys=True)


def _facts(files: Sequence[Path]) -> Iterator[tuple[str, int, int]]:
    """What a cache goes by."""
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is named in the schema but not there.")
        stat = file.stat()
        yield str(file.resolve()), stat.st_size, stat.st_mtime_ns


def _cached(facts: Sequence[Any], name: str, cache: str | Path | None, build: Callable[[], Panel]) -> Panel:
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    place = _cache_root(cache) / f"{name}-{key}"
    if place.exists():
        try:
            return Panel.open(place)
        except DataError:  # incomplete or of another format: built again
            pass
    return _saved(build(), place)


def _cache_root(cache: str | Path | None) -> Path:
    given = cache or os.environ.get("STEPPE_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "steppe" / "panels"


def _saved(panel: Panel, place: Path) -> Panel:
    try:
        panel.save(place)
    except OSError as error:
        raise DataError(
            f"cannot write the panel to {place}: {error}. "
            "Name a folder that can be written in the environment variable STEPPE_CACHE."
        ) from error
    return Panel.open(place)

"""A panel from long tables: CSV or parquet, a file or a folder of them, or any Arrow table."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from steppe.core.errors import DataError
from steppe.quant.panel import FORMAT, Panel
from steppe.quant.sources.build import build_panel
from steppe.quant.sources.checks import Ledger
from steppe.quant.sources.reading import SUFFIXES, Source, bar_sources, column_names, read_bars, unscaled
from steppe.quant.sources.schema import Schema, load_schema

__all__ = ["read_panel"]

READER = 1
"""Raised whenever the same tables would give another panel: part of cache keys and fingerprints."""


def read_panel(
    source: Any, schema: Schema | str | Path | None = None, *, cache: str | Path | None = None
) -> Panel:
    """Read, check and assemble a panel; files are read once and memory-mapped from then on.

    Args:
        source: a .csv or .parquet file; a folder of them; the folder of a saved panel; or any object with the Arrow C
            stream interface (a polars, pandas or pyarrow table), one row per stock and session.
        schema: the `Schema` or its file; default: ``panel.toml`` inside the folder, else canonical columns in plain
            units (module `steppe.quant.sources.schema`). Side files are looked for beside the bars; for a table in
            memory in the working directory.
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
        panel = _build_table(pl.DataFrame(source), _schema(schema))
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
    schema = _schema(schema)
    files = _bar_files(path, schema)
    name = schema.name or (path.stem if path.is_file() else path.resolve().name)
    place = _cache_root(cache) / f"{name}-{_key([*files, *_side_files(folder, schema)], schema)}"
    if place.exists():
        try:
            return Panel.open(place)
        except DataError:  # incomplete or of another format: built again
            pass
    return _saved(_build_files(files, folder, schema, name), place)


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
    sides = (schema.members, schema.securities, schema.float_shares)
    return [folder / side.file for side in sides if side is not None]


def _build_files(files: Sequence[Path], folder: Path, schema: Schema, name: str) -> Panel:
    declared = schema.bars is not None or len(files) == 1
    sources, misfits = bar_sources(files, schema.columns, declared)
    notes = [f"not read, no columns of bars: {', '.join(path.name for path in misfits)}"] if misfits else []
    notes += unscaled(sources, schema)
    ledger = _ledger(schema)
    digest = hashlib.sha256(_recipe(schema).encode())
    left_out = set(misfits)
    for path in [*(file for file in files if file not in left_out), *_side_files(folder, schema)]:
        if not path.is_file():
            raise DataError(f"{path} is named in the schema but not there.")
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    bars = read_bars(sources, schema, ledger)
    return build_panel(bars, schema, folder, ledger, notes, name, digest.hexdigest())


def _build_table(table: pl.DataFrame, schema: Schema) -> Panel:
    where = "the table"
    source = Source(where, table.lazy(), column_names(table.columns, schema.columns, where))
    ledger = _ledger(schema)
    bars = read_bars([source], schema, ledger)
    digest = hashlib.sha256(_recipe(schema).encode())
    digest.update("\n".join(bars.symbols).encode())
    columns = (bars.days, bars.stock, bars.numbers, bars.factor, *bars.extras.values())
    for column in columns if bars.industry is None else (*columns, bars.industry):
        digest.update(column.tobytes())
    digest.update("\n".join(bars.industries).encode())
    for path in _side_files(Path(), schema):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return build_panel(
        bars, schema, Path(), ledger, unscaled([source], schema), schema.name or "table", digest.hexdigest()
    )


def _ledger(schema: Schema) -> Ledger:
    return Ledger(fatal=frozenset({"vwap_missing"} if schema.vwap_fallback == "error" else ()))


def _recipe(schema: Schema) -> str:
    return json.dumps([READER, FORMAT, schema.model_dump(mode="json")], sort_keys=True)


def _key(files: Sequence[Path], schema: Schema) -> str:
    facts: list[Any] = [_recipe(schema)]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is named in the schema but not there.")
        stat = file.stat()
        facts.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


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

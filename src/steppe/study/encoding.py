"""What a study writes must be plain: names that are files everywhere, JSON and TOML that read back equal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any

from steppe.core.errors import DataError, SpecError

__all__ = ["dump_json", "plain_name", "toml_ready"]


def plain_name(name: str) -> str:
    """``name`` if it is safe as a file name on every system."""
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?", name):
        raise SpecError(f"{name!r} cannot be a file name here: use letters, digits and '_ - .'.")
    return name


def dump_json(content: object, what: str, indent: int | None = None) -> str:
    """``content`` as JSON; NaN is refused, JSON has none."""
    try:
        return json.dumps(content, allow_nan=False, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} cannot be written as JSON: {error}.") from error


def toml_ready(value: Any, where: str) -> Any:
    """``value`` in the types TOML reads back equal: mappings lose their Nones, tuples become lists."""
    if isinstance(value, Mapping):
        return {
            str(key): toml_ready(item, f"{where}.{key}") for key, item in value.items() if item is not None
        }
    if isinstance(value, list | tuple):
        return [toml_ready(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, str | bool | int | float | datetime | date | time):
        return value
    hint = "leave the entry out" if value is None else "give a plain value"
    raise SpecError(f"{where} = {value!r} cannot be written as TOML: {hint}.")

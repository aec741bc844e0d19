"""The errors a user meets. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["DataError", "SpecError", "SteppeError", "unknown"]


class SteppeError(Exception):
    """Base class of every error steppe raises on purpose."""


class DataError(SteppeError, ValueError):
    """Input data that cannot be used as it is."""


class SpecError(SteppeError, ValueError):
    """A study, optimizer or problem described wrongly: unknown key, bad value, meaningless combination."""


def unknown(kind: str, given: object, known: Iterable[str]) -> str:
    """A sentence for an unknown name: what was given, the nearest known one, and all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {given!r}.{hint} Known: {', '.join(names)}."

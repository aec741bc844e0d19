"""The errors a user meets. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, get_args

__all__ = ["DataError", "SolverError", "SpecError", "SteppeError", "explain_validation", "unknown"]


class SteppeError(Exception):
    """Base class of every error steppe raises on purpose."""


class DataError(SteppeError, ValueError):
    """Input data that cannot be used as it is."""


class SpecError(SteppeError, ValueError):
    """A study, optimizer or problem described wrongly: unknown key, bad value, meaningless combination."""


class SolverError(SteppeError, RuntimeError):
    """A numerical solver that did not end with a solution; nothing is returned in its place."""


def unknown(kind: str, given: object, known: Iterable[str]) -> str:
    """A sentence for an unknown name: what was given, the nearest known one, and all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {given!r}.{hint} Known: {', '.join(names)}."


def explain_validation(error: Any, model: Any, where: str) -> str:
    """One line per problem of a pydantic ``ValidationError`` of ``model``: the place, what was given, what is wrong.

    Unknown keys get a did-you-mean. Both arguments are taken as they come, so that this layer needs no pydantic.
    """
    lines = []
    for problem in error.errors(include_url=False):
        place = [str(part) for part in problem["loc"]]
        if problem["type"] == "extra_forbidden":
            message = unknown("key", place[-1], _keys_at(model, place[:-1]))
        elif problem["type"] == "missing":
            message = "is missing."
        elif problem["type"] == "value_error":
            message = f"{problem['ctx']['error']}."
        else:
            message = f"{problem['msg']}, got {problem['input']!r}."
        lines.append(f"{'.'.join(place)}: {message}" if place else message)
    return f"{where}: " + "\n  ".join(lines)


def _keys_at(model: Any, place: list[str]) -> list[str]:
    for part in place:
        if part.isdigit():  # the number of an item, not a key
            continue
        field = getattr(model, "model_fields", {}).get(part)
        kinds = [getattr(field, "annotation", None)]
        for kind in kinds:  # the model may stand inside X | None or tuple[X, ...]
            kinds.extend(get_args(kind))
        model = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    return list(getattr(model, "model_fields", {}))

"""Specs: one declarative record per optimizer and per problem, read by the CLI, studies, docs and tests."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from steppe.core.errors import SpecError, unknown

__all__ = ["Registry", "Spec"]


@dataclass(frozen=True)
class Spec:
    """What there is to know of an optimizer or a problem without importing it.

    Attributes:
        path: ``"package.module:Class"``, imported by `load` only.
        family: the group it is listed under, such as ``"sharpness-aware"``.
        summary: one line for lists and tables.
        paper: authors, year and identifier, or empty.
        evals: gradient evaluations per step with the defaults (for a problem: 0).
        copies: tensors as large as all parameters together that are held besides weights, gradients and the base's
            state: (between steps, at most within one), with the defaults.
        buys: a published figure of what it bought, with its source, or empty.
        demos: keyword arguments that between them exercise every kind of state.
        random: whether the number of evaluations varies with what is drawn or measured; `evals` is then its mean.
        xfail: conformance check name -> reason why it cannot hold.
        requires: what pip has to install for it beside the base install, or empty.
    """

    path: str
    family: str
    summary: str
    paper: str = ""
    evals: float = 0.0
    copies: tuple[float, float] = (0, 0)
    buys: str = ""
    demos: tuple[Mapping[str, Any], ...] = ({},)
    random: bool = False
    xfail: Mapping[str, str] = field(default_factory=dict)
    requires: str = ""

    def load(self) -> Any:
        """Import and return the object behind `path`."""
        try:
            return load(self.path)
        except SpecError as error:
            if not self.requires:
                raise
            raise SpecError(f"{error} It needs a package: pip install {self.requires!r}.") from error

    @property
    def missing(self) -> str:
        """Why it cannot be loaded here, if a package that it `requires` is not installed; else empty."""
        try:
            self.load()
        except SpecError as error:
            if self.requires:
                return str(error)
        return ""


def load(path: str) -> Any:
    """Import ``"package.module:Name"``; a `SpecError` says which half failed."""
    module, _, name = path.partition(":")
    if not name:
        raise SpecError(f"{path!r} is not an import path: write 'package.module:Name'.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"cannot import {path!r}: {error}.") from error


class Registry(Mapping[str, Spec]):
    """A read-only mapping key -> `Spec`; an unknown key is an error with a did-you-mean."""

    def __init__(self, kind: str, specs: Mapping[str, Spec]) -> None:
        self.kind = kind
        self._specs = dict(specs)

    def __getitem__(self, key: str) -> Spec:
        try:
            return self._specs[key]
        except KeyError:
            raise SpecError(unknown(self.kind, key, self._specs)) from None

    def __contains__(self, key: object) -> bool:
        return key in self._specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

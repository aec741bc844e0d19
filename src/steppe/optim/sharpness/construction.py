"""What a sharpness-aware optimizer is made from: its base, and the values its hyper-parameters may take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch.optim import LBFGS, Optimizer

from steppe.core.errors import SpecError
from steppe.optim.registry import optimizer_class, reject_unknown

__all__ = ["Allowed", "Base", "Either", "Interval", "Maybe", "make_base"]

Base: TypeAlias = str | type[Optimizer] | Optimizer


@dataclass(frozen=True)
class Interval:
    """The real numbers from `low` to `high`, both included; where `whole`, the integers among them."""

    low: float
    high: float = math.inf
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return False
        plain = not isinstance(value, bool | str) and (number.is_integer() or not self.whole)
        return plain and self.low <= number <= self.high

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if math.isinf(self.low):
            return kind
        return (
            f"{kind} >= {self.low:g}" if self.high == math.inf else f"{kind} in [{self.low:g}, {self.high:g}]"
        )


@dataclass(frozen=True)
class Maybe:
    """None, or what `allowed` holds."""

    allowed: Interval

    def __contains__(self, value: object) -> bool:
        return value is None or value in self.allowed

    def __str__(self) -> str:
        return f"None or {self.allowed}"


@dataclass(frozen=True)
class Either:
    """One of `words`, or what `allowed` holds."""

    words: tuple[str, ...]
    allowed: Interval

    def __contains__(self, value: object) -> bool:
        return value in self.words or value in self.allowed

    def __str__(self) -> str:
        return f"{', '.join(map(repr, self.words))} or {self.allowed}"


Allowed: TypeAlias = Interval | Maybe | Either | tuple[Any, ...]


def make_base(
    owner: str, params: Any, base: Base, base_hyper: Mapping[str, Any], own: Mapping[str, Any]
) -> Optimizer:
    """The base optimizer from what the user gave to `owner`; the rules are those of `SharpnessAware`."""
    cls = optimizer_class(base) if isinstance(base, str) else base if isinstance(base, type) else type(base)
    if not issubclass(cls, Optimizer):
        raise SpecError(
            f"{owner}: base={base!r} is neither an optimizer class, a registry key nor an optimizer."
        )
    if hasattr(cls, "passes") or issubclass(cls, LBFGS):
        raise SpecError(f"{owner}: {cls.__name__} evaluates the closure itself and cannot be a base.")
    if not isinstance(base, Optimizer):
        reject_unknown(
            f"{owner} over {cls.__name__}", base_hyper, [cls], [*own, "model", "sync", "restore", "seed"]
        )
        return cls(params, **base_hyper)
    if base_hyper:
        reject_unknown(f"{owner} over {cls.__name__}", base_hyper, [cls], own)
        raise SpecError(
            f"{owner}: the base is a ready {cls.__name__}; set {', '.join(base_hyper)} there, not here."
        )
    if params is not None:
        given = [item[1] if isinstance(item, tuple) else item for item in params]
        held = [param for group in base.param_groups for param in group["params"]]
        if set(map(id, given)) != set(map(id, held)):
            raise SpecError(
                f"{owner}: the base is a ready {cls.__name__} over other parameters: give params=None, and groups "
                "and their options to the base."
            )
    return base

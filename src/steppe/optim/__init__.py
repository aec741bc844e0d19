"""Optimizers, by name: ``from steppe.optim import SAM, create``. Nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steppe.optim.registry import OPTIMIZERS, create
    from steppe.optim.sharpness.asam import ASAM
    from steppe.optim.sharpness.base import SharpnessAware
    from steppe.optim.sharpness.friendly import FriendlySAM
    from steppe.optim.sharpness.gam import GAM
    from steppe.optim.sharpness.gsam import GSAM
    from steppe.optim.sharpness.sam import SAM

__all__ = ["ASAM", "GAM", "GSAM", "OPTIMIZERS", "SAM", "FriendlySAM", "SharpnessAware", "create"]

_HOME = {
    "OPTIMIZERS": "registry",
    "create": "registry",
    "SharpnessAware": "sharpness.base",
    "SAM": "sharpness.sam",
    "ASAM": "sharpness.asam",
    "GSAM": "sharpness.gsam",
    "GAM": "sharpness.gam",
    "FriendlySAM": "sharpness.friendly",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""Federated methods over simulated clients. Nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steppe.optim.federated.federation import Federation, Round
    from steppe.optim.federated.local import Local
    from steppe.optim.federated.methods import (
        FedAvg,
        FedGAMMA,
        FedSAM,
        FedSMOO,
        FedSpeed,
        Method,
        MoFedSAM,
    )
    from steppe.optim.federated.registry import METHODS
    from steppe.optim.federated.vector import Vector

__all__ = [
    "METHODS",
    "FedAvg",
    "FedGAMMA",
    "FedSAM",
    "FedSMOO",
    "FedSpeed",
    "Federation",
    "Local",
    "Method",
    "MoFedSAM",
    "Round",
    "Vector",
]

_HOME = {
    "METHODS": "registry",
    "Federation": "federation",
    "Round": "federation",
    "Local": "local",
    "Vector": "vector",
    **dict.fromkeys(("FedAvg", "FedGAMMA", "FedSAM", "FedSMOO", "FedSpeed", "Method", "MoFedSAM"), "methods"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""steppe: which optimizer makes my model generalise, what does it cost, and why?

Public names are imported when they are first asked for, so that ``import steppe`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steppe.core.objective import Objective
    from steppe.optim import ASAM, GAM, GSAM, OPTIMIZERS, SAM, FriendlySAM, SharpnessAware, create
    from steppe.optim.minimize import minimize
    from steppe.quant.panel import Panel
    from steppe.quant.sources.simulated import simulated_market
    from steppe.quant.sources.table import read_panel
    from steppe.study.run import run_study
    from steppe.study.spec import read_spec

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(
        ("ASAM", "GAM", "GSAM", "OPTIMIZERS", "SAM", "FriendlySAM", "SharpnessAware", "create"), "optim"
    ),
    "Objective": "core.objective",
    "Panel": "quant.panel",
    "minimize": "optim.minimize",
    "read_panel": "quant.sources.table",
    "read_spec": "study.spec",
    "run_study": "study.run",
    "simulated_market": "quant.sources.simulated",
}
__all__ = [
    "ASAM",
    "GAM",
    "GSAM",
    "OPTIMIZERS",
    "SAM",
    "FriendlySAM",
    "Objective",
    "Panel",
    "SharpnessAware",
    "create",
    "minimize",
    "read_panel",
    "read_spec",
    "run_study",
    "simulated_market",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

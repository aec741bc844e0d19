"""Optimizers, by name: ``from steppe.optim import SAM, create``. Nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steppe.optim.registry import OPTIMIZERS, create
    from steppe.optim.sharpness.ae_sam import AESAM
    from steppe.optim.sharpness.asam import ASAM
    from steppe.optim.sharpness.base import SharpnessAware
    from steppe.optim.sharpness.bsam import BSAM
    from steppe.optim.sharpness.combinations import AEVaSSO, FriendlyGSAM, LookAGSAM
    from steppe.optim.sharpness.composition import Composed
    from steppe.optim.sharpness.cr_sam import CRSAM
    from steppe.optim.sharpness.esam import ESAM
    from steppe.optim.sharpness.friendly import FriendlySAM
    from steppe.optim.sharpness.functional_sam import FunctionalSAM
    from steppe.optim.sharpness.gam import GAM
    from steppe.optim.sharpness.gnp import GNP
    from steppe.optim.sharpness.gsam import GSAM
    from steppe.optim.sharpness.imbsam import ImbSAM
    from steppe.optim.sharpness.late_sam import LateSAM
    from steppe.optim.sharpness.lookbehind import Lookbehind
    from steppe.optim.sharpness.looksam import LookSAM
    from steppe.optim.sharpness.msam import MSAM
    from steppe.optim.sharpness.rst import GRST, RST
    from steppe.optim.sharpness.rwp import RWP
    from steppe.optim.sharpness.sagm import SAGM
    from steppe.optim.sharpness.sam import SAM
    from steppe.optim.sharpness.sam_on import SAMON
    from steppe.optim.sharpness.sampa import SAMPa
    from steppe.optim.sharpness.ssam import SSAM
    from steppe.optim.sharpness.usam import USAM
    from steppe.optim.sharpness.vasso import VaSSO
    from steppe.optim.sharpness.wsam import WSAM

__all__ = [
    "AESAM",
    "ASAM",
    "BSAM",
    "CRSAM",
    "ESAM",
    "GAM",
    "GNP",
    "GRST",
    "GSAM",
    "MSAM",
    "OPTIMIZERS",
    "RST",
    "RWP",
    "SAGM",
    "SAM",
    "SAMON",
    "SSAM",
    "USAM",
    "WSAM",
    "AEVaSSO",
    "Composed",
    "FriendlyGSAM",
    "FriendlySAM",
    "FunctionalSAM",
    "ImbSAM",
    "LateSAM",
    "LookAGSAM",
    "LookSAM",
    "Lookbehind",
    "SAMPa",
    "SharpnessAware",
    "VaSSO",
    "create",
]

_HOME = {
    "OPTIMIZERS": "registry",
    "create": "registry",
    "SharpnessAware": "sharpness.base",
    "SAM": "sharpness.sam",
    "ASAM": "sharpness.asam",
    "GSAM": "sharpness.gsam",
    "GAM": "sharpness.gam",
    "FriendlySAM": "sharpness.friendly",
    "SAMPa": "sharpness.sampa",
    "MSAM": "sharpness.msam",
    "CRSAM": "sharpness.cr_sam",
    "Lookbehind": "sharpness.lookbehind",
    "LookSAM": "sharpness.looksam",
    "RST": "sharpness.rst",
    "GRST": "sharpness.rst",
    "AESAM": "sharpness.ae_sam",
    "LateSAM": "sharpness.late_sam",
    "Composed": "sharpness.composition",
    "LookAGSAM": "sharpness.combinations",
    "FriendlyGSAM": "sharpness.combinations",
    "AEVaSSO": "sharpness.combinations",
    "VaSSO": "sharpness.vasso",
    "WSAM": "sharpness.wsam",
    "SAGM": "sharpness.sagm",
    "GNP": "sharpness.gnp",
    "USAM": "sharpness.usam",
    "SAMON": "sharpness.sam_on",
    "SSAM": "sharpness.ssam",
    "ESAM": "sharpness.esam",
    "ImbSAM": "sharpness.imbsam",
    "FunctionalSAM": "sharpness.functional_sam",
    "RWP": "sharpness.rwp",
    "BSAM": "sharpness.bsam",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

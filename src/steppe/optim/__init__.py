"""Optimizers, by name: ``from steppe.optim import SAM, create``. Nothing is imported before it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from steppe.core.spec import load
from steppe.optim.federated.registry import METHODS
from steppe.optim.registry import LOSSES, OPTIMIZERS, create

if TYPE_CHECKING:  # for type checkers and editors; what there is at run time is told by the registries
    from steppe.optim.federated.federation import Federation as Federation
    from steppe.optim.federated.methods import (
        FedAvg as FedAvg,
        FedGAMMA as FedGAMMA,
        FedSAM as FedSAM,
        FedSMOO as FedSMOO,
        FedSpeed as FedSpeed,
        MoFedSAM as MoFedSAM,
    )
    from steppe.optim.federated.registry import METHODS as METHODS
    from steppe.optim.first_order import (
        GD as GD,
        NAG as NAG,
        ClassicAdam as ClassicAdam,
        Momentum as Momentum,
    )
    from steppe.optim.gradient_free.annealing import Annealing as Annealing, DualAnnealing as DualAnnealing
    from steppe.optim.gradient_free.base import GradientFree as GradientFree
    from steppe.optim.gradient_free.cma_es import CMAES as CMAES
    from steppe.optim.gradient_free.differential_evolution import (
        DifferentialEvolution as DifferentialEvolution,
    )
    from steppe.optim.gradient_free.hybrid import ThenGradient as ThenGradient
    from steppe.optim.gradient_free.processes import Processes as Processes
    from steppe.optim.gradient_free.pso import PSO as PSO
    from steppe.optim.gradient_free.slsqp import SLSQP as SLSQP
    from steppe.optim.gradient_free.stages import BasinHopping as BasinHopping, Proposed as Proposed
    from steppe.optim.muon import Muon as Muon
    from steppe.optim.registry import LOSSES as LOSSES, OPTIMIZERS as OPTIMIZERS, create as create
    from steppe.optim.sharpness.ae_sam import AESAM as AESAM
    from steppe.optim.sharpness.asam import ASAM as ASAM
    from steppe.optim.sharpness.base import SharpnessAware as SharpnessAware
    from steppe.optim.sharpness.bsam import BSAM as BSAM
    from steppe.optim.sharpness.combinations import (
        AEVaSSO as AEVaSSO,
        FriendlyGSAM as FriendlyGSAM,
        LookAGSAM as LookAGSAM,
    )
    from steppe.optim.sharpness.composition import Composed as Composed
    from steppe.optim.sharpness.cr_sam import CRSAM as CRSAM
    from steppe.optim.sharpness.esam import ESAM as ESAM
    from steppe.optim.sharpness.friendly import FriendlySAM as FriendlySAM
    from steppe.optim.sharpness.functional_sam import FunctionalSAM as FunctionalSAM
    from steppe.optim.sharpness.gam import GAM as GAM
    from steppe.optim.sharpness.gnp import GNP as GNP
    from steppe.optim.sharpness.gsam import GSAM as GSAM
    from steppe.optim.sharpness.imbsam import ImbSAM as ImbSAM
    from steppe.optim.sharpness.late_sam import LateSAM as LateSAM
    from steppe.optim.sharpness.lookbehind import Lookbehind as Lookbehind
    from steppe.optim.sharpness.looksam import LookSAM as LookSAM
    from steppe.optim.sharpness.mesa import MESA as MESA
    from steppe.optim.sharpness.msam import MSAM as MSAM
    from steppe.optim.sharpness.rst import GRST as GRST, RST as RST
    from steppe.optim.sharpness.rwp import RWP as RWP
    from steppe.optim.sharpness.saf import SAF as SAF
    from steppe.optim.sharpness.sagm import SAGM as SAGM
    from steppe.optim.sharpness.sam import SAM as SAM
    from steppe.optim.sharpness.sam_on import SAMON as SAMON
    from steppe.optim.sharpness.sampa import SAMPa as SAMPa
    from steppe.optim.sharpness.ssam import SSAM as SSAM
    from steppe.optim.sharpness.usam import USAM as USAM
    from steppe.optim.sharpness.vasso import VaSSO as VaSSO
    from steppe.optim.sharpness.wsam import WSAM as WSAM

_HOME = {
    "GradientFree": "steppe.optim.gradient_free.base:GradientFree",
    "SharpnessAware": "steppe.optim.sharpness.base:SharpnessAware",
    "Federation": "steppe.optim.federated.federation:Federation",
    "Processes": "steppe.optim.gradient_free.processes:Processes",
    **{
        spec.path.partition(":")[2]: spec.path
        for registry in (OPTIMIZERS, LOSSES, METHODS)
        for spec in registry.values()
        if spec.path.startswith("steppe.")
    },
}

__all__ = ["LOSSES", "METHODS", "OPTIMIZERS", "create", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load(_HOME[name])


def __dir__() -> list[str]:
    return __all__

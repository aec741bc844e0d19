"""One line per optimizer, and `create`, which builds any of them. Importing this module does not import torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from steppe.core.errors import SpecError, unknown
from steppe.core.spec import Registry, Spec

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["LOSSES", "OPTIMIZERS", "create", "optimizer_class", "reject_unknown"]

_SHARPNESS = "sharpness-aware"
_FIRST = "first-order"

OPTIMIZERS = Registry(
    "optimizer",
    {
        "sgd": Spec(
            "torch.optim:SGD",
            _FIRST,
            "stochastic gradient descent with momentum",
            evals=1,
            demos=({"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
        ),
        "adam": Spec(
            "torch.optim:Adam",
            _FIRST,
            "adaptive moments",
            "Kingma & Ba 2015, arXiv:1412.6980",
            evals=1,
            demos=({"lr": 0.01}, {"lr": 0.01, "amsgrad": True}),
        ),
        "adamw": Spec(
            "torch.optim:AdamW",
            _FIRST,
            "Adam with decoupled weight decay",
            "Loshchilov & Hutter 2019, arXiv:1711.05101",
            evals=1,
            demos=({"lr": 0.01, "weight_decay": 0.1},),
        ),
        "sam": Spec(
            "steppe.optim.sharpness.sam:SAM",
            _SHARPNESS,
            "gradient at the worst point of a ball of radius rho",
            "Foret et al. 2021, arXiv:2010.01412",
            evals=2,
            copies=(0, 1),
            buys="CIFAR-100, WRN-28-10: 81.51 to 84.16 (Momentum-SAM's table)",
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "rho": 0.5, "adaptive": True}),
        ),
        "asam": Spec(
            "steppe.optim.sharpness.asam:ASAM",
            _SHARPNESS,
            "SAM in a ball that scales with the weights",
            "Kwon et al. 2021, arXiv:2102.11600",
            evals=2,
            copies=(0, 1),
            buys="CIFAR-100, WRN-28-10: 81.51 to 84.74, as adaptive SAM (Momentum-SAM's table)",
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "eta": 0.0}),
        ),
        "gsam": Spec(
            "steppe.optim.sharpness.gsam:GSAM",
            _SHARPNESS,
            "SAM that also closes the surrogate gap",
            "Zhuang et al. 2022, arXiv:2203.08065",
            evals=2,
            copies=(0, 2),
            buys="ImageNet, ViT-B/16: 74.6 to 81.0, SAM 79.9 (its paper)",
            demos=(
                {"lr": 0.1, "momentum": 0.9},
                {"base": "adamw", "lr": 0.01, "rho": 0.1, "rho_min": 0.02, "lr_max": 0.01},
                {"lr": 0.1, "adaptive": True, "form": "paper", "minimize": "clean"},
            ),
        ),
        "gam": Spec(
            "steppe.optim.sharpness.gam:GAM",
            _SHARPNESS,
            "first-order flatness: the largest gradient norm in a ball",
            "Zhang et al. 2023, arXiv:2303.03108",
            evals=4,
            copies=(0, 3),
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "form": "paper"}),
        ),
        "friendly_sam": Spec(
            "steppe.optim.sharpness.friendly:FriendlySAM",
            _SHARPNESS,
            "SAM along the batch's noise: the gradient minus its moving average",
            "Li et al. 2024, arXiv:2403.12350",
            evals=2,
            copies=(1, 3),
            buys="CIFAR-100, ResNet-18, one seed: SAM's 80.8 to 81.2 (its repository)",
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "form": "paper", "sigma": 0.5}),
        ),
        "sampa": Spec(
            "steppe.optim.sharpness.sampa:SAMPa",
            _SHARPNESS,
            "SAM whose two gradients do not wait for each other",
            "Xie et al. 2024, arXiv:2410.10683",
            evals=2,
            copies=(2, 6),
            buys="CIFAR-10, ResNet-56: SAM's accuracy with 70 instead of 141 thousand gradients (its figure)",
            demos=({"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}, {"base": "adamw"}),
        ),
        "msam": Spec(
            "steppe.optim.sharpness.msam:MSAM",
            _SHARPNESS,
            "perturbed along the momentum: one gradient per step",
            "Becker et al. 2024, arXiv:2401.12033",
            evals=1,
            copies=(0, 1),
            buys="CIFAR-100, WRN-28-10: 81.51 to 83.21 at 0.99 of the speed (its table)",
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw"}),
        ),
        "cr_sam": Spec(
            "steppe.optim.sharpness.cr_sam:CRSAM",
            _SHARPNESS,
            "SAM with a penalty on the curvature, from w + e and w − e",
            "Wu et al. 2024, arXiv:2312.13555",
            evals=3,
            copies=(0, 2),
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw"}),
        ),
        "lookbehind": Spec(
            "steppe.optim.sharpness.lookbehind:Lookbehind",
            _SHARPNESS,
            "k ascents and k descents per step, then part of the way",
            "Mordido et al. 2024, arXiv:2307.16704",
            evals=4,
            copies=(0, 4),
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "alpha": -1}),
        ),
        "looksam": Spec(
            "steppe.optim.sharpness.looksam:LookSAM",
            _SHARPNESS,
            "SAM every k steps; between them what it found is used again",
            "Liu et al. 2022, arXiv:2203.02714",
            evals=1.2,
            copies=(1, 2),
            buys="CIFAR-100, WRN-28-10: 81.51 to 83.31 at 0.84 of the speed (Momentum-SAM's table)",
            demos=({"lr": 0.05, "momentum": 0.9}, {"base": "adamw", "norms": "tensor"}),
        ),
        "rst": Spec(
            "steppe.optim.sharpness.rst:RST",
            _SHARPNESS,
            "SAM in randomly chosen steps",
            "Zhao et al. 2022, arXiv:2203.09962",
            evals=1.5,
            copies=(0, 1),
            buys="half of SAM's extra cost (its abstract)",
            demos=(
                {"lr": 0.1, "momentum": 0.9},
                {"base": "adamw", "schedule": "linear", "p": 0.0, "total_steps": 20},
            ),
            random=True,
        ),
        "g_rst": Spec(
            "steppe.optim.sharpness.rst:GRST",
            _SHARPNESS,
            "RST whose perturbed steps mix both gradients",
            "Zhao et al. 2022, arXiv:2203.09962",
            evals=1.5,
            copies=(0, 2),
            buys="above SAM in most cases at half its extra cost (its abstract)",
            demos=(
                {"lr": 0.1, "momentum": 0.9},
                {"base": "adamw", "gamma": 0.5, "p": 1.0, "schedule": "trigonometric", "total_steps": 20},
            ),
            random=True,
        ),
        "ae_sam": Spec(
            "steppe.optim.sharpness.ae_sam:AESAM",
            _SHARPNESS,
            "SAM in the steps whose gradient is unusually large",
            "Jiang et al. 2023, arXiv:2304.14647",
            evals=1.5,
            copies=(0, 1),
            buys="CIFAR-10, ResNet-56: 92 thousand gradients where SAM takes 141 (SAMPa's figure)",
            demos=(
                {"lr": 0.1, "momentum": 0.9, "total_steps": 20},
                {"base": "adamw", "total_steps": 8, "lambda2": 0.0, "delta": 0.5},
            ),
            random=True,
        ),
        "late_sam": Spec(
            "steppe.optim.sharpness.late_sam:LateSAM",
            _SHARPNESS,
            "the base alone, then SAM for the last steps",
            "Zhou et al. 2025, arXiv:2410.10373",
            evals=1.3,
            copies=(0, 1),
            buys="about SAM's flatness from the last epochs alone (its abstract)",
            demos=(
                {"lr": 0.1, "momentum": 0.9, "total_steps": 20},
                {"base": "adamw", "total_steps": 20, "ramp": 3},
            ),
        ),
        "vasso": Spec(
            "steppe.optim.sharpness.vasso:VaSSO",
            _SHARPNESS,
            "SAM along a moving average of gradients, for a steadier perturbation",
            "Li & Giannakis 2023, arXiv:2309.15639",
            evals=2,
            copies=(1, 3),
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "theta": 0.2}),
        ),
        "wsam": Spec(
            "steppe.optim.sharpness.wsam:WSAM",
            _SHARPNESS,
            "sharpness as a weighted regulariser, coupled or decoupled",
            "Yue et al. 2023, arXiv:2305.15817",
            evals=2,
            copies=(0, 2),
            demos=(
                {"lr": 0.05, "momentum": 0.9},
                {"base": "adamw"},
                {"lr": 0.05, "decouple": False, "gamma": 0.6},
            ),
        ),
        "sagm": Spec(
            "steppe.optim.sharpness.sagm:SAGM",
            _SHARPNESS,
            "gradient matching: the perturbed point leans back along the descent",
            "Wang et al. 2023, arXiv:2303.10353",
            evals=2,
            copies=(0, 2),
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "alpha": 0.05, "adaptive": True}),
            xfail={"ignores_the_gradient_scale": "a part of the perturbation is alpha times the gradient"},
        ),
        "gnp": Spec(
            "steppe.optim.sharpness.gnp:GNP",
            _SHARPNESS,
            "penalises the gradient's norm",
            "Zhao et al. 2022, arXiv:2202.03599",
            evals=2,
            copies=(0, 2),
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "normalise": False}),
        ),
        "usam": Spec(
            "steppe.optim.sharpness.usam:USAM",
            _SHARPNESS,
            "SAM without dividing by the gradient's norm, or between both",
            "Andriushchenko & Flammarion 2022, arXiv:2206.06232",
            evals=2,
            copies=(0, 1),
            demos=(
                {"lr": 0.1, "momentum": 0.9},
                {"base": "adamw", "lmbda": 0.5},
                {"lr": 0.1, "lmbda": "1/t"},
            ),
            xfail={"ignores_the_gradient_scale": "the perturbation is as long as the gradient"},
        ),
        "sam_on": Spec(
            "steppe.optim.sharpness.sam_on:SAMON",
            _SHARPNESS,
            "SAM on normalisation layers only",
            "Mueller et al. 2023, arXiv:2306.04226",
            evals=2,
            copies=(0, 0),
            buys="CIFAR-100, WRN-28-10: 81.51 to 84.57, BatchNorm layers only (Momentum-SAM's table)",
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "adaptive": True}),
        ),
        "ssam": Spec(
            "steppe.optim.sharpness.ssam:SSAM",
            _SHARPNESS,
            "SAM with a sparse perturbation",
            "Mi et al. 2022, arXiv:2210.05177",
            evals=2,
            copies=(0.25, 2.5),
            buys="SAM's accuracy with half of the weights perturbed (its abstract)",
            demos=(
                {"lr": 0.1, "momentum": 0.9, "update_every": 2, "sparsity": 0.5},
                {"base": "adamw", "mask": "dynamic", "update_every": 1, "sparsity": 0.5, "total_steps": 20},
            ),
        ),
        "esam": Spec(
            "steppe.optim.sharpness.esam:ESAM",
            _SHARPNESS,
            "SAM with fewer weights in the ascent and fewer samples in the descent",
            "Du et al. 2022, arXiv:2110.03141",
            evals=2,
            copies=(0, 1),
            buys="CIFAR-100, WRN-28-10: 81.51 to 82.71 at 0.62 of the speed (Momentum-SAM's table)",
            demos=(
                {"lr": 0.01, "momentum": 0.9, "gamma": 0.9},
                {"base": "adamw", "gamma": 1.0, "beta": 0.5, "adaptive": True, "form": "paper"},
            ),
        ),
        "imbsam": Spec(
            "steppe.optim.sharpness.imbsam:ImbSAM",
            _SHARPNESS,
            "SAM for the rare classes only",
            "Zhou et al. 2023, arXiv:2308.07815",
            evals=3,
            copies=(0, 2),
            buys="CIFAR-100-LT, ResNet-34: SAM's 48.9 to 51.1, rare classes 12.4 to 19.4 (its repository)",
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "whole": False}),
        ),
        "functional_sam": Spec(
            "steppe.optim.sharpness.functional_sam:FunctionalSAM",
            _SHARPNESS,
            "SAM on the network's function: the loss's slope stays that of the clean pass",
            "Singh et al. 2025, arXiv:2502.02407",
            evals=2,
            copies=(0, 1),
            buys="language models: with a preconditioned ascent above AdamW at equal steps (its paper)",
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "rho": 0.5, "adaptive": True}),
        ),
        "rwp": Spec(
            "steppe.optim.sharpness.rwp:RWP",
            _SHARPNESS,
            "gradient at randomly perturbed weights, mixed with the clean one or alone",
            "Li et al. 2022, arXiv:2211.11489",
            evals=2,
            copies=(0, 2),
            buys="ImageNet: 1.1 points over SAM in half of its time, on two devices (its abstract)",
            demos=(
                {"lr": 0.1, "momentum": 0.9, "gamma": 0.1},
                {"base": "adamw", "gamma": 0.1, "alpha": 0.3, "halves": True},
            ),
            xfail={"takes_groups": "noise is drawn group by group"},
        ),
        "bsam": Spec(
            "steppe.optim.sharpness.bsam:BSAM",
            _SHARPNESS,
            "SAM as an optimal relaxation of Bayes: learns weights and their precision",
            "Moellenhoff & Khan 2023, arXiv:2210.01620",
            evals=2,
            copies=(0, 4),
            buys="CIFAR-10, ResNet-18: SGD 94.8, SAM 95.7, bSAM 96.1 (its repository)",
            demos=({"lr": 0.1, "data_size": 1000}, {"lr": 0.02, "data_size": 100, "rho": 0.1, "s_init": 0.5}),
            xfail={
                "takes_groups": "noise is drawn group by group",
                "ignores_the_gradient_scale": "the perturbation is proportional to the gradient",
            },
        ),
        "composed": Spec(
            "steppe.optim.sharpness.composition:Composed",
            _SHARPNESS,
            "parts of your choice: any ascent, radius, descent and cadence",
            evals=2,
            copies=(0, 1),
            demos=(
                {"lr": 0.1, "momentum": 0.9, "ascent": "asam", "descent": "gsam"},
                {"base": "adamw", "ascent": "friendly_sam", "descent": "g_rst", "gamma": 0.5},
            ),
        ),
        "look_agsam": Spec(
            "steppe.optim.sharpness.combinations:LookAGSAM",
            _SHARPNESS,
            "unpublished: ASAM's ascent, GSAM's descent, LookSAM's cadence",
            evals=1.2,
            copies=(1, 3),
            demos=({"lr": 0.05, "momentum": 0.9}, {"base": "adamw", "minimize": "clean"}),
        ),
        "friendly_gsam": Spec(
            "steppe.optim.sharpness.combinations:FriendlyGSAM",
            _SHARPNESS,
            "unpublished: Friendly-SAM's ascent, GSAM's descent",
            evals=2,
            copies=(1, 4),
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "form": "paper", "sigma": 0.5}),
        ),
        "ae_vasso": Spec(
            "steppe.optim.sharpness.combinations:AEVaSSO",
            _SHARPNESS,
            "unpublished: VaSSO's ascent in the steps that AE-SAM chooses",
            evals=1.5,
            copies=(1, 3),
            demos=(
                {"lr": 0.1, "momentum": 0.9, "total_steps": 20},
                {"base": "adamw", "total_steps": 8, "theta": 0.2, "lambda2": 0.0},
            ),
            random=True,
        ),
    },
)

LOSSES = Registry(
    "loss",
    {
        "saf": Spec(
            "steppe.optim.sharpness.saf:SAF",
            "trajectory loss",
            "keeps predictions near those of some epochs ago",
            "Du et al. 2022, arXiv:2205.14083",
            evals=1,
            buys="ImageNet accuracy above SAM's at about the base's cost (its abstract)",
        ),
        "mesa": Spec(
            "steppe.optim.sharpness.mesa:MESA",
            "trajectory loss",
            "keeps predictions near those of the averaged model",
            "Du et al. 2022, arXiv:2205.14083",
            evals=4 / 3,
            copies=(1, 1),
            buys="CIFAR-100, WRN-28-10: 81.51 to 82.75 at 0.77 of the speed (Momentum-SAM's table)",
        ),
    },
)
"""Losses that do for any optimizer what a perturbation does: they are added to the training loss."""


def create(key: str | Spec, params: Any, base: Any = None, **hyper: Any) -> Optimizer:
    """Build the optimizer `key` over `params`.

    Args:
        key: a key of `OPTIMIZERS`; for one of your own ``"package.module:Class"`` or its `Spec`.
        params: whatever torch optimizers accept: tensors, ``model.named_parameters()``, groups.
        base: for a sharpness-aware optimizer, its base: a key or import path, an optimizer class, or a ready
            optimizer. None takes the class's own default, ``torch.optim.SGD`` for all of steppe's.
        hyper: hyper-parameters; of a sharpness-aware optimizer its own and its base's together.

    Raises:
        SpecError: unknown key or hyper-parameter, a value out of its range, or a base for an optimizer that has none.
    """
    cls = optimizer_class(key)
    if base is None:
        reject_unknown(cls.__name__, hyper, [cls])
        return cls(params, **hyper)
    if "base" not in inspect.signature(cls).parameters:
        raise SpecError(f"{cls.__name__} has no base optimizer, but base={base!r} was given: leave it out.")
    return cls(params, base=base, **hyper)  # type: ignore[call-arg]


def optimizer_class(key: str | Spec) -> type[Optimizer]:
    """The class behind a registry key, an import path ``"package.module:Class"`` or a `Spec`."""
    if isinstance(key, str):
        key = Spec(key, "", "") if ":" in key else OPTIMIZERS[key]
    cls: type[Optimizer] = key.load()
    return cls


def reject_unknown(
    owner: str, given: Iterable[str], classes: Iterable[type], own: Iterable[str] = ()
) -> None:
    """Raise a `SpecError` with a did-you-mean for a name that none of `classes` takes and that is not in `own`."""
    known = set(own)
    for cls in classes:
        for name, parameter in _arguments(cls).items():
            if parameter.kind is parameter.VAR_KEYWORD:
                return  # it takes any name and judges for itself
            known.add(name)
    for name in given:
        if name not in known:
            raise SpecError(unknown(f"hyper-parameter of {owner}", name, known))


def _arguments(cls: type) -> Mapping[str, inspect.Parameter]:
    return {k: v for k, v in inspect.signature(cls).parameters.items() if k not in ("params", "base")}

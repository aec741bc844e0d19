"""One line per optimizer, and `create`, which builds any of them. Importing this module does not import torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from steppe.core.errors import SpecError, unknown
from steppe.core.spec import Registry, Spec

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["OPTIMIZERS", "create", "optimizer_class", "reject_unknown"]

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
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "rho": 0.5, "adaptive": True}),
        ),
        "asam": Spec(
            "steppe.optim.sharpness.asam:ASAM",
            _SHARPNESS,
            "SAM in a ball that scales with the weights",
            "Kwon et al. 2021, arXiv:2102.11600",
            evals=2,
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "eta": 0.0}),
        ),
        "gsam": Spec(
            "steppe.optim.sharpness.gsam:GSAM",
            _SHARPNESS,
            "SAM that also closes the surrogate gap",
            "Zhuang et al. 2022, arXiv:2203.08065",
            evals=2,
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
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "form": "paper"}),
        ),
        "friendly_sam": Spec(
            "steppe.optim.sharpness.friendly:FriendlySAM",
            _SHARPNESS,
            "SAM along the batch's noise: the gradient minus its moving average",
            "Li et al. 2024, arXiv:2403.12350",
            evals=2,
            demos=({"lr": 0.1, "momentum": 0.9}, {"base": "adamw", "form": "paper", "sigma": 0.5}),
        ),
    },
)


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

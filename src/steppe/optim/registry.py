"""One line per optimizer, and `create`, which builds any of them. Importing this module does not import torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from steppe.core.errors import SpecError, unknown
from steppe.core.spec import Registry, Spec
from steppe.optim.gradient_free.registry import GRADIENT_FREE
from steppe.optim.sharpness.registry import SHARPNESS_AWARE

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["LOSSES", "OPTIMIZERS", "create", "optimizer_class", "reject_unknown"]

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
        **SHARPNESS_AWARE,
        **GRADIENT_FREE,
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

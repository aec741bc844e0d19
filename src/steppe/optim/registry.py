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
        "gd": Spec(
            "steppe.optim.first_order:GD",
            _FIRST,
            "gradient descent; full-batch where the problem gives all data as one batch",
            "Cauchy 1847",
            evals=1,
            demos=({"lr": 0.1},),
        ),
        "sgd": Spec(
            "torch.optim:SGD",
            _FIRST,
            "stochastic gradient descent, with momentum if asked for",
            "Robbins & Monro 1951",
            evals=1,
            demos=({"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
        ),
        "minibatch_sgd": Spec(
            "torch.optim:SGD",
            _FIRST,
            "sgd by another name: the size of the batch is the problem's",
            evals=1,
            demos=({"lr": 0.1},),
        ),
        "momentum": Spec(
            "steppe.optim.first_order:Momentum",
            _FIRST,
            "heavy-ball momentum, 0.9",
            "Polyak 1964",
            evals=1,
            demos=({"lr": 0.05}, {"lr": 0.05, "dampening": 0.5, "weight_decay": 1e-2}),
        ),
        "nag": Spec(
            "steppe.optim.first_order:NAG",
            _FIRST,
            "Nesterov's accelerated gradient, momentum 0.9; its weights are the look-ahead points",
            "Nesterov 1983; Sutskever et al. 2013",
            evals=1,
            demos=({"lr": 0.05},),
        ),
        "adagrad": Spec(
            "torch.optim:Adagrad",
            _FIRST,
            "each weight's rate falls with the gradients it has seen",
            "Duchi et al. 2011",
            evals=1,
            demos=({"lr": 0.1}, {"lr": 0.1, "lr_decay": 1e-2, "initial_accumulator_value": 0.1}),
        ),
        "adadelta": Spec(
            "torch.optim:Adadelta",
            _FIRST,
            "steps in the units of the weights: averages of steps over averages of gradients",
            "Zeiler 2012, arXiv:1212.5701",
            evals=1,
            demos=({"lr": 1.0}, {"lr": 1.0, "eps": 1e-3, "weight_decay": 1e-2}),
        ),
        "rmsprop": Spec(
            "torch.optim:RMSprop",
            _FIRST,
            "gradients over the root of a moving average of their squares",
            "Tieleman & Hinton 2012",
            evals=1,
            demos=({"lr": 0.01}, {"lr": 0.01, "momentum": 0.9, "centered": True}),
        ),
        "adam": Spec(
            "torch.optim:Adam",
            _FIRST,
            "adaptive moments",
            "Kingma & Ba 2015, arXiv:1412.6980",
            evals=1,
            demos=({"lr": 0.01}, {"lr": 0.01, "amsgrad": True}),
        ),
        "classic_adam": Spec(
            "steppe.optim.first_order:ClassicAdam",
            _FIRST,
            "Adam with its paper's options: the efficient form, decaying betas, a step size over the root of t",
            "Kingma & Ba 2015, arXiv:1412.6980",
            evals=1,
            demos=(
                {"lr": 0.01},
                {"lr": 0.1, "form": "efficient", "beta_decay": 0.99, "sqrt_decay": True},
                {"lr": 0.01, "beta_decay": 0.99, "beta_decay_form": "note"},
            ),
        ),
        "adamax": Spec(
            "torch.optim:Adamax",
            _FIRST,
            "Adam with the largest gradient of late in place of the root mean square",
            "Kingma & Ba 2015, arXiv:1412.6980, section 7.1",
            evals=1,
            demos=({"lr": 0.01}, {"lr": 0.01, "weight_decay": 1e-2}),
        ),
        "adamw": Spec(
            "torch.optim:AdamW",
            _FIRST,
            "Adam with decoupled weight decay",
            "Loshchilov & Hutter 2019, arXiv:1711.05101",
            evals=1,
            demos=({"lr": 0.01, "weight_decay": 0.1},),
        ),
        "muon": Spec(
            "steppe.optim.muon:Muon",
            _FIRST,
            "momentum with orthogonalised matrices; AdamW for biases and all else that is no matrix",
            "Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982",
            evals=1,
            demos=({"lr": 0.02}, {"lr": 0.02, "adjust_lr_fn": "original", "nesterov": False}),
            requires="torch>=2.9",
        ),
        "schedule_free_adamw": Spec(
            "schedulefree:AdamWScheduleFree",
            _FIRST,
            "AdamW that averages its weights and so needs no schedule; train() before steps, eval() before using them",
            "Defazio et al. 2024, arXiv:2405.15682",
            evals=1,
            demos=({"lr": 0.01}, {"lr": 0.01, "warmup_steps": 5, "weight_decay": 1e-2}),
            requires="schedulefree",
        ),
        "soap": Spec(
            "pytorch_optimizer:SOAP",
            _FIRST,
            "Adam in the eigenbasis of Shampoo's preconditioner; its first step only prepares that",
            "Vyas et al. 2024, arXiv:2409.11321",
            evals=1,
            demos=({"lr": 0.01}, {"lr": 0.01, "precondition_frequency": 2, "precondition_1d": True}),
            xfail={
                "copies_deeply": "pytorch_optimizer 4: a copy lacks the attribute `maximize`",
                "pickles": "pytorch_optimizer 4: a pickle lacks the attribute `maximize`",
                "adds_param_groups": "pytorch_optimizer 4 counts steps in the group, and gives new groups no count",
                "takes_dtypes": "it takes no complex weights",
                "rejects_unknown_names": "pytorch_optimizer 4 ignores names that it does not know",
            },
            requires="pytorch_optimizer",
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

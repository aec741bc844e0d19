"""Sharpness-aware minimization of normalisation layers only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.optim.sharpness.ascent import Perturbation, elementwise, magnitudes, steepest
from steppe.optim.sharpness.base import Base, Interval
from steppe.optim.sharpness.composition import Ascent, Composition, Hyper, Parts
from steppe.optim.sharpness.vectors import Vector

__all__ = ["SAMON", "NormLayerAscent"]

_LAYER = re.compile(r"Norm(\dd)?$")


class NormLayerAscent(Ascent):
    """SAM's e, or where `adaptive` ASAM's, over the parameters of normalisation layers; the others stay."""

    hyper = {"adaptive": Hyper(False, (False, True)), "eta": Hyper(0.01, Interval(0))}  # noqa: RUF012

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._kinds: list[str | None] = []

    def trait(self, index: int, name: str | None, param: Tensor) -> str | None:
        """None for a parameter that stays, "weight" for one that is scaled where `adaptive`, "other"."""
        if index >= len(self._kinds):  # in the first step, or a group was added
            self._kinds = self._sorted()
        return self._kinds[index]

    def perturbation(self, g: Vector, rho: Sequence[float]) -> Perturbation:
        """See the class."""
        chosen = [
            (bucket, gs, r)
            for bucket, gs, r in zip(g.buckets, g.tensors, rho, strict=True)
            if self.trait_of(bucket) is not None
        ]
        buckets = [bucket for bucket, _, _ in chosen]
        theirs, radii = Vector(buckets, [gs for _, gs, _ in chosen]), [r for _, _, r in chosen]
        scales = [
            magnitudes(bucket, self.of(bucket.group, "eta"))
            if self.trait_of(bucket) == "weight" and self.of(bucket.group, "adaptive")
            else None
            for bucket in buckets
        ]
        if not any(scales):
            return steepest(theirs, radii, eps=1e-16)
        return elementwise(theirs, radii, scales, eps=1e-16)

    def _sorted(self) -> list[str | None]:
        """What `trait` says of every parameter."""
        params: list[tuple[str | None, Tensor]] = []
        for group in self.optimizer.param_groups:
            names = group.get("param_names") or [None] * len(group["params"])
            params += zip(names, group["params"], strict=True)
        model = self.optimizer.module.model
        if model is not None:
            layers = _parameters_of_layers(model)
            found = [(layers.get(id(param)), id(param) in layers) for _, param in params]
        else:
            found = [(name, name is not None and ("norm" in name or "bn" in name)) for name, _ in params]
            if not any(chosen for _, chosen in found):
                found = [(name, param.ndim <= 1) for name, param in params]
        if not any(chosen for _, chosen in found):
            raise SpecError(
                f"{type(self.optimizer).__name__} perturbs normalisation layers only, and found none: "
                + (
                    "the names have neither 'norm' nor 'bn', and no parameter has one dimension. Give model=."
                    if model is None
                    else "the modules of model= whose class is called ...Norm hold none of these parameters."
                )
            )
        return [
            ("weight" if name and "weight" in name else "other") if chosen else None for name, chosen in found
        ]


def _parameters_of_layers(model: nn.Module) -> dict[int, str]:
    """The parameters of normalisation layers, by id, and their names within the layer."""
    return {
        id(param): name
        for layer in model.modules()
        if any(_LAYER.search(cls.__name__) for cls in type(layer).__mro__)
        for name, param in layer.named_parameters(recurse=False)
    }


class SAMON(Composition):
    """SAM-ON: SAM or ASAM that perturbs the parameters of normalisation layers only.

    Mueller, Vlaar, Rolnick, Hein 2023, arXiv:2306.04226, with g_n the part of ∇L(w) that belongs to them ::

        e = rho · g_n / ‖g_n‖
        adaptive:  e = rho · T² ⊙ g_n / ‖T ⊙ g_n‖  with T = |w| + eta for weights, 1 for biases
        base step with ∇L(w + e), of all parameters

    What belongs to them is decided in this order:

    * with ``model=``, the parameters held by modules whose class, or one it derives from, is called ...Norm,
      ...Norm1d and so on: all of torch's, and those of libraries that keep to it;
    * by name, as in the official code (mueller-mp/SAM-ON): "norm" or "bn" occurs in it;
    * where no name has either, tensors of at most one dimension, so that biases of other layers belong to them too.

    As in the official code a weight is a parameter with "weight" in its name; one without a name, and known from no
    model, is not scaled. The code also has layerwise scaling, the maximum norm and scaled biases; those are left out.

    The other parameters cost nothing: no copy, no perturbation, no part in the norm.

    Args:
        params: see `SharpnessAware`; with names.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default the official class's. The paper needs larger ones than SAM.
        adaptive: scale the perturbation as `ASAM` does; default False. The official script's default is ASAM.
        eta: floor of T, >= 0; default the official class's.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.

    Raises:
        SpecError: in the first step, when no parameter belongs to a normalisation layer.
    """

    parts = Parts(ascent=NormLayerAscent)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.5,
        adaptive: bool = False,
        eta: float = 0.01,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, adaptive=adaptive, eta=eta)

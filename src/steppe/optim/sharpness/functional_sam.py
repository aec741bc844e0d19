"""Functional sharpness-aware minimization."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steppe.optim.sharpness.base import Base, Pass
from steppe.optim.sharpness.composition import Composition, Descent, Parts
from steppe.optim.sharpness.sam import SteepestAscent

__all__ = ["FunctionalDescent", "FunctionalSAM"]


class FunctionalDescent(Descent):
    """J(w + e)ᵀ · ∂L/∂F(w): the network's Jacobian where it is perturbed, the loss's slope where it is not."""

    @property
    def takes_pass(self) -> bool:
        """To see the outputs."""
        return True

    def passes(self) -> tuple[Pass, Pass]:
        """The first records the slopes, the second pulls them back."""
        slopes: list[Tensor] = []
        return _Recorded(slopes=slopes), _PulledBack(slopes=slopes)


class FunctionalSAM(Composition):
    """Functional-SAM: perturb the network's function, and leave the loss's slope at its outputs as it was.

    Singh, Mobahi, Agarwala, Dauphin 2025, arXiv:2502.02407 (ICML 2025), with F the network's outputs on the batch,
    J their Jacobian and g = ∇L(w) = J(w)ᵀ · ∂L/∂F(w) ::

        e = rho · g / ‖g‖
        base step with J(w + e)ᵀ · ∂L/∂F(w)

    SAM takes the slope at w + e too, and can then lower sharpness by moving the outputs alone; in language models it
    mostly does, and generalises no better for it. There is no official code. The paper's second variant, whose ascent
    is preconditioned as well, is not here; other ascents can be had from others:
    ``Composed(params, ascent="asam", descent="functional_sam")``.

    The closure takes the pass and calls backward on ``p.mean(losses, outputs)``: in the first pass the mean loss, in
    the second ⟨outputs, ∂L/∂F(w)⟩, two gradients per step. `outputs` is the one tensor from which the losses are
    computed, ``[n, ...]``; what was found at it is held from pass to pass. A loop over micro-batches calls it once for
    each, in the same order in both passes. Running the model must not differ between the passes: dropout does.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default SAM's.
        adaptive: scale the perturbation by |w|, see `SAM`.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=SteepestAscent, descent=FunctionalDescent)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, adaptive=adaptive)


@dataclass(eq=False)
class _Recorded(Pass):
    slopes: list[Tensor] = field(default_factory=list)

    def scalar(self, losses: Tensor, outputs: Tensor | None) -> Tensor:
        # of the sum: the mean's would be n times as near to where half precision ends
        self.slopes += torch.autograd.grad(losses.sum(), _required(outputs), retain_graph=True)
        return super().scalar(losses, outputs)


@dataclass(eq=False)
class _PulledBack(Pass):
    slopes: list[Tensor] = field(default_factory=list)

    def mean(self, losses: Tensor, outputs: Tensor | None = None) -> Tensor:
        scalar = super().mean(losses, outputs)
        self.loss = losses.detach().mean()
        return scalar

    def scalar(self, losses: Tensor, outputs: Tensor | None) -> Tensor:
        outputs, slope = _required(outputs), self.slopes.pop(0) if self.slopes else None
        if slope is None or slope.shape != outputs.shape:
            before = "there were none" if slope is None else f"they had {tuple(slope.shape)}"
            raise ValueError(
                f"outputs have shape {tuple(outputs.shape)}, but at the clean weights {before}: both passes must see "
                "the same batch, in the same micro-batches."
            )
        return (outputs * slope.conj()).real.sum() / len(losses)


def _required(outputs: Tensor | None) -> Tensor:
    if outputs is None:
        raise ValueError(
            "Functional-SAM differentiates the model's outputs: call p.mean(losses, outputs) with the outputs that "
            "the losses were computed from."
        )
    return outputs

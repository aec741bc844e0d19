"""Curvature weighed by the weights themselves: relative flatness and the Fisher-Rao norm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from steppe.core.errors import SpecError, unknown
from steppe.core.flat import flatten
from steppe.landscape.hvp import hvp
from steppe.landscape.point import Measurement, Point
from steppe.landscape.spectrum import measured, signs

__all__ = ["fisher_rao_norm", "relative_flatness"]


def relative_flatness(
    point: Point,
    generator: torch.Generator,
    layer: str | None = None,
    stderr: float = 0.1,
    max_probes: int = 100,
) -> Measurement:
    """Relative flatness of one layer; the larger, the sharper.

    Petzka et al. 2021, arXiv:2001.00939, definition 3, for a layer's weights ``W [neurons, inputs]`` with rows w_s ::

        Σ_{s,s'} <w_s, w_s'> Tr(H_{s,s'}),   H_{s,s'} = ∂²L / ∂w_s ∂w_s'

    Estimated as the mean of ``<V, H V>`` with ``V = W Z`` and random signs ``Z [inputs, inputs]`` (ours: the official
    code builds the Hessian), of which it is the expectation. Does not change when the layer as a whole is rescaled.

    Args:
        point: where.
        generator: draws Z.
        layer: name of the weights; default the last with two or more dimensions. More than two: [out, all the rest].
        stderr: wanted standard error over the value; at least 10 probes are drawn.
        max_probes: probes at most, a Hessian-vector product each; what is known by then has ``converged=False``.

    Raises:
        SpecError: an unknown layer, one without rows, or a `stderr` that is not above 0.
    """
    before = point.cost
    rows = [name for name, p in zip(point.names, point.params, strict=True) if p.dim() >= 2]
    layer = rows[-1] if layer is None and rows else layer
    if layer not in rows:
        raise SpecError(unknown("layer with rows", layer, rows))
    chosen = point.names.index(layer)
    weights = point.params[chosen].detach().flatten(1)
    inputs = weights.new_empty(weights.shape[1], weights.shape[1])

    def probe() -> float:
        parts = [torch.zeros_like(p) for p in point.params]
        parts[chosen] = weights @ signs(inputs, generator)
        v = flatten(parts)
        return float(v.double() @ hvp(point, v).double())

    return measured(point, before, probe, stderr, max_probes)


def fisher_rao_norm(
    point: Point,
    generator: torch.Generator,
    losses: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Measurement:
    """The squared Fisher-Rao norm of the weights, with the empirical Fisher matrix.

    Liang et al. 2019, arXiv:1711.01530, definition 2 ::

        wᵀ F w = mean over samples i of  <w, ∇l_i(w)>²

    The derivative along w is a central difference, ``(l_i(w + h w) - l_i(w - h w)) / 2h`` with h the cube root of the
    machine epsilon: two forward passes. Scale-invariant.

    Args:
        point: where; its batches and their shares are used.
        generator: not used.
        losses: ``losses(model, batch) -> [n]``, one per sample; by default each batch is one sample with the point's
            own loss, as for losses of a cross-section.
    """
    before, theta = point.cost, point.theta
    step = torch.finfo(theta.dtype).eps ** (1 / 3)

    def each(weights: Tensor) -> list[Tensor]:
        point.charge(forward=1.0)
        with point.at(weights), point.evaluating(), torch.no_grad():
            return [(losses or point.loss)(point.model, batch).double() for batch in point.batches]

    ahead, behind = each(theta * (1 + step)), each(theta * (1 - step))
    value = sum(
        share * float(((up - down) / (2 * step)).square().mean())
        for share, up, down in zip(point.shares, ahead, behind, strict=True)
    )
    return Measurement(value, math.nan, True, point.cost - before)

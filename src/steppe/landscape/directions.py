"""Axes to look along: random directions scaled as the weights are, Hessian eigenvectors, the line between two minima.

An axis is a flat vector ``[dim]`` in the order of `Point.params`. The plane of a training trajectory is in
`steppe.landscape.trajectory`.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from steppe.core.errors import SpecError, unknown
from steppe.core.flat import flatten
from steppe.landscape.point import Point
from steppe.landscape.spectrum import lanczos

__all__ = ["Normalise", "between", "eigenvectors", "filters", "random_directions"]

Normalise = Literal["filter", "layer", "none"]

_GATES = {"GRU": 3, "LSTM": 4, "GRUCell": 3, "LSTMCell": 4}


def random_directions(
    point: Point, generator: torch.Generator, n: int = 2, normalise: Normalise = "filter"
) -> Tensor:
    """``[n, dim]`` Gaussian directions, each block scaled to the norm of the same block of the weights.

    Li et al. 2018 (arXiv:1712.09913, section 4): ``d_ij <- d_ij / ‖d_ij‖ * ‖w_ij‖`` for filter j of layer i; their
    code sets biases to zero. Here biases take part, see `filters`; a block of zero weights stays where it is.

    Args:
        point: whose weights give the norms.
        generator: what they are drawn from.
        n: how many; nearly, but not exactly, orthogonal.
        normalise: ``"filter"``: blocks of `filters`; ``"layer"``: one block per parameter; ``"none"``.

    Raises:
        SpecError: another name for `normalise`.
    """
    if normalise not in get_args(Normalise):
        raise SpecError(unknown("normalisation", normalise, get_args(Normalise)))
    drawn = torch.randn(n, point.dim, generator=generator).to(point.theta)
    if normalise == "none":
        return drawn
    if normalise == "filter":
        blocks = filters(point)
    else:
        blocks = flatten(torch.full(p.shape, i) for i, p in enumerate(point.params))
    blocks = blocks.to(drawn.device)
    wanted = _norms(point.theta, blocks)
    return torch.stack([d * (wanted / _norms(d, blocks)).to(d.dtype)[blocks] for d in drawn])


def filters(point: Point) -> Tensor:
    """``[dim]`` int64: which filter each weight belongs to, numbered from 0.

    A filter is a row of a weight (first index: a unit of a linear layer, a channel of a convolution, a unit of one
    gate of a recurrent layer), a bias as a whole, or the bias of one gate of a recurrent layer.
    """
    gates = {
        id(p): _GATES.get(getattr(module, "mode", type(module).__name__), 1)
        for module in point.model.modules()
        if isinstance(module, nn.RNNBase | nn.RNNCellBase)
        for p in module.parameters(recurse=False)
        if p.dim() == 1
    }
    numbers, first = [], 0
    for p in point.params:
        count = p.shape[0] if p.dim() > 1 else gates.get(id(p), 1)
        numbers.append(first + torch.arange(count).repeat_interleave(p.numel() // count))
        first += count
    return torch.cat(numbers)


def eigenvectors(point: Point, generator: torch.Generator, k: int = 2) -> Tensor:
    """``[k, dim]``, of length 1: eigenvectors of the Hessian's `k` largest eigenvalues, by `lanczos`."""
    return lanczos(point, generator, k).vectors


def between(start: Tensor, end: Tensor) -> Tensor:
    """``[1, dim]`` float64: the axis from one minimum to another, which has coordinate 1 if the first is the origin."""
    return (end.double() - start.double()).unsqueeze(0)


def _norms(vector: Tensor, blocks: Tensor) -> Tensor:
    """The norm of each block, float64."""
    squares = vector.double().square()
    return squares.new_zeros(int(blocks[-1]) + 1).index_add_(0, blocks, squares).sqrt()

"""A discrete choice of architecture as a function of a real vector, with its optimum known by enumeration.

Each of the 144 nets is trained once, so that looking one up is all that an evaluation costs (a tabular benchmark, as
NAS-Bench-101: Ying et al. 2019, arXiv:1902.09635). What an evaluation stands for is one short training.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from steppe.core.seeding import generator
from steppe.problems.function import Function

__all__ = ["CHOICES", "Choice", "architecture", "decode", "table"]

DEPTHS, WIDTHS, RATES = (1, 2, 3), (2, 4, 8, 16), (0.01, 0.03, 0.1)
ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "sigmoid": torch.sigmoid,
}
STEPS = 50
"""Full-batch Adam steps of a training."""

REPEATS = 3
"""Initial weights of each net; its loss is their mean."""


class Choice(NamedTuple):
    """One net: hidden layers, their width, activation, Adam's learning rate."""

    depth: int
    width: int
    activation: str
    rate: float


CHOICES = tuple(Choice(*parts) for parts in itertools.product(DEPTHS, WIDTHS, ACTIVATIONS, RATES))
"""All choices, in the order of `table`."""

DIM = 3 + len(ACTIVATIONS)


def decode(x: Tensor) -> Tensor:
    """The number in `CHOICES` ``[...]`` of the choice at ``x [..., 7]``.

    x[0], x[1], x[2] are rounded to the place of depth, width and rate in their lists, and kept inside; the largest of
    x[3:] names the activation.
    """
    sizes = (len(DEPTHS), len(WIDTHS), len(RATES))
    depth, width, rate = (x[..., place].round().clamp(0, size - 1).long() for place, size in enumerate(sizes))
    activation = x[..., 3:].argmax(-1)
    return ((depth * sizes[1] + width) * len(ACTIVATIONS) + activation) * sizes[2] + rate


@functools.lru_cache(maxsize=4)
def table(steps: int = STEPS) -> Tensor:
    """The validation loss ``[144]`` of every choice after that many steps. A few seconds; computed once."""
    nets = itertools.product(DEPTHS, WIDTHS, ACTIVATIONS)
    return torch.cat([_train(*net, steps) for net in nets])


def architecture(steps: int = STEPS) -> Function:
    """The validation loss as a function of 7 real numbers: constant between the choices' borders.

    Random search with replacement needs 144 evaluations on average to meet the best of 144 choices, enumeration in a
    random order 72.5.
    """
    losses = table(steps)
    best = CHOICES[int(losses.argmin())]
    places = [DEPTHS.index(best.depth), WIDTHS.index(best.width), RATES.index(best.rate)]
    named = [float(name == best.activation) for name in ACTIVATIONS]
    return Function(
        "architecture",
        lambda x: losses[decode(x)],
        DIM,
        # in the middle of the lists, the activation undecided
        start=(1.0, 1.5, 1.0, 0.5, 0.5, 0.5, 0.5),
        minima=[[*map(float, places), *named]],
        minimum=float(losses.min()),
        bounds=(-0.5, 3.5),
        title="Choice of architecture",
        formula=f"validation loss of one of {len(CHOICES)} nets after {steps} steps",
        source="ours; tabular as NAS-Bench-101 (Ying et al. 2019)",
    )


def _train(depth: int, width: int, activation: str, steps: int) -> Tensor:
    """Mean squared errors on the validation half ``[rates]``: all rates and repeats are trained side by side."""
    x, y = _data()
    sizes, stream = [2, *[width] * depth, 1], generator(0, "architecture", depth, width)
    many, rate = REPEATS * len(RATES), torch.tensor(RATES, dtype=torch.float64).repeat_interleave(REPEATS)
    weights: list[Tensor] = []
    for m, n in itertools.pairwise(sizes):
        drawn = torch.randn(REPEATS, m, n, generator=stream, dtype=torch.float64) / math.sqrt(m)
        weights += [drawn.repeat(len(RATES), 1, 1), torch.zeros(many, 1, n, dtype=torch.float64)]

    def errors(half: slice) -> Tensor:
        hidden = x[half].expand(many, -1, -1)
        for number in range(0, len(weights), 2):
            if number:
                hidden = ACTIVATIONS[activation](hidden)
            hidden = torch.baddbmm(weights[number + 1], hidden, weights[number])
        return (hidden.squeeze(-1) - y[half]).square().mean(1)

    for weight in weights:
        weight.requires_grad_()
    # Adam at rate 1 on every net's own weights: the rate of each is applied to what it has moved
    optimizer = torch.optim.Adam(weights, lr=1.0)
    for _ in range(steps):
        with torch.enable_grad():
            gradients = torch.autograd.grad(errors(slice(0, 64)).sum(), weights)
        before = [weight.detach().clone() for weight in weights]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old + rate.view(-1, 1, 1) * (weight - old))
    with torch.no_grad():
        return errors(slice(64, None)).view(len(RATES), REPEATS).mean(1)


@functools.cache
def _data() -> tuple[Tensor, Tensor]:
    """128 points ``[128, 2]`` and a noisy ripple over them ``[128]``."""
    stream = generator(0, "architecture", "data")
    x = 4 * torch.rand(128, 2, generator=stream, dtype=torch.float64) - 2
    noise = torch.randn(128, generator=stream, dtype=torch.float64)
    return x, (2 * x[:, 0]).sin() * x[:, 1].cos() + 0.05 * noise

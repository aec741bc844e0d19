"""The small training run on which optimizers are checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from steppe.core.seeding import generator
from steppe.core.spec import Spec
from steppe.optim.registry import create

__all__ = ["Check", "ConformanceError", "Rig", "quiet", "require", "same"]

Check: TypeAlias = Callable[[Spec, Mapping[str, Any]], None]
"""A check takes an optimizer and the keyword arguments of one demo, and raises a `ConformanceError`."""


class ConformanceError(AssertionError):
    """An optimizer does not hold what every optimizer has to hold."""


def require(condition: bool, message: str) -> None:
    """Raise a `ConformanceError` unless `condition`."""
    if not condition:
        raise ConformanceError(message)


class Rig:
    """One optimizer on one small regression problem, always the same: 26 weights, two batches of four samples.

    Args:
        spec: the optimizer.
        demo: its keyword arguments.
        dtype: of weights and data; complex ones too.
        split: number of parameter groups.
    """

    def __init__(
        self, spec: Spec, demo: Mapping[str, Any], dtype: torch.dtype = torch.float64, split: int = 1
    ) -> None:
        stream = generator(0, "conformance")
        wide = torch.complex128 if dtype.is_complex else torch.float64
        # not initialised by torch, which would draw from the global generator
        first, second = (nn.utils.skip_init(nn.Linear, *size, dtype=dtype) for size in ((3, 4), (4, 2)))
        self.model = nn.Sequential(first, nn.Tanh(), second)
        with torch.no_grad():
            for param in self.model.parameters():
                param.copy_(torch.randn(param.shape, generator=stream, dtype=wide) / 2)
        self.inputs = torch.randn(2, 4, 3, generator=stream, dtype=wide).to(dtype)
        self.targets = torch.randn(2, 4, 2, generator=stream, dtype=wide).to(dtype)
        named = list(self.model.named_parameters())
        groups = [{"params": named[i::split]} for i in range(split)]
        self.optimizer: Any = create(spec, groups if split > 1 else iter(named), **demo)
        self.steps = 0
        self.passes = 0

    def backward(self, part: slice = slice(None)) -> Tensor:
        """Add the gradient of the present batch (or of a part of it, with its share of the mean) to ``.grad``."""
        x, y = self.inputs[self.steps % 2], self.targets[self.steps % 2]
        self.passes += 1
        loss = (self.model(x[part]) - y[part]).abs().square().sum() / len(x)
        loss.backward()
        return loss.detach()

    def closure(self) -> Tensor:
        """Torch's closure: zero, forward, backward, loss."""
        self.optimizer.zero_grad()
        return self.backward()

    def train(self, steps: int, closure: Callable[[], Any] | None = None) -> Any:
        """Take steps over alternating batches; returns what the last one returned."""
        loss = None
        for _ in range(steps):
            loss = self.optimizer.step(closure or self.closure)
            self.steps += 1
        return loss

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The parameters by name: 0.weight, 0.bias, 2.weight, 2.bias."""
        return dict(self.model.named_parameters())

    def weights(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [param.detach().clone() for param in self.model.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Equal to the bit, signs of zero included."""
    return all(
        a.dtype == b.dtype and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
        for a, b in zip(first, second, strict=True)
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that an optimizer may give where a check provokes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield

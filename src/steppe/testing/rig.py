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
from steppe.optim.sharpness.passes import Pass

__all__ = ["Check", "ConformanceError", "Rig", "passes_of_a_step", "quiet", "require", "same"]

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
        if hasattr(self.optimizer, "train"):  # it trains at other weights than it evaluates
            self.optimizer.train()
        self.steps = 0
        self.passes = 0

    def backward(self, p: Pass | None = None, part: slice = slice(None)) -> Tensor:
        """Add the gradient of the present batch (or of a part of it, with its share of the mean) to ``.grad``.

        An optimizer whose closure takes the pass gets what that asks for.
        """
        x, y = self.inputs[self.steps % 2], self.targets[self.steps % 2]
        if p is not None and self.takes_pass:
            self.passes += p.gradient
            outputs = self.model(x[p.samples])
            loss = p.mean((outputs - y[p.samples]).abs().square().sum(dim=1), outputs)
            if p.gradient:
                loss.backward()
            return loss.detach()
        self.passes += 1
        loss = (self.model(x[part]) - y[part]).abs().square().sum() / len(x)
        loss.backward()
        return loss.detach()

    def closure(self, p: Pass | None = None) -> Tensor:
        """Torch's closure: zero, forward, backward, loss."""
        self.optimizer.zero_grad()
        return self.backward(p)

    @property
    def takes_pass(self) -> bool:
        """Whether the closure is called with the pass."""
        return bool(getattr(self.optimizer, "closure_takes_pass", False))

    def train(self, steps: int, closure: Callable[[], Any] | None = None) -> Any:
        """Take steps over alternating batches; returns what the last one returned."""
        loss = None
        for _ in range(steps):
            self.tell()
            loss = self.optimizer.step(closure or self.closure)
            self.steps += 1
        return loss

    def tell(self) -> None:
        """Tell an optimizer that treats some samples apart which they are."""
        if hasattr(self.optimizer, "tail"):
            self.optimizer.tail = torch.tensor([False, True, False, True])

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The parameters by name: 0.weight, 0.bias, 2.weight, 2.bias."""
        return dict(self.model.named_parameters())

    def weights(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [param.detach().clone() for param in self.model.parameters()]


def passes_of_a_step(spec: Spec, demo: Mapping[str, Any], after: int = 3) -> list[Pass]:
    """What the optimizer asks for in the step that follows `after` steps."""
    rig = Rig(spec, demo)
    rig.train(after)
    rig.tell()
    asked = []
    for p in rig.optimizer.passes():
        asked.append(p)
        with torch.set_grad_enabled(p.gradient):
            rig.backward(p)
    return asked


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

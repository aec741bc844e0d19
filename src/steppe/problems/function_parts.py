"""A function, or a small learning problem, as a problem that optimizers are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.core.flat import assign, flatten
from steppe.problems.cart_pole import Player
from steppe.problems.function import Function
from steppe.problems.small import Small

__all__ = ["FunctionPart", "Point", "SmallPart"]


class Point(nn.Module):
    """The variables of a function, ``x [dim]``, as a module."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.clone())

    def forward(self) -> Tensor:
        """The variables."""
        return self.x


class _Part:
    """What functions and small problems share as a `steppe.problems.problem.Problem`."""

    def __init__(
        self, task: Function | Small, start: Iterable[float] | None, steps: int, spread: float
    ) -> None:
        self.task, self.steps, self.spread = task, steps, spread
        self.start = torch.as_tensor(task.start if start is None else tuple(start), dtype=torch.float64)
        if self.start.shape != (task.dim,):
            raise SpecError(
                f"problem.start.{task.name}: need {task.dim} numbers, one per variable, got {self.start.numel()}."
            )

    @property
    def watch(self) -> tuple[str, int]:
        """The loss, which is to be small."""
        return "value", -1

    @property
    def identity(self) -> Mapping[str, Any]:
        """Name, start and steps; the data of small problems follow from the name."""
        return {
            "kind": "functions",
            "name": self.task.name,
            "start": self.start.tolist(),
            "steps": self.steps,
            "spread": self.spread,
        }

    @property
    def output_identity(self) -> Mapping[str, Any]:
        """Nothing: the outputs are the weights."""
        return {}

    def initial(self, generator: torch.Generator) -> Tensor:
        """The weights ``[dim]`` that training begins with."""
        noise = torch.randn(self.task.dim, dtype=torch.float64, generator=generator)
        return self.start + self.spread * noise

    def value(self, model: nn.Module) -> float:
        """The loss over all there is."""
        raise NotImplementedError

    def metrics(self, model: nn.Module, split: str) -> dict[str, float]:
        """``value``, and of two weights ``x0`` and ``x1``: where the path is."""
        scores = {"value": self.value(model)}
        if self.task.dim == 2:
            weights = flatten(model.parameters())
            scores |= {"x0": float(weights[0]), "x1": float(weights[1])}
        return scores

    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights ``[dim]``."""
        return {"x": flatten(model.parameters())}


class FunctionPart(_Part):
    """A function as a problem: its weights are the variables, its batch the step's shift of them, if there is noise."""

    task: Function

    @property
    def samples(self) -> int:
        """A step counts as one."""
        return self.steps

    def model(self, generator: torch.Generator) -> Point:
        """The start."""
        return Point(self.initial(generator))

    def loss(self, model: nn.Module, batch: Tensor | None) -> Tensor:
        """The function's value."""
        x: Tensor = model()
        return self.task.fn(x if batch is None else x - batch)

    def batches(self, generator: torch.Generator) -> Iterator[Tensor | None]:
        """As many as an epoch has steps; of a function with noise each is a shift ``[dim]``."""
        for _ in range(self.steps):
            if self.task.noise:
                shift = torch.randn(self.task.dim, dtype=torch.float64, generator=generator)
                yield self.task.noise * shift
            else:
                yield None

    def full(self, split: str) -> list[None]:
        """One batch, without noise."""
        return [None]

    @torch.no_grad()
    def value(self, model: nn.Module) -> float:
        """The loss over all there is."""
        return float(self.loss(model, None))


class SmallPart(_Part):
    """A small learning problem as a problem; `steps` batches are an epoch, however many passes that is."""

    task: Small

    @property
    def samples(self) -> int:
        """Samples that the steps of an epoch see."""
        return self.steps * (self.task.batch or len(self.task.x))

    def model(self, generator: torch.Generator) -> nn.Module:
        """The model at the start."""
        model = self.task.model()
        assign(list(model.parameters()), self.initial(generator))
        return model

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean loss of a batch ``(x, y)``."""
        return self.task.loss(model, batch)

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """As many as an epoch has steps, in passes over the samples."""
        count = 0
        while True:
            for batch in self.task.batches(generator):
                if count == self.steps:
                    return
                yield batch
                count += 1

    def full(self, split: str) -> Iterable[tuple[Tensor, Tensor]]:
        """All samples."""
        return self.task.full()

    @torch.no_grad()
    def value(self, model: nn.Module) -> float:
        """The loss over all there is."""
        return float(self.loss(model, (self.task.x, self.task.y)))

    @torch.no_grad()
    def metrics(self, model: nn.Module, split: str) -> dict[str, float]:
        """Also ``accuracy``, of classifiers, and ``return``, of cart-pole."""
        scores = super().metrics(model, split)
        if isinstance(model, Player):
            scores |= model.scores(self.task.x)
        if self.task.labels:
            right = (model(self.task.x) > 0) == (self.task.y > 0.5)
            scores["accuracy"] = float(right.double().mean())
        return scores

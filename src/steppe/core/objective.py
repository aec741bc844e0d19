"""The closure every optimizer is given, and what calling it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Cost", "Objective"]


@dataclass
class Cost:
    """Model evaluations so far, counted where they happen.

    Attributes:
        forward: evaluations of the loss alone.
        gradient: evaluations of the gradient (one forward and one backward pass over the batch).
    """

    forward: int = 0
    gradient: int = 0


class Objective:
    """The loss of one batch as a function of the model's weights: a closure in torch's meaning, and more.

    Repeated calls inside one optimizer step see the same batch.

    Args:
        model: the module whose parameters are trained.
        loss: ``loss(model, batch) -> scalar mean``.
        batch: what `loss` takes; held for the life of the objective.
        cost: the counter to add to; a fresh one if omitted.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, cost: Cost | None = None
    ) -> None:
        self.model, self.loss, self.batch = model, loss, batch
        self.cost = Cost() if cost is None else cost

    def __call__(self) -> Tensor:
        """Zero the gradients, run forward and backward, return the detached loss."""
        self.model.zero_grad()
        self.cost.gradient += 1
        with torch.enable_grad():
            loss = self.loss(self.model, self.batch)
            loss.backward()
        return loss.detach()

    def value(self) -> Tensor:
        """The loss alone; ``.grad`` is not touched."""
        self.cost.forward += 1
        with torch.no_grad():
            return self.loss(self.model, self.batch)

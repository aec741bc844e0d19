"""The closure every optimizer is given, and what calling it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.overrides import TorchFunctionMode

from steppe.core.flat import assign, flatten

__all__ = ["Cost", "Objective"]

BACKWARD = 2
"""Forward passes that a backward pass counts as: two products per layer against one."""

FEW = 5
"""Weight vectors below which the fixed cost of vmap (0.2 to 0.5 ms) is more than it saves."""

LARGEST = 3 * 2**20
"""Bytes of the largest intermediate result over a chunk of weight vectors: what stays in the cache."""


@dataclass
class Cost:
    """Model evaluations so far, counted where they happen.

    Attributes:
        forward: evaluations of the loss alone.
        gradient: evaluations of the gradient (one forward and one backward pass over the batch).
    """

    forward: int = 0
    gradient: int = 0

    @property
    def evaluations(self) -> int:
        """Both in forward passes, in which budgets are counted: a gradient is worth three."""
        return self.forward + (1 + BACKWARD) * self.gradient


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

    @property
    def parameters(self) -> list[Tensor]:
        """The trainable parameters of the model: what the flat vector of `values` is made of, in its order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def values(self, theta: Tensor) -> Tensor:
        """The losses ``[population]`` at the rows of ``theta [population, dim]``; the model keeps its weights.

        Rows are evaluated together (`torch.func.vmap`) where model and loss allow it, one after the other where they
        do not: ``nn.GRU``, batch normalisation in training, a loss that leaves torch or that reads a parameter other
        than through the model. The first call for a model finds out which, by one more evaluation that is not
        counted. Both ways agree within rounding. What is random in the loss is drawn once and is the same for every
        row, so that rows differ by their weights alone.

        Raises:
            ValueError: a row of `theta` is longer or shorter than the trainable parameters together.
        """
        parameters = self.parameters
        dim = sum(parameter.numel() for parameter in parameters)
        if theta.dim() != 2 or theta.shape[1] != dim:
            raise ValueError(f"need weights of shape [population, {dim}], got {list(theta.shape)}")
        self.cost.forward += len(theta)
        if len(theta) < FEW or _ROWS.get(self.model) == 0:
            return self._one_by_one(theta)
        if self.model not in _ROWS:
            return self._tried(theta)
        return self._together(theta, _ROWS[self.model])

    def _tried(self, theta: Tensor) -> Tensor:
        """`values` of a model that has not been evaluated before; remembers how it can be."""
        start = _streams(self.parameters)
        with _Largest() as seen:
            reference = self._one_by_one(theta[-1:])
        _rewind(start)
        rows = max(1, LARGEST // max(seen.bytes, 1))
        try:
            losses = self._together(theta, rows)
            right = torch.allclose(losses[-1:], reference, rtol=_tolerance(reference), equal_nan=True)
        except Exception:  # whatever vmap cannot do; an error of the loss itself comes again below
            right = False
        if right:
            _ROWS[self.model] = rows
            return losses
        _ROWS[self.model] = 0
        _rewind(start)
        return self._one_by_one(theta)

    def _together(self, theta: Tensor, rows: int) -> Tensor:
        places = _places(self.model)
        stacks = [
            part.reshape(-1, *parameter.shape).to(parameter)
            for parameter, part in zip(
                places, theta.split([parameter.numel() for parameter in places], dim=1), strict=True
            )
        ]

        def loss(*weights: Tensor) -> Tensor:
            for weight, at in zip(weights, places.values(), strict=True):
                for module, name in at:
                    module._parameters[name] = weight  # type: ignore[assignment]
            return self.loss(self.model, self.batch)

        start = _streams(places)
        losses = []
        try:
            for first in range(0, len(theta), rows):
                _rewind(start)
                chunk = [stack[first : first + rows] for stack in stacks]
                losses.append(vmap(loss, randomness="same")(*chunk))
        finally:
            for parameter, at in places.items():
                for module, name in at:
                    module._parameters[name] = parameter
        return torch.cat(losses)

    def _one_by_one(self, theta: Tensor) -> Tensor:
        parameters = self.parameters
        before = flatten(parameters)
        start = _streams(parameters) if len(theta) > 1 else {}
        losses = []
        try:
            for row in theta:
                _rewind(start)
                assign(parameters, row)
                losses.append(torch.as_tensor(self.loss(self.model, self.batch)).detach())
        finally:
            assign(parameters, before)
        return torch.stack(losses)


_ROWS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Weight vectors that a model is evaluated with together; 0 where it has to be one by one. An objective lives for one
step, a model for all."""


def _places(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Each trainable parameter, in the order of `Objective.parameters`, and where it stands (tied: more than once).

    `torch.func.functional_call` finds this out several times a call, which takes longer than a small model's loss.
    """
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                places.setdefault(parameter, []).append((module, name))
    return places


class _Largest(TorchFunctionMode):
    """Measures the largest tensor that torch functions return."""

    bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def _tolerance(losses: Tensor) -> float:
    return float(torch.finfo(losses.dtype).eps ** 0.5) if losses.is_floating_point() else 0.0


def _streams(parameters: Iterable[Tensor]) -> dict[torch.device, Tensor]:
    """The states of torch's global generators that a loss over these parameters may draw from."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in {parameter.device for parameter in parameters if parameter.is_cuda}:
        states[device] = torch.cuda.get_rng_state(device)
    return states


def _rewind(states: dict[torch.device, Tensor]) -> None:
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)

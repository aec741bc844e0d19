"""One client's local training: gradients of its batches, and SGD on the direction that a method makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steppe.core.objective import Cost, Objective
from steppe.optim.federated.vector import Vector

__all__ = ["Local", "Noise", "buffers_of", "set_buffers", "weights_of"]


def weights_of(model: nn.Module) -> Vector:
    """The trained parameters of `model` themselves."""
    return Vector(p for p in model.parameters() if p.requires_grad)


def buffers_of(model: nn.Module) -> list[Tensor]:
    """Copies of the buffers of `model`."""
    return [buffer.clone() for buffer in model.buffers()]


def set_buffers(model: nn.Module, values: Iterable[Tensor]) -> None:
    """Overwrite the buffers of `model`."""
    for buffer, value in zip(model.buffers(), values, strict=True):
        buffer.copy_(value)


class Noise:
    """torch's global generators (CPU, CUDA), lent to the clients.

    What a client draws (a loader's order, dropout) is a function of the seeds given here, not of what ran before.

    Args:
        model: its parameters' devices are those whose generators are lent.
    """

    def __init__(self, model: nn.Module) -> None:
        cards = {p.get_device() for p in model.parameters() if p.is_cuda}
        self._generators = [
            torch.default_generator,
            *(torch.cuda.default_generators[i] for i in sorted(cards)),
        ]

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """On leaving, the generators are as they were."""
        states = [generator.get_state() for generator in self._generators]
        try:
            yield
        finally:
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)

    def seed(self, value: int) -> None:
        """Start the stream `value`."""
        for generator in self._generators:
            generator.manual_seed(value)


class Local:
    """The local training of one client in one round, as a method sees it.

    Attributes:
        weights: w_k: the model's parameters, changed in place by every local step.
        lr: the round's learning rate.
        steps: K, the local steps taken so far.
        update: w_i − w^t, there once local training has ended.
        losses: the loss of each step's batch at w_k.
        noise: the generators that the client draws from.
    """

    update: Vector

    def __init__(
        self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], lr: float, cost: Cost, noise: Noise
    ) -> None:
        self.weights = weights_of(model)
        self.lr, self.steps = lr, 0
        self.losses: list[Tensor] = []
        self._model, self._loss, self._cost, self.noise = model, loss, cost, noise

    def begin(self, batch: Any, seed: int) -> None:
        """Start a local step on `batch`; all its passes see the noise of `seed`."""
        self._objective, self._seed = Objective(self._model, self._loss, batch, self._cost), seed

    def gradient(self, e: Vector | None = None) -> Vector:
        """∇L of the step's batch at w_k, or at w_k + e. One pass; the result's memory is the caller's to overwrite.

        Weights and buffers come back bit for bit from w_k + e: running statistics are those of the clean passes. A
        parameter without a gradient counts as one with gradient zero.
        """
        self.noise.seed(self._seed)
        if e is None:
            self.losses.append(self._objective())
            return self._collected()
        w, buffers = self.weights.copy(), buffers_of(self._model)
        self.weights += e
        del e  # its memory is free for the pass, if the caller has let go of it
        self._objective()
        self.weights.fill(w)
        set_buffers(self._model, buffers)
        return self._collected()

    def step(self, direction: Vector, clip: float | None, decay: float) -> None:
        """One step of SGD: w_k ← w_k − lr · (clipped direction + decay · w_k). `direction` is overwritten.

        Raises:
            NotFinite: the direction is not finite.
        """
        norm = direction.norm()
        if clip is not None and norm + 1e-6 > clip:  # as torch.nn.utils.clip_grad_norm_
            direction *= clip / (norm + 1e-6)
        if decay:
            direction.add(self.weights, decay)
        self.weights.add(direction, -self.lr)
        self.steps += 1

    def _collected(self) -> Vector:
        grads = []
        for param in self.weights.tensors:
            grad = param.grad
            if grad is None:
                grad = torch.zeros_like(param)
            grads.append(grad if grad.layout == torch.strided else grad.to_dense())
        return Vector(grads)

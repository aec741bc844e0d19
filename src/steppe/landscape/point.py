"""`Point`: a trained model with the loss and the data it is looked at with; what a measurement says and costs."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steppe.core.errors import DataError
from steppe.core.flat import assign, flatten

__all__ = ["Cost", "Measurement", "Point", "map_tensors", "samples_of"]


@dataclass(frozen=True)
class Cost:
    """Evaluations in passes over all data of a point; a batch counts by its share.

    Attributes:
        forward: of the loss alone.
        gradient: of the gradient. A Hessian-vector product counts as two, whatever its method.
    """

    forward: float = 0.0
    gradient: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.gradient + other.gradient)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.forward - other.forward, self.gradient - other.gradient)


@dataclass(frozen=True)
class Measurement:
    """A number that was measured at a point.

    Attributes:
        value: the number.
        stderr: its standard error over what was drawn at random; NaN where nothing was.
        converged: whether the method met its own stopping rule.
        cost: what it took.
        note: in words, what a reader must know, or empty.
    """

    value: float
    stderr: float
    converged: bool
    cost: Cost
    note: str = ""


class Point:
    """A trained model, and its loss over fixed batches as a function of the flat vector of trainable weights.

    The model is in eval mode during each call and back in its own modes afterwards; weights and ``.grad`` are left as
    they were, bit for bit, also after an exception. Batches are kept, in order.

    Args:
        model: the module to look at, on any device.
        loss: ``loss(model, batch) -> scalar``, a mean over the batch.
        batches: can be gone through twice with the same result: a list, or a loader that does not shuffle.
        weights: each batch's share of the whole loss, up to a factor; by default its number of samples (the length of
            its first tensor). Give equal ones for losses that are one number per batch, such as a cross-section's IC.

    Raises:
        DataError: two passes disagree, a loss is not a finite scalar, or the default weights would not give the mean
            over all samples. The message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor],
        batches: Iterable[Any],
        *,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.model, self.loss = model, loss
        self.batches = list(batches)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not self.batches or not named:
            raise DataError(
                f"a point needs {'batches' if named else 'trainable parameters'}: there are none."
            )
        self.names = [name for name, _ in named]
        self.params = [p for _, p in named]
        self.dim = sum(p.numel() for p in self.params)
        self.recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
        self._forward = self._gradient = 0.0
        sizes = [samples_of(batch) for batch in self.batches]
        given = sizes if weights is None else [float(w) for w in weights]
        if len(given) != len(sizes) or min(given) < 0 or not 0 < sum(given) < float("inf"):
            raise DataError(f"need {len(sizes)} weights >= 0, one per batch, not all 0; got {given}.")
        self.shares = [w / sum(given) for w in given]
        self._check(batches)
        if weights is None and len(set(sizes)) > 1:
            self._check_ragged(sizes)

    @classmethod
    def from_loader(
        cls, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], loader: Iterable[tuple[Any, Any]]
    ) -> Point:
        """The mean of ``loss_fn(model(inputs), target)`` over a loader of pairs, moved to the model's device.

        Raises:
            DataError: as the class; also, a loader that shuffles.
        """
        device = next(model.parameters()).device
        return cls(model, functools.partial(_pair_loss, loss_fn), _Moved(loader, device))

    @property
    def theta(self) -> Tensor:
        """The present weights, ``[dim]``, a copy."""
        return flatten(self.params)

    @property
    def cost(self) -> Cost:
        """All that was evaluated so far, the two passes on construction included; take differences."""
        return Cost(self._forward, self._gradient)

    def charge(self, *, forward: float = 0.0, gradient: float = 0.0) -> None:
        """Count evaluations that do not go through `value` and `gradient`."""
        self._forward += forward
        self._gradient += gradient

    @contextmanager
    def at(self, theta: Tensor | None) -> Iterator[None]:
        """The weights are ``theta [dim]`` inside (None: unchanged), and what they were, bit for bit, afterwards."""
        if theta is None:
            yield
            return
        kept = [p.detach().clone() for p in self.params]
        try:
            assign(self.params, theta)
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.params, kept, strict=True):
                    p.copy_(value)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model in eval mode; cuDNN off for recurrent nets, whose gradients it refuses in that mode."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        on_gpu = self.params[0].device.type == "cuda"
        context: AbstractContextManager[Any] = (
            torch.backends.cudnn.flags(enabled=False) if self.recurrent and on_gpu else nullcontext()
        )
        try:
            with context:
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def chosen(self, batch: int | None) -> list[tuple[float, Any]]:
        """(weight in the mean, batch) of all batches, or of the one asked for with weight 1."""
        if batch is None:
            return list(zip(self.shares, self.batches, strict=True))
        return [(1.0, self.batches[batch])]

    def value(self, theta: Tensor | None = None, batch: int | None = None) -> float:
        """The loss at ``theta [dim]`` (default: the present weights), over all batches or the batch of that number."""
        self.charge(forward=1.0 if batch is None else self.shares[batch])
        with self.at(theta), self.evaluating(), torch.no_grad():
            return sum(share * float(self.loss(self.model, b)) for share, b in self.chosen(batch))

    def gradient(self, theta: Tensor | None = None, batch: int | None = None) -> tuple[float, Tensor]:
        """The loss as `value`, and its gradient ``[dim]``; ``.grad`` is not touched."""
        self.charge(gradient=1.0 if batch is None else self.shares[batch])
        total, gradient = 0.0, torch.zeros_like(flatten(self.params))
        with self.at(theta), self.evaluating(), torch.enable_grad():
            for share, b in self.chosen(batch):
                loss = self.loss(self.model, b)
                parts = torch.autograd.grad(loss, self.params, materialize_grads=True)
                gradient.add_(flatten(parts), alpha=share)
                total += share * loss.item()
        return total, gradient

    def _losses(self, batches: Iterable[Any]) -> list[float]:
        self.charge(forward=1.0)
        losses = []
        with self.evaluating(), torch.no_grad():
            for i, batch in enumerate(batches):
                loss = self.loss(self.model, batch)
                if loss.numel() != 1 or not torch.isfinite(loss).all():
                    got = loss.item() if loss.numel() == 1 else f"shape {list(loss.shape)}"
                    raise DataError(f"the loss of batch {i} must be one finite number, got {got}.")
                losses.append(loss.item())
        return losses

    def _check(self, batches: Iterable[Any]) -> None:
        """Two passes, the second over the batches read anew, must agree bit for bit and leave the buffers alone."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        first, second = self._losses(self.batches), self._losses(batches)
        for name, buffer in self.model.named_buffers():
            if name in buffers and not torch.equal(buffer, buffers[name]):
                raise DataError(
                    f"evaluating the loss changes the buffer {name!r}: a normalisation that keeps running statistics "
                    "stays in training mode although model.eval() was called."
                )
        if first == second:
            return
        if not second:
            raise DataError("the batches can be read only once (an iterator): give a list of them.")
        if self._losses(self.batches) == first:
            raise DataError(
                f"two passes over the batches give different losses ({first[:3]} ..., then {second[:3]} ...) though "
                "the model repeats itself on the same batch: the loader shuffles or augments. Give it in a fixed "
                "order, or a list."
            )
        raise DataError(
            f"the same batches give different losses ({first[:3]} ..., then {second[:3]} ...) although model.eval() "
            "was called: dropout that ignores it (functional dropout with training=True?), other noise in the model, "
            "or a device operation that is not deterministic (torch.use_deterministic_algorithms(True))."
        )

    def _check_ragged(self, sizes: list[int]) -> None:
        """Weights by size are right only for a mean over samples: the largest batch must be the mean of its halves."""
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        batch, half = self.batches[largest], sizes[largest] // 2
        ends = (slice(None, half), slice(half, None))
        if {len(t) if t.dim() else 0 for t in _tensors(batch)} == {sizes[largest]} and half:
            parts = [map_tensors(batch, operator.itemgetter(rows)) for rows in ends]
            whole, one, two = self._losses([batch, *parts])
            mean = (half * one + (sizes[largest] - half) * two) / sizes[largest]
            if abs(whole - mean) <= 1e-4 * max(abs(one), abs(two), abs(whole)):
                return
        raise DataError(
            f"batches hold from {min(sizes)} to {max(sizes)} samples, and the loss is not seen to be a mean over "
            "samples, so their shares in the whole loss are unknown: give weights=, or batches of one size."
        )


class _Moved:
    """A loader's batches on a device, as often as they are asked for."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[Any]:
        return (map_tensors(batch, lambda t: t.to(self.device)) for batch in self.loader)


def _pair_loss(loss_fn: Callable[[Any, Any], Tensor], model: nn.Module, batch: tuple[Any, Any]) -> Tensor:
    inputs, target = batch
    return loss_fn(model(inputs), target)


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The batch with each of its tensors replaced; anything else in it is kept."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(value, function) for value in batch)
    return batch


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def see(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, see)
    return found


def samples_of(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor; 1 where it holds none."""
    first = next(iter(_tensors(batch)), None)
    return len(first) if first is not None and first.dim() else 1

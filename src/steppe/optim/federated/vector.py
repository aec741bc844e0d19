"""Vectors over all trained weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["NotFinite", "Vector"]


class NotFinite(Exception):
    """A client's gradient or weights hold a number that is not finite."""


class Vector:
    """One tensor per trained parameter; every operation is a few foreach kernels, whatever their number.

    ``+=``, ``-=``, ``*=`` and `add` write in place.
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)

    def copy(self) -> Vector:
        """A vector of the same numbers in memory of its own."""
        return Vector(tensor.detach().clone() for tensor in self.tensors)

    def zeros(self) -> Vector:
        """The zero vector of the same shapes."""
        return Vector(torch.zeros_like(tensor, requires_grad=False) for tensor in self.tensors)

    def on(self, device: torch.device | str | None) -> Vector:
        """This vector on `device`; None for where it is."""
        return self if device is None else Vector(tensor.to(device) for tensor in self.tensors)

    def fill(self, other: Vector) -> None:
        """Overwrite with the numbers of `other`."""
        torch._foreach_copy_(self.tensors, other.tensors)

    def add(self, other: Vector, factor: float) -> Vector:
        """Add ``factor · other`` in place; returns self."""
        torch._foreach_add_(self.tensors, other.tensors, alpha=factor)
        return self

    def __iadd__(self, other: Vector) -> Vector:
        return self.add(other, 1)

    def __isub__(self, other: Vector) -> Vector:
        return self.add(other, -1)

    def __imul__(self, factor: float) -> Vector:
        torch._foreach_mul_(self.tensors, factor)
        return self

    def norm(self) -> float:
        """‖·‖ over all tensors, in float32 or better.

        Raises:
            NotFinite: it is not finite.
        """
        norms = torch._foreach_norm(self.tensors)
        widest = functools.reduce(torch.promote_types, [norm.dtype for norm in norms], torch.float32)
        total = torch.stack([norm.to(norms[0].device, widest) for norm in norms]).norm().item()
        if not math.isfinite(total):
            raise NotFinite
        return total

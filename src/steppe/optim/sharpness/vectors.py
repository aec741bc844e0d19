"""Vectors over all parameters of a step, in lists that the foreach kernels take whole.

A `Vector` holds one list of tensors per `Bucket` (parameters that share group, dtype and device), so a rule that
differs between groups is one number per bucket, and the number of kernel launches does not depend on the number of
tensors. Lengths and cosines are Python floats: one transfer from the device each.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["Bucket", "Vector", "combine", "cosine", "difference", "duplicate"]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters that one foreach call can treat alike.

    Attributes:
        group: their entry in ``param_groups``.
        params: the parameters.
        indices: their positions over all groups, the keys of ``state_dict()["state"]``.
        trait: what else they share, see `SharpnessAware.trait`.
    """

    group: dict[str, Any]
    params: list[Tensor]
    indices: list[int]
    trait: Hashable


class Vector:
    """One tensor per parameter: ``tensors[b][i]`` belongs to ``buckets[b].params[i]``."""

    def __init__(self, tensors: list[list[Tensor]]) -> None:
        self.tensors = tensors

    @cached_property
    def norm(self) -> float:
        """2-norm over all tensors, accumulated in their own precision; 0 for no tensors.

        It is finite exactly when every number is: where squares overflow, the tensors are scaled down first.
        """
        norm = self._norm(2)
        if norm != math.inf:
            return norm
        largest = self._norm(math.inf)
        if largest == math.inf:
            return largest
        return largest * Vector([list(torch._foreach_mul(xs, 1 / largest)) for xs in self.tensors]).norm

    def _norm(self, order: float) -> float:
        norms = [norm for xs in self.tensors for norm in torch._foreach_norm(xs, order)]
        if not norms:
            return 0.0
        return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), order).item()


def combine(x: Vector, a: Sequence[float], y: Vector, b: Sequence[float]) -> Vector:
    """The vector a·x + b·y with one a and one b per bucket, written over x, which must not be used afterwards."""
    for xs, ys, each_a, each_b in zip(x.tensors, y.tensors, a, b, strict=True):
        torch._foreach_mul_(xs, each_a)
        torch._foreach_add_(xs, ys, alpha=each_b)
    return Vector(x.tensors)


def difference(x: Vector, y: Vector) -> Vector:
    """The vector x − y."""
    return Vector([list(torch._foreach_sub(xs, ys)) for xs, ys in zip(x.tensors, y.tensors, strict=True)])


def cosine(x: Vector, y: Vector) -> float:
    """Re⟨x, y⟩ / (‖x‖‖y‖), and 0 where one of them vanishes.

    From ‖x̂ + ŷ‖² = 2 + 2 cos: there is no foreach kernel for inner products.
    """
    if min(x.norm, y.norm) < 1e-30:
        return 0.0
    total = Vector([list(torch._foreach_mul(xs, 1 / x.norm)) for xs in x.tensors])
    for sums, ys in zip(total.tensors, y.tensors, strict=True):
        torch._foreach_add_(sums, ys, alpha=1 / y.norm)
    return total.norm**2 / 2 - 1


def duplicate(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Bit-exact copies, or copies cast to `dtype`."""
    copies = [torch.empty_like(tensor, dtype=dtype, requires_grad=False) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies

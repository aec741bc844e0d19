"""Vectors over all parameters of a step, in lists that the foreach kernels take whole.

A `Vector` holds one list of tensors per `Bucket` (parameters that share group, dtype, device and layout over ranks),
so a rule that differs between groups is one number per bucket, and the number of kernel launches does not depend on
the number of tensors. Lengths and cosines are Python floats: one transfer from the device each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, distributed as dist

__all__ = ["TINY", "Bucket", "Vector", "combine", "cosine", "difference", "duplicate", "unit_sum"]

TINY = 1e-30
"""A vector that is shorter has no direction."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters that one foreach call can treat alike.

    Attributes:
        group: their entry in ``param_groups``.
        owners: the parameters.
        params: what is computed with: the parameters, or the shards that this rank holds of them.
        indices: their positions over all groups, the keys of ``state_dict()["state"]``.
        trait: what else they share, see `SharpnessAware.trait`.
        ranks: process groups over which the parameters are sharded; none where every rank has them whole.
        spare: where the CPU keeps the memory of `copied` from step to step.
    """

    group: dict[str, Any]
    owners: list[Tensor]
    params: list[Tensor]
    indices: list[int]
    trait: Hashable = None
    ranks: tuple[Any, ...] = ()
    spare: list[Tensor] = field(default_factory=list, repr=False)

    def is_like(self, other: Bucket) -> bool:
        """Whether one can stand for the other."""
        return (
            self.group is other.group
            and self.indices == other.indices
            and self.trait == other.trait
            and not self.ranks
            and all(
                spare.dtype == param.dtype for spare, param in zip(other.spare, self.params, strict=False)
            )
        )

    def copied(self) -> list[Tensor]:
        """A copy of the parameters, good until the next call.

        A GPU's allocator gives memory back in no time; on a CPU new pages would cost several times the copying.
        """
        if self.params[0].device.type != "cpu":
            return duplicate(self.params)
        if not self.spare:
            self.spare.extend(duplicate(self.params))
        else:
            torch._foreach_copy_(self.spare, self.params)
        return self.spare

    def total(self, values: Tensor, order: float = 2) -> Tensor:
        """Norms of what this rank holds -> norms of the whole, elementwise."""
        for ranks in self.ranks:
            values = values.clone() if order == math.inf else values.square()
            dist.all_reduce(values, dist.ReduceOp.MAX if order == math.inf else dist.ReduceOp.SUM, ranks)
            values = values if order == math.inf else values.sqrt()
        return values


class Vector:
    """One tensor per parameter: ``tensors[b][i]`` belongs to ``buckets[b].params[i]``.

    Attributes:
        disposable: whether nobody needs it any more, so that what is computed from it may take its memory.
    """

    def __init__(self, buckets: Sequence[Bucket], tensors: list[list[Tensor]]) -> None:
        self.buckets, self.tensors = buckets, tensors
        self.disposable = False

    def like(self, tensors: list[list[Tensor]]) -> Vector:
        """A vector over the same parameters."""
        return Vector(self.buckets, tensors)

    @cached_property
    def norms(self) -> list[float]:
        """2-norm of each bucket, accumulated in its own precision; 0 for no tensors.

        They are finite exactly when every number is: where squares overflow, the tensors are scaled down first.
        """
        norms = self._norms(2)
        small = self._scaled_down() if math.inf in norms else None
        return norms if small is None else [small[0] * norm for norm in small[1].norms]

    @cached_property
    def norm(self) -> float:
        """2-norm over all tensors."""
        return math.hypot(*self.norms)

    @cached_property
    def norms_by_tensor(self) -> list[list[float]]:
        """2-norm of each tensor, like `norms`; where this rank holds a shard, of the whole."""
        norms = [
            bucket.total(torch.stack(torch._foreach_norm(xs))).tolist()
            for bucket, xs in zip(self.buckets, self.tensors, strict=True)
        ]
        small = self._scaled_down() if any(math.inf in each for each in norms) else None
        return norms if small is None else [[small[0] * n for n in each] for each in small[1].norms_by_tensor]

    def _scaled_down(self) -> tuple[float, Vector] | None:
        """The largest number and this vector divided by it; None if it is not finite."""
        largest = max(self._norms(math.inf))
        if not math.isfinite(largest):
            return None
        return largest, self.like([list(torch._foreach_mul(xs, 1 / largest)) for xs in self.tensors])

    def _norms(self, order: float) -> list[float]:
        totals = []
        for bucket, xs in zip(self.buckets, self.tensors, strict=True):
            each = torch.stack(torch._foreach_norm(xs, order))
            totals.append(bucket.total(torch.linalg.vector_norm(each, order), order))
        if not totals:
            return []
        widest = functools.reduce(torch.promote_types, [total.dtype for total in totals])
        return torch.stack([total.to(totals[0].device, widest) for total in totals]).tolist()


def combine(x: Vector, a: Sequence[float], y: Vector, b: Sequence[float]) -> Vector:
    """The vector a·x + b·y with one a and one b per bucket, written over x, which must not be used afterwards."""
    for xs, ys, each_a, each_b in zip(x.tensors, y.tensors, a, b, strict=True):
        if each_a != 1:
            torch._foreach_mul_(xs, each_a)
        torch._foreach_add_(xs, ys, alpha=each_b)
    return x.like(x.tensors)


def difference(x: Vector, y: Vector) -> Vector:
    """The vector x − y."""
    return x.like([list(torch._foreach_sub(xs, ys)) for xs, ys in zip(x.tensors, y.tensors, strict=True)])


def cosine(x: Vector, y: Vector) -> float:
    """Re⟨x, y⟩ / (‖x‖‖y‖), and 0 where one of them vanishes."""
    return unit_sum(x, y).norm ** 2 / 2 - 1 if min(x.norm, y.norm) >= TINY else 0.0


def unit_sum(x: Vector, y: Vector) -> Vector:
    """x̂ + ŷ of two vectors that do not vanish, written over x if that is disposable.

    There is no foreach kernel for inner products, but ‖x̂ + ŷ‖² = 2 + 2 cos.
    """
    if x.disposable:
        for xs in x.tensors:
            torch._foreach_mul_(xs, 1 / x.norm)
        total = x.like(x.tensors)
    else:
        total = x.like([list(torch._foreach_mul(xs, 1 / x.norm)) for xs in x.tensors])
    for sums, ys in zip(total.tensors, y.tensors, strict=True):
        torch._foreach_add_(sums, ys, alpha=1 / y.norm)
    return total


def duplicate(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Bit-exact copies, or copies cast to `dtype`."""
    copies = [torch.empty_like(tensor, dtype=dtype, requires_grad=False) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies

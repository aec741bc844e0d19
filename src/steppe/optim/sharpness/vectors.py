"""Vectors over all parameters of a step, in lists that the foreach kernels take whole.

A `Vector` holds one list of tensors per `Bucket` (parameters that share group, dtype, device and layout over ranks),
so a rule that differs between groups is one number per bucket, and the number of kernel launches does not depend on
the number of tensors. Lengths and cosines are Python floats: one transfer from the device each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, distributed as dist
from torch._utils import _flatten_dense_tensors

__all__ = [
    "TINY",
    "Bucket",
    "Vector",
    "combine",
    "cosine",
    "difference",
    "duplicate",
    "sum_of_directions",
]

BLOCK = 131072
"""A CPU takes less time to copy small tensors into one of this many numbers than to start a norm for each."""
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
        spare: where the CPU keeps the memory of `room` from step to step.
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
        """A copy of the parameters, in their `room`."""
        copies = self.room()
        torch._foreach_copy_(copies, self.params)
        return copies

    def room(self) -> list[Tensor]:
        """Memory for another value of each parameter, good until the next call.

        A GPU's allocator gives memory back in no time; on a CPU new pages would cost several times the copying.
        """
        room = self.spare or [torch.empty_like(param, requires_grad=False) for param in self.params]
        if self.params[0].device.type == "cpu" and not self.spare:
            self.spare.extend(room)
        return room

    def plus(self, direction: list[Tensor], length: float) -> list[Tensor]:
        """params + length · direction, in their `room`."""
        if self.params[0].device.type != "cpu":  # where a call for each would take longer than the adding
            return list(torch._foreach_add(self.params, direction, alpha=length))
        room = self.room()
        for param, step, value in zip(self.params, direction, room, strict=True):
            torch.add(param, step, alpha=length, out=value)
        return room

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
        taken: whether that has happened.
    """

    def __init__(self, buckets: Sequence[Bucket], tensors: list[list[Tensor]]) -> None:
        self.buckets, self.tensors = buckets, tensors
        self.disposable = self.taken = False

    def like(self, tensors: list[list[Tensor]]) -> Vector:
        """A vector over the same parameters."""
        return Vector(self.buckets, tensors)

    def copied(self) -> Vector:
        """A copy, which nobody else overwrites."""
        return self.like([duplicate(xs) for xs in self.tensors])

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
        totals = [
            bucket.total(_norm(xs, order), order)
            for bucket, xs in zip(self.buckets, self.tensors, strict=True)
        ]
        if len(totals) < 2:
            return [total.item() for total in totals]
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
    return sum_of_directions(x, y)[2] if min(x.norm, y.norm) >= TINY else 0.0


def sum_of_directions(x: Vector, y: Vector) -> tuple[Vector, float, float]:
    """size · (x/‖x‖ + y/‖y‖), its size, and the cosine of x and y, which must not vanish.

    There is no foreach kernel for inner products, but the square of the norm is size² (2 + 2 cos). The sum is written
    over x if that is disposable.
    """
    # x as it is, unless sums of numbers of its size could overflow or vanish
    size = x.norm if all(1e-15 < norm < 1e15 for norm in (x.norm, y.norm)) else 1.0
    sums = []
    for xs, ys in zip(x.tensors, y.tensors, strict=True):
        given = xs if size == x.norm else list(torch._foreach_mul(xs, size / x.norm))
        if x.disposable:
            torch._foreach_add_(given, ys, alpha=size / y.norm)
            sums.append(given)
        else:
            sums.append(list(torch._foreach_add(given, ys, alpha=size / y.norm)))
    total = x.like(sums)
    return total, size, (total.norm / size) ** 2 / 2 - 1


def _norm(xs: list[Tensor], order: float) -> Tensor:
    """The norm of all tensors together."""
    if xs[0].device.type == "cpu":
        pieces = [block[0] if len(block) == 1 else _flatten_dense_tensors(block) for block in _blocks(xs)]
        norms = [torch.linalg.vector_norm(piece, order) for piece in pieces]
    else:
        norms = list(torch._foreach_norm(xs, order))
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), order)


def _blocks(xs: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Runs of tensors that hold at most `BLOCK` numbers together, and single ones that are larger."""
    start = held = 0
    for stop, x in enumerate(xs):
        if stop > start and held + x.numel() > BLOCK:
            yield xs[start:stop]
            start, held = stop, 0
        held += x.numel()
    yield xs[start:]


def duplicate(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Bit-exact copies, or copies cast to `dtype`."""
    copies = [torch.empty_like(tensor, dtype=dtype, requires_grad=False) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies

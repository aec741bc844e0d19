"""From ``.grad`` to vectors and back: buckets, sparse, half-precision and sharded gradients."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steppe.optim.sharpness.rounding import HALF
from steppe.optim.sharpness.sharing import local
from steppe.optim.sharpness.vectors import Bucket, Vector, duplicate

__all__ = ["as_gradient", "bucketed", "gradient_of", "multiply", "present"]


def bucketed(
    groups: Iterable[dict[str, Any]], trait: Callable[[int, str | None, Tensor], Hashable]
) -> list[Bucket]:
    """The parameters that have a gradient, in buckets."""
    buckets: dict[Hashable, Bucket] = {}
    index = 0
    for position, group in enumerate(groups):
        names = group.get("param_names") or [None] * len(group["params"])
        for name, param in zip(names, group["params"], strict=True):
            if param.grad is not None:
                kind, ranks = trait(index, name, param), _ranks(param)
                key = (position, param.dtype, param.device, kind, ranks)
                if key not in buckets:
                    buckets[key] = Bucket(group, [], [], [], kind, ranks)
                buckets[key].owners.append(param)
                buckets[key].params.append(local(param))
                buckets[key].indices.append(index)
            index += 1
    return list(buckets.values())


def gradient_of(buckets: Sequence[Bucket]) -> Vector:
    """What backward left in ``.grad``: float32 for half precision, zeros where there is nothing."""
    tensors = []
    for bucket in buckets:
        grads = [_dense(owner, param) for owner, param in zip(bucket.owners, bucket.params, strict=True)]
        tensors.append(duplicate(grads, torch.float32) if bucket.params[0].dtype in HALF else grads)
    return Vector(buckets, tensors)


def as_gradient(owner: Tensor, tensor: Tensor) -> Tensor:
    """What this rank holds of a gradient -> what ``owner.grad`` has to be."""
    if not hasattr(owner, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor

    mesh, placements = owner.device_mesh, owner.placements  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, placements, shape=owner.shape, stride=owner.stride())


def present(groups: Iterable[Mapping[str, Any]]) -> Iterator[Tensor]:
    """All gradients there are, or what this rank holds of them."""
    return (local(param.grad) for group in groups for param in group["params"] if param.grad is not None)


def multiply(groups: Iterable[Mapping[str, Any]], factor: float) -> None:
    """Multiply all gradients in place."""
    if factor == 1:
        return
    grads = list(present(groups))
    dense = [grad for grad in grads if not grad.is_sparse]
    if dense:
        torch._foreach_mul_(dense, factor)
    for grad in grads:
        if grad.is_sparse:
            grad.mul_(factor)


def _dense(owner: Tensor, param: Tensor) -> Tensor:
    grad = owner.grad
    if grad is None:
        return torch.zeros_like(param)
    if hasattr(grad, "device_mesh"):
        if grad.placements != owner.placements:  # type: ignore[attr-defined]
            grad = grad.redistribute(placements=owner.placements)  # type: ignore[attr-defined]
        return local(grad)
    if grad.is_sparse:
        return grad.to_dense()
    return grad.clone() if grad._is_view() else grad  # views of buckets that the next backward overwrites


def _ranks(param: Tensor) -> tuple[Any, ...]:
    if not hasattr(param, "device_mesh"):
        return ()
    mesh = param.device_mesh
    return tuple(mesh.get_group(dim) for dim, placed in enumerate(param.placements) if placed.is_shard())  # type: ignore[attr-defined]

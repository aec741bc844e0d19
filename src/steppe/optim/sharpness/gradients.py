"""From ``.grad`` to vectors and back: buckets, sparse, half-precision and sharded gradients."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steppe.optim.sharpness.rounding import HALF
from steppe.optim.sharpness.sharing import local
from steppe.optim.sharpness.vectors import Bucket, Vector, duplicate

__all__ = ["as_gradient", "bucketed", "drop", "gradient_of", "multiply", "numbered", "present"]


def bucketed(
    groups: Iterable[dict[str, Any]],
    trait: Callable[[int, str | None, Tensor], Hashable],
    takes_part: Callable[[int, Tensor], bool] = lambda index, param: param.grad is not None,
) -> list[Bucket]:
    """The parameters that take part (by index over all groups), those with a gradient, in buckets."""
    buckets: dict[Hashable, Bucket] = {}
    for group, index, name, param in numbered(groups):
        if takes_part(index, param):
            kind, ranks = trait(index, name, param), _ranks(param)
            key = (id(group), param.dtype, param.device, kind, ranks)
            if key not in buckets:
                buckets[key] = Bucket(group, [], [], [], kind, ranks)
            buckets[key].owners.append(param)
            buckets[key].params.append(local(param))
            buckets[key].indices.append(index)
    return list(buckets.values())


def numbered(
    groups: Iterable[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], int, str | None, Tensor]]:
    """Group, index over all groups, name if there are names, parameter: for every parameter."""
    index = 0
    for group in groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for name, param in zip(names, group["params"], strict=True):
            yield group, index, name, param
            index += 1


def gradient_of(buckets: Sequence[Bucket]) -> Vector:
    """What backward left in ``.grad``: float32 for half precision, zeros where there is nothing."""
    tensors = []
    for bucket in buckets:
        given = [owner.grad for owner in bucket.owners]
        grads = [
            # a view belongs to a bucket of DistributedDataParallel, which the next backward overwrites
            grad
            if type(grad) is Tensor and not grad.is_sparse and not grad._is_view()
            else _dense(grad, owner, param)
            for grad, owner, param in zip(given, bucket.owners, bucket.params, strict=True)
        ]
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


def drop(groups: Iterable[Mapping[str, Any]]) -> None:
    """Zero all gradients, as `zero_grad` does: there are none then."""
    for group in groups:
        for param in group["params"]:
            param.grad = None


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


def _dense(grad: Tensor | None, owner: Tensor, param: Tensor) -> Tensor:
    if grad is None:
        return torch.zeros_like(param)
    if hasattr(grad, "device_mesh"):
        if grad.placements != owner.placements:  # type: ignore[attr-defined]
            grad = grad.redistribute(placements=owner.placements)  # type: ignore[attr-defined]
        return local(grad)
    return grad.to_dense() if grad.is_sparse else grad.clone()


def _ranks(param: Tensor) -> tuple[Any, ...]:
    if not hasattr(param, "device_mesh"):
        return ()
    mesh = param.device_mesh
    return tuple(mesh.get_group(dim) for dim, placed in enumerate(param.placements) if placed.is_shard())  # type: ignore[attr-defined]

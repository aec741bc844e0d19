"""All parameters as one vector, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["assign", "flatten", "unflatten"]


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """The tensors' numbers one after the other, ``[dim]``, detached, in memory of its own."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``vector [dim]`` in the shapes of `like`.

    Raises:
        ValueError: the vector is longer or shorter than `like` together.
    """
    sizes = [tensor.numel() for tensor in like]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"need a vector of {sum(sizes)} numbers, got shape {list(vector.shape)}")
    return [part.view(tensor.shape) for part, tensor in zip(vector.split(sizes), like, strict=True)]


@torch.no_grad()
def assign(tensors: Sequence[Tensor], vector: Tensor) -> None:
    """Overwrite the tensors, in place, with the numbers of ``vector [dim]``."""
    for tensor, part in zip(tensors, unflatten(vector, tensors), strict=True):
        tensor.copy_(part)

"""Vectors that are made again instead of being held, and random numbers that can be drawn again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed as dist

from steppe.optim.sharpness.vectors import Bucket, Vector

if TYPE_CHECKING:
    from steppe.optim.sharpness.base import SharpnessAware

__all__ = ["Remade", "noise_stream", "pieces", "times_normal"]


class Remade(Vector):
    """A vector that nobody holds: a perturbation of it costs no memory during the pass, however weights come back.

    Args:
        buckets: its parameters.
        make: makes the tensors of one bucket, the same ones whenever it is called.
    """

    def __init__(self, buckets: Sequence[Bucket], make: Callable[[Bucket], list[Tensor]]) -> None:
        self.buckets, self.disposable, self._make = buckets, False, make

    @property
    def tensors(self) -> list[list[Tensor]]:  # type: ignore[override]
        """Made anew."""
        return [self._make(bucket) for bucket in self.buckets]


def noise_stream(optimizer: SharpnessAware, bucket: Bucket, *names: int) -> torch.Generator:
    """The generator for the noise of a bucket in this step.

    Ranks that perturb together draw the same numbers; those that perturb by themselves, or hold different shards,
    draw different ones.
    """
    ranks = [dist.get_rank(group) for group in bucket.ranks]
    if optimizer.module.by_rank:
        ranks.append(dist.get_rank())
    return optimizer.stream("noise", bucket.indices[0], *names, *ranks, device=bucket.params[0].device)


def times_normal(scales: Tensor, stream: torch.Generator) -> Tensor:
    """scales ⊙ z, z standard normal, written over scales."""
    for part in scales.chunk(16):  # so that z never takes the memory of a whole copy
        part.mul_(torch.randn(part.shape, dtype=part.dtype, device=part.device, generator=stream))
    return scales


def pieces(flat: Tensor, bucket: Bucket) -> list[Tensor]:
    """``[numbers of all parameters]`` -> views of it in the shapes of the parameters."""
    parts = flat.split([param.numel() for param in bucket.params])
    return [part.view(param.shape) for part, param in zip(parts, bucket.params, strict=True)]

"""Perturbations of half-precision weights that do not round away."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["HALF", "add_rounding_randomly"]

HALF = (torch.float16, torch.bfloat16)

_DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32 mantissa that the type has not."""


def add_rounding_randomly(
    params: Sequence[Tensor], direction: Sequence[Tensor], length: float, stream: torch.Generator
) -> None:
    """params += length · direction, rounded up or down at random so that the mean is exact.

    Rounding to nearest would lose a perturbation below half a unit in the last place altogether.

    Args:
        params: weights of one half-precision dtype.
        direction: float32, shaped like them.
        length: factor.
        stream: on the device of params.
    """
    dtype, mask = params[0].dtype, (1 << _DROPPED[params[0].dtype]) - 1
    sums = torch.cat([d.reshape(-1) for d in direction]).mul_(length)
    sums += torch.cat([p.reshape(-1) for p in params])
    bits = sums.view(
        torch.int32
    )  # the magnitude's bits: adding and cutting off rounds away from or towards zero
    bits += torch.randint(mask + 1, bits.shape, generator=stream, dtype=torch.int32, device=bits.device)
    bits &= ~mask
    pieces = sums.to(dtype).split([p.numel() for p in params])
    torch._foreach_copy_(list(params), [piece.view_as(p) for piece, p in zip(pieces, params, strict=True)])

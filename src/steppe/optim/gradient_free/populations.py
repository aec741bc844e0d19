"""Where a population starts, and what becomes of a member that leaves the bounds."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reflect", "scattered"]


def scattered(
    start: Tensor,
    population: int,
    bounds: tuple[Tensor, Tensor] | None,
    spread: float | None,
    generator: torch.Generator,
) -> Tensor:
    """A first population ``[population, dim]``, drawn uniformly; its first member is ``start [dim]`` itself.

    Args:
        start: lies inside the bounds.
        population: how many.
        bounds: lowest and highest weights ``[dim]``; None for none.
        spread: None draws each weight between its bounds, or within 1 of the start if it has not both; a number
            draws it within that distance of the start.
        generator: where the draws come from.
    """
    low, high = start - (spread or 1.0), start + (spread or 1.0)
    if bounds is not None and spread is None:
        boxed = bounds[0].isfinite() & bounds[1].isfinite()
        low, high = torch.where(boxed, bounds[0], low), torch.where(boxed, bounds[1], high)
    share = torch.rand(population, len(start), generator=generator, dtype=torch.float64)
    theta = low * (1 - share) + high * share  # in this form no width overflows
    theta[0] = start
    return theta if bounds is None else theta.clamp(*bounds)


def reflect(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``x [..., dim]`` mirrored at the bounds ``[dim]`` as often as it takes to be inside; what is inside stays."""
    width = high - low
    beyond = (x - low).abs().fmod(2 * width)
    folded = torch.where(
        low.isinf(), high - (x - high).abs(), low + torch.minimum(beyond, 2 * width - beyond)
    )
    return torch.where((x >= low) & (x <= high), x, folded).clamp(low, high)

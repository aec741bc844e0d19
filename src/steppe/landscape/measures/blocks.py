"""Flatness across time."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch

from steppe.core.errors import SpecError
from steppe.landscape.point import Measurement, Point

__all__ = ["time_dispersion"]


def time_dispersion(
    point: Point, generator: torch.Generator, blocks: int | Sequence[Hashable] = 5
) -> Measurement:
    """Standard deviation of the loss of the same weights between blocks of time. Ours; no paper.

    With L_k the mean loss of the batches of block k of K, by their shares, and L̄ the mean of the L_k ::

        sqrt( Σ_k (L_k - L̄)² / (K - 1) )

    The note says what it would be if batches differed by chance alone: ``sqrt(mean_k s_k² / n_k)``, s_k the standard
    deviation within block k of n_k batches. It depends on the function alone, so rescaling does not change it. One
    forward pass.

    Args:
        point: where; its batches must be in the order of time.
        generator: not used.
        blocks: how many, of equal numbers of batches as near as may be; or each batch's block, such as its month.

    Raises:
        SpecError: fewer than two blocks, more blocks than batches, or not one label for each batch.
    """
    before, count = point.cost, len(point.batches)
    labels = [i * blocks // count for i in range(count)] if isinstance(blocks, int) else list(blocks)
    wanted = blocks if isinstance(blocks, int) else len(set(labels))
    if len(labels) != count or not 2 <= wanted <= count:
        raise SpecError(
            f"need from 2 to {count} blocks, or a label for each of the {count} batches; got {blocks}."
        )
    losses = torch.tensor([point.value(batch=i) for i in range(count)], dtype=torch.float64)
    shares = torch.tensor(point.shares, dtype=torch.float64)
    means, chance = [], []
    for label in dict.fromkeys(labels):
        inside = torch.tensor([one == label for one in labels])
        means.append(float(shares[inside] @ losses[inside] / shares[inside].sum()))
        if inside.sum() > 1:
            chance.append(float(losses[inside].var() / inside.sum()))
    value = float(torch.tensor(means, dtype=torch.float64).std())
    note = f"by chance alone: {math.sqrt(sum(chance) / len(chance)):.3g}" if chance else ""
    return Measurement(value, math.nan, True, point.cost - before, note)

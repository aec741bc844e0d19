"""One small problem, and the plain loop every client is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR

from steppe.optim import ASAM, GAM, GSAM, SAM, FriendlySAM, SharpnessAware

FAMILY = [SAM, ASAM, GSAM, GAM, FriendlySAM]
SAMPLES, BATCH = 32, 8

Batch = tuple[Tensor, Tensor]


def data(samples: int = SAMPLES) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, generator=generator)
    return x, torch.sin(2 * x[:, :1]) + x[:, 1:2]


def batches(samples: int = SAMPLES, size: int = BATCH) -> list[Batch]:
    return list(zip(*(part.split(size) for part in data(samples)), strict=True))


def network() -> nn.Sequential:
    """With statistics of its own, and the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        # no bias before the normalisation: its gradient would be rounding alone, and AdamW makes steps of that
        return nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def make(cls: type[SharpnessAware], model: nn.Module, **hyper: Any) -> SharpnessAware:
    return cls(model.named_parameters(), base=AdamW, **{"lr": 0.05, "rho": 0.1, "model": model, **hyper})


def decay(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return StepLR(optimizer, step_size=2, gamma=0.7)


def constant(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda _: 1.0)


def mse(model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def plain_loop(
    model: nn.Module,
    optimizer: SharpnessAware,
    steps: Iterable[Sequence[Any]],
    *,
    loss: Callable[[nn.Module, Any], Tensor] = mse,
    scheduler: LRScheduler | None = None,
    clip: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> list[float]:
    """Train on one list of micro-batches per step; the losses at the unperturbed weights."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    model.train()
    for micro_batches in steps:
        for one in optimizer.passes(scaler):
            one.loss = 0.0
            for batch in micro_batches:
                share = loss(model, batch) / len(micro_batches)
                scaler.scale(share).backward()
                one.loss += share.item()
            if one.number == 1:
                losses.append(one.loss)
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step()
    return losses


def assert_same(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    """The same weights and statistics: the same bits, unless there is a tolerance."""
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), **tolerance)

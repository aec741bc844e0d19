"""The one training loop. Every optimizer of every study runs through it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from steppe.core.checkpoint import load_tree, save_tree
from steppe.core.errors import SteppeError
from steppe.core.objective import Cost, Objective
from steppe.core.seeding import generator
from steppe.problems.problem import Problem

__all__ = ["CHECKPOINT", "Epoch", "Trained", "train"]

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Epoch:
    """What one epoch left: ``number`` counts from 1, cost and seconds are totals since the trial's start."""

    number: int
    metrics: dict[str, float]
    cost: Cost
    seconds: float


@dataclass(frozen=True)
class Trained:
    """A finished trial: the model at its best epoch, and what it took."""

    model: nn.Module
    best_epoch: int
    epochs: int
    cost: Cost
    seconds: float


def train(
    problem: Problem,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    seed: int,
    *,
    epochs: int,
    patience: int,
    folder: Path,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Trained:
    """Train ``problem`` from ``seed``; stop after ``epochs`` or ``patience`` epochs without a better metric.

    Initial weights and batch orders are functions of the seed alone, so they are the same for every optimizer. After
    each epoch a checkpoint is written to ``folder``; a run that was killed continues there to the same bits.
    ``seconds`` are CPU seconds of this process over batches and optimizer steps, without the validation: what else runs
    on the machine does not count.

    Raises:
        SteppeError: the watched metric is not finite: training has diverged.
    """
    model = problem.model(generator(seed, "model"))
    optimizer = optimizer_of(model)
    metric, direction = problem.watch
    cost, seconds, done = Cost(), 0.0, 0
    best_value, best_epoch, best_state = -math.inf, 0, _copy(model)
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        saved = load_tree(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        cost, seconds, done = Cost(**saved["cost"]), saved["seconds"], saved["epoch"]
        best_value, best_epoch, best_state = saved["best_value"], saved["best_epoch"], saved["best"]

    while done < epochs and done - best_epoch < patience:
        number = done + 1
        started = time.process_time()
        total, batches = torch.zeros(()), 0
        for batch in problem.batches(generator(seed, "batches", number)):
            # torch annotates the closure's loss as a float; it passes tensors through
            loss: Any = optimizer.step(cast(Any, Objective(model, problem.loss, batch, cost)))
            total, batches = total + loss, batches + 1
        seconds += time.process_time() - started
        validation = problem.metrics(model, "validation")
        value = direction * validation[metric]
        if not math.isfinite(value):
            raise SteppeError(
                f"validation {metric} is {validation[metric]} after epoch {number}: training has diverged. "
                "Lower the learning rate or rho."
            )
        if value > best_value:
            best_value, best_epoch, best_state = value, number, _copy(model)
        metrics = {"train_loss": float(total) / batches} | {
            f"validation_{k}": v for k, v in validation.items()
        }
        on_epoch(Epoch(number, metrics, Cost(**vars(cost)), seconds))
        done = number
        save_tree(
            checkpoint,
            {
                "epoch": done,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "cost": vars(cost),
                "seconds": seconds,
                "best": best_state,
                "best_value": best_value,
                "best_epoch": best_epoch,
            },
        )
    model.load_state_dict(best_state)
    return Trained(model, best_epoch, done, cost, seconds)


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

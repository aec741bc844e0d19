"""The one training loop. Every optimizer of every study runs through it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn

from steppe.core.checkpoint import load_tree, save_tree
from steppe.core.errors import SteppeError
from steppe.core.objective import Cost, Objective
from steppe.core.seeding import generator
from steppe.landscape.trajectory import record
from steppe.problems.problem import Problem

__all__ = ["CHECKPOINT", "Epoch", "Trained", "train"]

CHECKPOINT = "checkpoint.safetensors"

DIAGNOSE_EVERY = 20
"""Steps from one that measures the costlier diagnostics to the next. They are a few sweeps over the weights, so in
every twentieth step they stay far below 2 % of the training."""


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
    evaluations: int | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Trained:
    """Train ``problem`` from ``seed``; stop after ``epochs`` or ``patience`` epochs without a better metric.

    It also stops with the step that brings the cost to ``evaluations`` (`Cost.evaluations`), whose epoch is then
    shorter, and after an epoch in which the optimizer says that it has ``finished``.

    Initial weights and batch orders are functions of the seed alone, so they are the same for every optimizer. After
    each epoch a checkpoint is written to ``folder``; a run that was killed continues there to the same bits. Initial
    weights and those of each epoch stay there too (`steppe.landscape.trajectory.record`).
    ``seconds`` are CPU seconds of this process over batches and optimizer steps, without the validation: what else runs
    on the machine does not count. An optimizer that trains at other weights than it evaluates (schedule-free ones) says
    so by its ``train()`` and ``eval()``: validation, records and checkpoints have the weights to evaluate.

    An epoch's metrics are ``train_loss``, the problem's as ``validation_...``, and where the optimizer has
    ``diagnostics`` their means over the steps as ``step_...`` (`_Steps`), which change no bit of the training.

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
    else:
        record(folder, 0, model.parameters())

    def spent() -> bool:
        return evaluations is not None and cost.evaluations >= evaluations

    while (
        done < epochs
        and done - best_epoch < patience
        and not spent()
        and not getattr(optimizer, "finished", "")
    ):
        number = done + 1
        started = time.process_time()
        total, batches, steps = torch.zeros(()), 0, _Steps(optimizer, cost)
        _switch(optimizer, "train")
        for batch in problem.batches(generator(seed, "batches", number)):
            with steps.watched():
                # torch annotates the closure's loss as a float; it passes tensors through
                loss: Any = optimizer.step(cast(Any, Objective(model, problem.loss, batch, cost)))
            total, batches = total + loss, batches + 1
            if spent():
                break
        _switch(optimizer, "eval")
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
        metrics = {
            "train_loss": float(total) / batches,
            **{f"validation_{name}": score for name, score in validation.items()},
            **{f"step_{name}": mean for name, mean in steps.means().items()},
        }
        on_epoch(Epoch(number, metrics, Cost(**vars(cost)), seconds))
        done = number
        record(folder, number, model.parameters())  # before the checkpoint, which says that it is there
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


@runtime_checkable
class _Diagnosing(Protocol):
    """An optimizer that tells what its steps did, as the sharpness-aware ones do."""

    diagnose: bool
    skipped: int
    diagnostics: Any


class _Steps:
    """What the optimizer tells of the steps of one epoch, as means; nothing if it tells nothing.

    Each is the mean over the steps that have it, and left out if none has:

    - ``gradients``: gradients taken, as the closure counts them.
    - ``skipped``: 1 for a step that was skipped because of a gradient that was not finite, else 0: their share.
    - ``perturbed``: 1 for a step that took a gradient at perturbed weights w + e, else 0.
    - ``gradient_norm``: ‖g‖, g the gradient at w.
    - ``surrogate_gap``: L(w + e) − L(w).
    - ``perturbation``: ‖e‖ as it was applied, in diagnosed steps.
    - ``cosine``: of g and the gradient at w + e, in diagnosed steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, cost: Cost) -> None:
        self._optimizer = optimizer if isinstance(optimizer, _Diagnosing) else None
        self._cost = cost
        self._seen: defaultdict[str, list[float]] = defaultdict(list)
        self._count, self._due = 0, False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Around one step."""
        optimizer = self._optimizer
        if optimizer is None:
            yield
            return
        # counted from the epoch's start, so that a resumed trial diagnoses the same steps; waiting for a perturbed
        # one, since an optimizer that perturbs every k-th step only could miss every twentieth for ever
        self._due = self._due or self._count % DIAGNOSE_EVERY == 0
        optimizer.diagnose = self._due
        skipped, gradients = optimizer.skipped, self._cost.gradient
        yield
        self._count += 1
        self._note("gradients", self._cost.gradient - gradients)
        self._note("skipped", optimizer.skipped - skipped)
        if optimizer.skipped == skipped:  # else the diagnostics are those of an earlier step
            told = optimizer.diagnostics
            self._note("perturbed", told.perturbed)
            self._note("gradient_norm", told.gradient_norm)
            self._note("cosine", told.cosine)
            if told.perturbed:
                self._note("surrogate_gap", told.surrogate_gap)
                if self._due:
                    self._note("perturbation", told.perturbation)
                self._due = False

    def means(self) -> dict[str, float]:
        """The means so far by name."""
        return {name: math.fsum(values) / len(values) for name, values in self._seen.items()}

    def _note(self, name: str, value: float) -> None:
        if math.isfinite(value):
            self._seen[name].append(float(value))


def _switch(optimizer: torch.optim.Optimizer, mode: str) -> None:
    """Move the weights to those to train at or those to evaluate, where the optimizer tells them apart."""
    if (move := getattr(optimizer, mode, None)) is not None:
        move()


def _copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

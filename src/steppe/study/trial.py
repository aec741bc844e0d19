"""One trial, run where it is told to: in this process or in a worker."""

from __future__ import annotations

import functools
import inspect
import json
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steppe.core.checkpoint import load_tree, save_tree
from steppe.core.errors import SpecError, SteppeError
from steppe.optim.registry import create, optimizer_class
from steppe.optim.sharpness.base import SharpnessAware
from steppe.problems.problem import StudyProblem
from steppe.problems.registry import PROBLEMS
from steppe.study.spec import TrialSpec
from steppe.study.store import Store
from steppe.study.train import CHECKPOINT, Epoch, train

__all__ = ["Task", "load_outputs", "make_problem", "outputs_file", "run_trial"]


@dataclass(frozen=True)
class Task:
    """A trial and where it belongs; all a worker needs to know."""

    folder: Path
    problem: Mapping[str, Any]
    trial: TrialSpec


def make_problem(settings: Mapping[str, Any]) -> StudyProblem:
    """The problem of a study from its table: ``kind`` and the problem's own settings."""
    # once per process: workers run many trials of one problem, whose data takes seconds to prepare
    return _problem(json.dumps(settings, sort_keys=True, default=str))


@functools.lru_cache(maxsize=1)
def _problem(text: str) -> StudyProblem:
    settings = json.loads(text)
    problem: StudyProblem = PROBLEMS[settings.pop("kind")].load()(**settings)
    return problem


def run_trial(task: Task) -> None:
    """Train, keep the outputs, and say so in the ledger. An error is recorded there; the study goes on."""
    trial, store = task.trial, Store.open(task.folder)
    torch.set_num_threads(1)
    store.set_state(trial.id, "running")
    try:
        _run(task, store)
    except SteppeError as error:
        store.set_state(trial.id, "failed", error=str(error))
    except Exception:
        store.set_state(trial.id, "failed", error=traceback.format_exc())


def _run(task: Task, store: Store) -> None:
    trial = task.trial
    problem = make_problem(task.problem).parts[trial.part]
    folder = store.trial_folder(trial.id)
    if not (folder / CHECKPOINT).exists():  # from the start, whatever an earlier attempt left in the ledger
        store.drop_epochs(trial.id, after=0)

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        kind, base, hyper = (trial.optimizer[key] for key in ("kind", "base", "hyper"))
        # what is drawn differs between seeds
        if issubclass(cls := optimizer_class(kind), SharpnessAware):
            # the model for clean statistics of its normalisation layers
            hyper = {"model": model, "seed": trial.seed} | hyper
        elif "seed" in inspect.signature(cls).parameters:
            hyper = {"seed": trial.seed} | hyper
        try:
            optimizer = create(kind, model.named_parameters(), base=base, **hyper)
        except TypeError as error:
            raise SpecError(f"optimizer {trial.label!r}: {error}.") from error
        if getattr(optimizer, "closure_takes_pass", False):
            raise SpecError(
                f"optimizer {trial.label!r} looks at the losses or outputs of single samples, and a study's problem "
                "has one loss per batch: it needs a training loop of your own."
            )
        return optimizer

    def on_epoch(epoch: Epoch) -> None:
        store.record_epoch(
            trial.id,
            epoch.number,
            epoch.metrics,
            gradient_evaluations=epoch.cost.gradient,
            forward_evaluations=epoch.cost.forward,
            seconds=epoch.seconds,
        )

    trained = train(
        problem,
        optimizer_of,
        trial.seed,
        epochs=trial.epochs,
        patience=trial.patience,
        folder=folder,
        evaluations=trial.evaluations,
        on_epoch=on_epoch,
    )
    save_tree(folder / "weights.safetensors", trained.model.state_dict())
    save_tree(outputs_file(store, trial), problem.outputs(trained.model))
    store.set_state(
        trial.id,
        "done",
        best_epoch=trained.best_epoch,
        epochs=trained.epochs,
        gradient_evaluations=trained.cost.gradient,
        forward_evaluations=trained.cost.forward,
        seconds=trained.seconds,
        samples=trained.epochs * problem.samples,
    )


def outputs_file(store: Store, trial: TrialSpec) -> Path:
    """Where a trial's outputs lie. A trial that is done without this file has outputs for other dates or stocks."""
    return store.trial_folder(trial.id) / f"outputs-{trial.outputs}.safetensors"


def load_outputs(store: Store, trial: TrialSpec) -> dict[str, torch.Tensor]:
    """What `Problem.outputs` of a finished trial was."""
    outputs: dict[str, torch.Tensor] = load_tree(outputs_file(store, trial))
    return outputs

"""A study from its spec to its result tables. Running it again resumes, and skips what is done."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from steppe.study.executors import run_here, run_processes
from steppe.study.landscape import check_measures, run_landscape
from steppe.study.spec import StudySpec, TrialSpec, plan
from steppe.study.store import Store, TrialRow
from steppe.study.trial import Task, load_outputs, make_problem, outputs_file

__all__ = ["Progress", "run_study"]


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        trials: all trials of the plan, in order.
        work, total: epochs weighted with the optimizer's gradient evaluations per step, done and at most to do.
        eta: seconds to go at the pace of this run if no trial stops early; None while unknown.
    """

    trials: tuple[TrialRow, ...]
    work: float
    total: float
    eta: float | None


def run_study(
    spec: StudySpec,
    folder: str | Path,
    on_progress: Callable[[Progress], None] = lambda p: None,
    on_landscape: Callable[[int, int, str], None] = lambda done, total, job: None,
) -> Store:
    """Run every trial of ``spec`` that ``folder`` does not hold yet, the analysis, and the landscapes that it asks for.

    Returns the store.

    Args:
        spec: what to run.
        folder: the study's folder; made if need be. A killed run resumes here to the same bits.
        on_progress: called about once a second while trials run.
        on_landscape: see `steppe.study.landscape.run_landscape`.

    Raises:
        SteppeError: the spec or its data cannot be used. A trial that fails does not raise: it is in the ledger.
    """
    if spec.landscape:
        check_measures(spec.landscape.measures)  # before hours of training
    problem = make_problem(spec.problem)
    store = Store.create(folder, spec.resolved())
    with store.lock():
        trials = plan(spec, problem)
        for trial in trials:
            store.add_trial(
                trial.id, part=trial.part, optimizer=trial.label, seed=trial.seed, spec=_told(trial)
            )
        store.set_plan([trial.id for trial in trials])
        store.write_json("panel_info", dict(problem.describe()))
        store.write_json("environment", _environment())

        done = {row.id for row in store.trials() if row.state == "done"}
        # a model whose test dates have changed is not trained again: its checkpoint has nothing left to do but score
        done -= {trial.id for trial in trials if not outputs_file(store, trial).exists()}
        # longest first, so that the workers finish together
        todo = sorted((t for t in trials if t.id not in done), key=lambda t: -t.passes)
        tasks = [Task(store.folder, spec.problem, trial) for trial in todo]
        tick = _ticker(store, trials, on_progress)
        if spec.workers and len(tasks) > 1:
            run_processes(tasks, spec.workers, tick)
        else:
            run_here(tasks, tick)

        outputs: dict[tuple[str, int], dict[str, dict[str, Tensor]]] = defaultdict(dict)
        done = {row.id for row in store.trials() if row.state == "done"}
        for trial in trials:
            if trial.id in done:
                outputs[trial.label, trial.seed][trial.part] = load_outputs(store, trial)
        analysis = problem.analyse(outputs)
        for name, table in analysis.tables.items():
            store.write_table(name, table)
        store.write_json("panel_info", {**problem.describe(), **analysis.facts})
    if spec.landscape and done:
        run_landscape(store, spec.landscape, workers=spec.workers, on_progress=on_landscape)
    return store


def _told(trial: TrialSpec) -> dict[str, Any]:
    """What the ledger keeps of a trial: not the outputs' hash, which may change after it is done."""
    return {name: value for name, value in asdict(trial).items() if name != "outputs"}


def _ticker(
    store: Store, trials: list[TrialSpec], on_progress: Callable[[Progress], None]
) -> Callable[[], None]:
    weight = {trial.id: trial.passes for trial in trials}
    most = {trial.id: trial.passes * trial.epochs for trial in trials}
    total = sum(most.values())
    started, before = time.monotonic(), -1.0

    def tick() -> None:
        nonlocal before
        rows = store.trials()
        epochs = dict(store.history().group_by("trial").len().iter_rows())
        work = sum(
            most[row.id] if row.state in ("done", "failed") else weight[row.id] * epochs.get(row.id, 0)
            for row in rows
        )
        if before < 0:
            before = work
        gained = work - before
        eta = (total - work) * (time.monotonic() - started) / gained if gained > 0 else None
        on_progress(Progress(tuple(rows), work, total, eta))

    tick()
    return tick


def _environment() -> dict[str, str | int]:
    packages = ("steppe", "torch", "numpy", "polars", "safetensors")
    versions: dict[str, str | int] = {name: importlib.metadata.version(name) for name in packages}
    return versions | {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "torch threads per trial": 1,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

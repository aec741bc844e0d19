"""What `steppe.study.landscape` is computed from: jobs of one trial each, whose results stay in the trial's folder.

A result's file is called after the hash of the job's settings: a run that is killed, or asked for more, does only what
is missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from steppe.core.checkpoint import load_tree, save_tree
from steppe.core.errors import DataError, SteppeError
from steppe.core.flat import flatten
from steppe.core.processes import pool
from steppe.core.seeding import generator
from steppe.landscape.directions import between, random_directions
from steppe.landscape.measures import measure
from steppe.landscape.point import Cost, Measurement, Point
from steppe.landscape.spectrum import density, lanczos
from steppe.landscape.surface import Surface, surface
from steppe.landscape.trajectory import Plane, pca, read_trajectory
from steppe.study.store import Store, TrialRow
from steppe.study.trial import make_problem

__all__ = ["DENSITY", "MODERATE", "Job", "Result", "job_of", "point_of_trial", "run_all", "trajectory_plane"]

MODERATE = {"trace": {"max_probes": 40}, "adaptive_average_case": {"max_pairs": 25}}
"""Of measures where a study asks for less than by default: means that nearly vanish, such as the trace of an indefinite
Hessian, can take hundreds of probes to a standard error of 10 %. What was reached is reported."""

DENSITY = {"probes": 4, "steps": 30}
"""Of spectral densities: the ends of a spectrum have converged by then, and a model costs 120 Hessian products."""

IDENTITY = 2
"""Raised when the meaning of a result changes, so that no stale one is taken for a new one."""

What = Literal["surface", "line", "eigenvectors", "density", "measure"]
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One thing to compute of one trial; ``settings`` and the split are its identity, ``file`` keeps its result."""

    folder: Path
    trial: str
    split: str
    data: tuple[int, int]
    what: What
    settings: Mapping[str, Any]
    file: Path

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.trial} {self.split} {self.settings.get('measure', self.what)}"


def job_of(
    store: Store, trial: str, split: str, data: tuple[int, int], what: What, settings: Mapping[str, Any]
) -> Job:
    """The job, with its file in the trial's folder."""
    content = {"identity": IDENTITY, "split": split, "data": data, **settings}
    if split == "test":  # the trial's own id says what it was trained on, not what it is tested on
        panel = store.read_json("panel_info", {}).get("fingerprint")
        content |= {"problem": store.spec["problem"], "panel": panel}
    text = json.dumps(content, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    name = f"{settings.get('measure', what)}-{split}-{digest}.safetensors"
    file = store.trial_folder(trial) / "landscape" / name
    return Job(store.folder, trial, split, data, what, settings, file)


def run_all(
    stages: Sequence[Sequence[Job]], workers: int, on_progress: Callable[[int, int, str], None]
) -> dict[Path, Result]:
    """Job's file -> result; jobs may read what those of an earlier stage left. What is there needs no worker."""
    jobs = [job for stage in stages for job in stage]
    results = {job.file: _run(job) for job in jobs if job.file.exists()}
    missing = [[job for job in stage if job.file not in results] for stage in stages]
    on_progress(len(results), len(jobs), "")
    most = min(workers, max(map(len, missing), default=0))
    with pool(most) if most else nullcontext() as executor:
        for stage in missing:
            for job, result in _ended(stage, executor):
                results[job.file] = result
                on_progress(len(results), len(jobs), job.name)
    return results


def _ended(stage: Sequence[Job], executor: Executor | None) -> Iterator[tuple[Job, Result]]:
    """The jobs with their results, as they end."""
    if executor is None:
        yield from ((job, _run(job)) for job in stage)
        return
    try:
        futures = {executor.submit(_run, job): job for job in stage}
        yield from ((futures[future], future.result()) for future in as_completed(futures))
    except BrokenProcessPool as error:
        raise SteppeError(
            "a worker process died, perhaps out of memory; the same command goes on where it ended."
        ) from error


def point_of_trial(
    store: Store, trial: str, split: str = "train", dates: int = 12, stocks: int = 125
) -> Point:
    """The model of a finished trial with its loss on ``"train"``, ``"validation"`` or ``"test"``.

    Args:
        store: of the study; the data are read from where they lay when it ran.
        trial: its id.
        split: the data to look at it with.
        dates, stocks: batches, each with the same weight, and samples of each, at most; evenly spaced.

    Raises:
        DataError: no such trial, or it is not done.
    """
    row = {row.id: row for row in store.trials() if row.state == "done"}.get(trial)
    if row is None:
        raise DataError(f"{store.folder} has no finished trial {trial!r}.")
    problem = make_problem(store.spec["problem"]).parts[row.part]
    model = problem.model(generator(row.seed, "model"))
    model.load_state_dict(_weights(store, trial))
    batches = problem.sample(split, dates, stocks)
    return Point(model, problem.loss, batches, weights=[1.0] * len(batches))


def trajectory_plane(store: Store, row: TrialRow) -> tuple[tuple[int, ...], Plane]:
    """The trial's epochs, and their plane through its best one.

    Raises:
        DataError: its trajectory was not recorded, or makes no plane.
    """
    way = read_trajectory(store.trial_folder(row.id))
    if row.best_epoch not in way.epochs:
        raise DataError(
            f"the trajectory of {row.id} lacks its best epoch {row.best_epoch}: its training began before trajectories "
            "were recorded. Run the study in a new folder, choose another plane, or leave out the surfaces."
        )
    return way.epochs, pca(way.thetas, way.epochs.index(row.best_epoch))


def _run(job: Job) -> Result:
    """The job's result, from its file where it was done before."""
    found: Result
    if job.file.exists():
        found = load_tree(job.file)
        return found
    job.file.parent.mkdir(exist_ok=True)
    store, point = Store.open(job.folder), _point(job.folder, job.trial, job.split, *job.data)
    try:
        found = _COMPUTE[job.what](job, store, point)
    except SteppeError as error:
        if job.what != "measure":
            raise
        # a row says why; not kept: it may be mended
        return _told(Measurement(math.nan, math.nan, False, Cost(), str(error)))
    save_tree(job.file, found)
    shutil.rmtree(_unfinished(job), ignore_errors=True)
    return found


def _surface(job: Job, store: Store, point: Point) -> Result:
    plane = job.settings.get("plane", "trajectory")
    row, theta = _row(store, job.trial), point.theta
    if plane == "trajectory":
        axes = trajectory_plane(store, row)[1].axes
    elif plane == "random":  # the same draw for every optimizer
        axes = random_directions(point, generator(row.seed, "random plane"))
    else:  # those of the train loss on both splits, and like the random ones as long as the weights
        axes = load_tree(job.file.with_name(job.settings["axes"]))["vectors"] * theta.norm()
    spans, resolution = job.settings["spans"], job.settings["resolution"]
    seen = surface(point, theta, axes, spans, resolution, adaptive=True, folder=_unfinished(job))
    return _tensors(seen)


def _line(job: Job, store: Store, point: Point) -> Result:
    tree = _weights(store, job.settings["origin"])
    origin = flatten(tree[name] for name in point.names)
    axis, resolution = between(origin, point.theta), job.settings["resolution"]
    return _tensors(surface(point, origin, axis, [(0.0, 1.0)], resolution, folder=_unfinished(job)))


def _eigenvectors(job: Job, store: Store, point: Point) -> Result:
    drawn = generator(_row(store, job.trial).seed, "eigenvectors")
    eigen = lanczos(point, drawn, job.settings["eigenvectors"])
    return {name: getattr(eigen, name) for name in ("values", "vectors", "residuals", "converged")}


def _density(job: Job, store: Store, point: Point) -> Result:
    found = density(point, generator(_row(store, job.trial).seed, "density"), **job.settings["density"])
    told = {name: getattr(found, name) for name in ("nodes", "weights", "converged")}
    return told | {"dim": point.dim}


def _measure(job: Job, store: Store, point: Point) -> Result:
    key = job.settings["measure"]
    drawn = generator(_row(store, job.trial).seed, "measure", key)
    return _told(measure(key, point, drawn, **MODERATE.get(key, {})))


_COMPUTE: dict[What, Callable[[Job, Store, Point], Result]] = {
    "surface": _surface,
    "line": _line,
    "eigenvectors": _eigenvectors,
    "density": _density,
    "measure": _measure,
}


def _tensors(seen: Surface) -> Result:
    return {name: torch.from_numpy(values) for name, values in vars(seen).items()}


def _unfinished(job: Job) -> Path:
    """The folder of what a surface has so far."""
    return job.file.with_suffix("")


def _told(taken: Measurement) -> Result:
    told = {name: getattr(taken, name) for name in ("value", "stderr", "converged", "note")}
    # a difference of sums of shares, whose last bits depend on what the point was asked before
    return told | {"forward": round(taken.cost.forward, 6), "gradient": round(taken.cost.gradient, 6)}


@functools.lru_cache(maxsize=4)
def _point(folder: Path, trial: str, split: str, dates: int, stocks: int) -> Point:
    # jobs of one trial follow each other, and its data take seconds to prepare
    return point_of_trial(Store.open(folder), trial, split, dates, stocks)


def _weights(store: Store, trial: str) -> dict[str, Tensor]:
    tree: dict[str, Tensor] = load_tree(store.trial_folder(trial) / "weights.safetensors")
    return tree


def _row(store: Store, trial: str) -> TrialRow:
    return next(row for row in store.trials() if row.id == trial)

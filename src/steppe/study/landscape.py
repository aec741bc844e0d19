"""Landscapes of finished trials: surfaces in the plane of their training, and flatness measures, as result tables.

    landscape_surface   the loss over the plane of each trial's trajectory, on train and test dates
    landscape_path      each epoch's weights in that plane
    landscape_axes      what its axes explain, beside a random walk's
    measures            `steppe.landscape.measures` of each trial

Every surface and every measure is a job of its own, whose result stays in the trial's folder under the hash of its
settings: a run that is killed, or asked for more, does only what is missing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from steppe.core.checkpoint import load_tree, save_tree
from steppe.core.errors import DataError, SpecError, SteppeError, unknown
from steppe.core.processes import one_thread, pool
from steppe.core.seeding import generator
from steppe.landscape.measures import MEASURES, measure
from steppe.landscape.point import Cost, Measurement, Point
from steppe.landscape.surface import surface
from steppe.landscape.trajectory import Plane, pca, read_trajectory
from steppe.study.spec import LandscapeSpec
from steppe.study.store import Store, TrialRow
from steppe.study.trial import make_problem

__all__ = ["check_measures", "point_of_trial", "run_landscape"]

MODERATE = {"trace": {"max_probes": 40}, "adaptive_average_case": {"max_pairs": 25}}
"""Of measures where a study asks for less than by default: means that nearly vanish, such as the trace of an indefinite
Hessian, can take hundreds of probes to a standard error of 10 %. What was reached is reported."""

IDENTITY = 2
"""Raised when the meaning of a result changes, so that no stale one is taken for a new one."""

MARGIN = 0.2
"""What a surface shows beyond the trajectories, as a share of their extent."""

_TABLES = {  # the columns that tell rows of a table apart
    "landscape_surface": ("trial", "split", "kind"),
    "landscape_path": ("trial",),
    "landscape_axes": ("trial",),
    "measures": ("trial", "split", "measure"),
}


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
    model.load_state_dict(load_tree(store.trial_folder(trial) / "weights.safetensors"))
    batches = problem.sample(split, dates, stocks)
    return Point(model, problem.loss, batches, weights=[1.0] * len(batches))


def check_measures(keys: Iterable[str]) -> None:
    """Raise a `SpecError` for a measure that is unknown or that a study cannot take."""
    for key in keys:
        if MEASURES[key].needs:
            raise SpecError(
                f"measure {key!r} needs {', '.join(MEASURES[key].needs)}: a study cannot take it."
            )


def run_landscape(
    store: Store,
    wanted: LandscapeSpec,
    *,
    workers: int = 2,
    on_progress: Callable[[int, int, str], None] = lambda done, total, job: None,
) -> None:
    """Compute what is missing for the chosen trials, and bring the tables up to date.

    Surfaces lie in the plane of each trial's own trajectory through its best weights
    (`steppe.landscape.trajectory.pca`), on train and test dates, for the first of the seeds. All show the same range,
    which covers every trajectory, so that they can be compared; another choice of optimizers may change it, and then
    computes them again. They are refined where the loss bends.

    Args:
        store: of the study; locked meanwhile.
        wanted: what of which trials.
        workers: processes with one thread each; 0 computes here.
        on_progress: called with the numbers of jobs done and in all, and the last one's name.

    Raises:
        SpecError: an unknown optimizer, seed, part or measure.
        DataError: no trial is done, or one lacks its trajectory.
        SteppeError: a worker died. A measure that cannot be taken does not raise: its row says why.
    """
    check_measures(wanted.measures)
    with store.lock(), one_thread():
        rows = _chosen(store, wanted.optimizers, wanted.seeds, wanted.part)
        drawn = [row for row in rows if wanted.surfaces and row.seed == rows[0].seed]
        planes = {row.id: _plane(store, row) for row in drawn}
        spans = _spans([plane.coordinates for _, plane in planes.values()]) if planes else []
        data = (wanted.dates, wanted.stocks)
        jobs = [
            _job(store, trial, split, data, {"resolution": wanted.resolution, "spans": spans})
            for trial in planes
            for split in ("train", "test")
        ]
        jobs += [
            _job(store, row.id, split, data, {"measure": key, **MODERATE.get(key, {})})
            for row in rows
            for split in wanted.measure_on
            for key in wanted.measures
        ]
        results = _run_all(jobs, workers, on_progress)
        tables = _tables(rows, planes, jobs, results)
        done = [row.id for row in store.trials() if row.state == "done"]
        for name, table in tables.items():
            if not table.is_empty():
                store.write_table(name, _beside(store, name, table, done))


@dataclass(frozen=True)
class _Job:
    """One surface or one measure of one trial."""

    folder: Path
    trial: str
    split: str
    data: tuple[int, int]
    settings: Mapping[str, Any]
    file: Path

    @property
    def name(self) -> str:
        return f"{self.trial} {self.split} {self.settings.get('measure', 'surface')}"


def _job(store: Store, trial: str, split: str, data: tuple[int, int], settings: Mapping[str, Any]) -> _Job:
    content = {"identity": IDENTITY, "split": split, "data": data, **settings}
    if split == "test":  # the trial's own id says what it was trained on, not what it is tested on
        panel = store.read_json("panel_info", {}).get("fingerprint")
        content |= {"problem": store.spec["problem"], "panel": panel}
    text = json.dumps(content, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    name = f"{settings.get('measure', 'surface')}-{split}-{digest}.safetensors"
    return _Job(store.folder, trial, split, data, settings, store.trial_folder(trial) / "landscape" / name)


def _run(job: _Job) -> dict[str, Any]:
    """The job's result, from its file where it was done before."""
    if job.file.exists():
        found: dict[str, Any] = load_tree(job.file)
        return found
    job.file.parent.mkdir(exist_ok=True)
    point = _point(job.folder, job.trial, job.split, *job.data)
    if key := job.settings.get("measure"):
        row = _row(Store.open(job.folder), job.trial)
        try:
            taken = measure(key, point, generator(row.seed, "measure", key), **MODERATE.get(key, {}))
        except SteppeError as error:  # not kept: it may be mended
            return _told(Measurement(math.nan, math.nan, False, Cost(), str(error)))
        save_tree(job.file, _told(taken))
        return _told(taken)
    store, unfinished = Store.open(job.folder), job.file.with_suffix("")
    _, plane = _plane(store, _row(store, job.trial))
    seen = surface(
        point,
        point.theta,
        plane.axes,
        job.settings["spans"],
        job.settings["resolution"],
        adaptive=True,
        folder=unfinished,
    )
    found = {name: torch.from_numpy(values) for name, values in vars(seen).items()}
    save_tree(job.file, found)
    shutil.rmtree(unfinished)
    return found


def _told(taken: Measurement) -> dict[str, Any]:
    told = {name: getattr(taken, name) for name in ("value", "stderr", "converged", "note")}
    # a difference of sums of shares, whose last bits depend on what the point was asked before
    return told | {"forward": round(taken.cost.forward, 6), "gradient": round(taken.cost.gradient, 6)}


def _run_all(
    jobs: Sequence[_Job], workers: int, on_progress: Callable[[int, int, str], None]
) -> list[dict[str, Any]]:
    """The results in the order of the jobs; those that are there already need no worker."""
    results = {job.file: _run(job) for job in jobs if job.file.exists()}
    todo = [job for job in jobs if job.file not in results]
    on_progress(len(results), len(jobs), "")
    if not workers:
        for job in todo:
            results[job.file] = _run(job)
            on_progress(len(results), len(jobs), job.name)
    elif todo:
        with pool(min(workers, len(todo))) as executor:
            futures = {executor.submit(_run, job): job for job in todo}
            try:
                for future in as_completed(futures):
                    results[futures[future].file] = future.result()
                    on_progress(len(results), len(jobs), futures[future].name)
            except BrokenProcessPool as error:
                raise SteppeError(
                    "a worker process died, perhaps out of memory; the same command goes on where it ended."
                ) from error
    return [results[job.file] for job in jobs]


@functools.lru_cache(maxsize=4)
def _point(folder: Path, trial: str, split: str, dates: int, stocks: int) -> Point:
    # jobs of one trial follow each other, and its data take seconds to prepare
    return point_of_trial(Store.open(folder), trial, split, dates, stocks)


def _row(store: Store, trial: str) -> TrialRow:
    return next(row for row in store.trials() if row.id == trial)


def _chosen(
    store: Store, optimizers: Sequence[str], seeds: Sequence[int], part: str | None
) -> list[TrialRow]:
    """The finished trials that are asked for, in the order of the plan."""
    rows = [row for row in store.trials() if row.state == "done"]
    if not rows:
        raise DataError(f"{store.folder} has no finished trial: run the study first.")
    parts = list(dict.fromkeys(row.part for row in rows))
    part = part or ([name for name in parts if name.startswith("daily")] or parts)[-1]
    _require("trained part", [part], parts)
    rows = [row for row in rows if row.part == part]
    labels, numbers = {row.optimizer for row in rows}, list(dict.fromkeys(row.seed for row in rows))
    _require("trained optimizer", optimizers, labels)
    _require("trained seed", seeds, numbers)
    wanted = [row for row in rows if row.optimizer in (optimizers or labels)]
    # by seed in the order asked for: the first is the one of the surfaces
    return [row for seed in (seeds or numbers[:1]) for row in wanted if row.seed == seed]


def _require(kind: str, given: Iterable[Any], known: Iterable[Any]) -> None:
    for one in given:
        if one not in known:
            raise SpecError(unknown(kind, one, map(str, known)))


def _plane(store: Store, row: TrialRow) -> tuple[tuple[int, ...], Plane]:
    """The trial's epochs, and their plane through its best one."""
    way = read_trajectory(store.trial_folder(row.id))
    if row.best_epoch not in way.epochs:
        raise DataError(
            f"the trajectory of {row.id} lacks its best epoch {row.best_epoch}: its training began before trajectories "
            "were recorded. Run the study in a new folder, or leave out the surfaces."
        )
    return way.epochs, pca(way.thetas, way.epochs.index(row.best_epoch))


def _spans(paths: Sequence[torch.Tensor]) -> list[tuple[float, float]]:
    """One range per axis that holds all paths ``[E, 2]`` with a margin; the shorter is at least half of the longer."""
    points = torch.cat(list(paths))
    low, high = points.min(0).values, points.max(0).values
    middle, half = (low + high) / 2, (high - low) * (0.5 + MARGIN)
    half = half.clamp_min(float(half.max()) / 2)
    # rounded, so that the last bits of a principal component do not make another surface
    digits = 2 - math.floor(math.log10(float(half.max())))
    return [
        (round(float(m - h), digits), round(float(m + h), digits)) for m, h in zip(middle, half, strict=True)
    ]


def _tables(
    rows: Sequence[TrialRow],
    planes: Mapping[str, tuple[tuple[int, ...], Plane]],
    jobs: Sequence[_Job],
    results: Sequence[Mapping[str, Any]],
) -> dict[str, pl.DataFrame]:
    about = {
        row.id: {"trial": row.id, "optimizer": row.optimizer, "seed": row.seed, "part": row.part}
        for row in rows
    }
    tables: dict[str, list[Any]] = {name: [] for name in _TABLES}
    for job, result in zip(jobs, results, strict=True):
        of = {**about[job.trial], "split": job.split, "dates": job.data[0], "stocks": job.data[1]}
        if key := job.settings.get("measure"):
            tables["measures"].append(pl.DataFrame({**of, "measure": key} | dict(result)))
            continue
        y, x = torch.meshgrid(result["y"], result["x"], indexing="ij")
        columns = {"x": x, "y": y, "loss": result["loss"], "computed": result["computed"]}
        flat = {name: values.flatten().numpy() for name, values in columns.items()}
        tables["landscape_surface"].append(_table({**of, "kind": "pca"}, flat))
    for trial, (epochs, plane) in planes.items():
        x, y = plane.coordinates.T.numpy()
        tables["landscape_path"].append(_table(about[trial], {"epoch": epochs, "x": x, "y": y}))
        shares = ("explained", "null", "explained_centred", "null_centred")
        told = {name: getattr(plane, name).numpy() for name in shares}
        tables["landscape_axes"].append(_table(about[trial], {"axis": [1, 2], **told}))
    return {name: pl.concat(found) if found else pl.DataFrame() for name, found in tables.items()}


def _table(constant: Mapping[str, Any], columns: Mapping[str, Any]) -> pl.DataFrame:
    """The constant columns, then the others."""
    rows = len(next(iter(columns.values())))
    return pl.DataFrame({name: [value] * rows for name, value in constant.items()} | dict(columns))


def _beside(store: Store, name: str, table: pl.DataFrame, done: Sequence[str]) -> pl.DataFrame:
    """The table with the rows of an earlier one that it does not replace and whose trials are still there."""
    if name not in store.tables():
        return table
    old = store.table(name).filter(pl.col("trial").is_in(done))
    return pl.concat([old.join(table, on=list(_TABLES[name]), how="anti", maintain_order="left"), table])

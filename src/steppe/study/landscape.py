"""Landscapes of finished trials, and flatness measures, as result tables.

landscape_surface       the loss over a plane through each trial's weights, on train and test dates
landscape_path          each epoch's weights in the plane of its trajectory
landscape_axes          what the axes of that plane explain, beside a random walk's
landscape_eigenvalues   of the axes of the plane of Hessian eigenvectors
landscape_line          the loss on the straight way between the weights of two trials
landscape_density       the spectral density of the Hessian, as quadrature nodes and weights
measures                `steppe.landscape.measures` of each trial
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import polars as pl
import torch

from steppe.core.errors import DataError, SpecError, unknown
from steppe.core.processes import one_thread
from steppe.landscape.measures import MEASURES
from steppe.landscape.trajectory import Plane
from steppe.study.landscape_jobs import (
    DENSITY,
    MODERATE,
    Job,
    Result,
    job_of,
    point_of_trial,
    run_all,
    trajectory_plane,
)
from steppe.study.spec import LandscapeSpec
from steppe.study.store import Store, TrialRow

__all__ = ["check_measures", "point_of_trial", "run_landscape"]

MARGIN = 0.2
"""What a surface shows beyond the trajectories, as a share of their extent."""

REACH = {"random": 1.0, "eigenvectors": 0.05}
"""How far a surface goes along other axes, over the length of the weights. Random directions bend little and are shown
as far as Li et al. 2018 do; eigenvectors of the largest eigenvalues leave the basin in a twentieth of that."""

_TABLES = {  # the columns that tell rows of a table apart
    "landscape_surface": ("trial", "split", "kind"),
    "landscape_path": ("trial",),
    "landscape_axes": ("trial",),
    "landscape_eigenvalues": ("trial",),
    "landscape_line": ("trial", "origin", "split"),
    "landscape_density": ("trial", "split"),
    "measures": ("trial", "split", "measure"),
}

_SPLITS = ("train", "test")


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

    Surfaces lie in a plane through each trial's best weights, on train and test dates, for the first of the seeds. All
    show the same range, so that they can be compared: one that covers every trajectory (another choice of optimizers
    may change it, and then computes them again), or `REACH`. They are refined where the loss bends.

    Args:
        store: of the study; locked meanwhile.
        wanted: what of which trials.
        workers: processes with one thread each; 0 computes here.
        on_progress: called with the numbers of jobs done and in all, and the last one's name.

    Raises:
        SpecError: an unknown optimizer, seed, part or measure.
        DataError: no trial is done, one lacks its trajectory, or lines are wanted and no two trials make one.
        SteppeError: a worker died. A measure that cannot be taken does not raise: its row says why.
    """
    check_measures(wanted.measures)
    with store.lock(), one_thread():
        rows = _chosen(store, wanted.optimizers, wanted.seeds, wanted.part)
        drawn = [row for row in rows if row.seed == rows[0].seed]
        planes = {}
        if wanted.surfaces and wanted.plane == "trajectory":
            planes = {row.id: trajectory_plane(store, row) for row in drawn}
        data = (wanted.dates, wanted.stocks)
        axes = []
        if wanted.surfaces and wanted.plane == "eigenvectors":
            settings = {"eigenvectors": 2}
            axes = [job_of(store, row.id, "train", data, "eigenvectors", settings) for row in drawn]
        jobs = _surfaces(store, wanted, drawn, planes, axes) if wanted.surfaces else []
        jobs += [
            job_of(store, end.id, split, data, "line", {"origin": start.id, "resolution": wanted.resolution})
            for start, end in _lines(store, rows, wanted.lines)
            for split in _SPLITS
        ]
        if wanted.density:
            jobs += [job_of(store, row.id, "train", data, "density", {"density": DENSITY}) for row in drawn]
        jobs += [
            job_of(store, row.id, split, data, "measure", {"measure": key, **MODERATE.get(key, {})})
            for row in rows
            for split in wanted.measure_on
            for key in wanted.measures
        ]
        results = run_all((axes, jobs), workers, on_progress)
        tables = _tables(rows, planes, [(job, results[job.file]) for job in (*axes, *jobs)])
        done = [row.id for row in store.trials() if row.state == "done"]
        for name, table in tables.items():
            if not table.is_empty():
                store.write_table(name, _beside(store, name, table, done))


def _surfaces(
    store: Store,
    wanted: LandscapeSpec,
    rows: Sequence[TrialRow],
    planes: Mapping[str, tuple[tuple[int, ...], Plane]],
    axes: Sequence[Job],
) -> list[Job]:
    """A job per trial and split."""
    settings: dict[str, Any] = {"resolution": wanted.resolution}
    if wanted.plane == "trajectory":
        settings["spans"] = _spans([plane.coordinates for _, plane in planes.values()])
    else:
        reach = REACH[wanted.plane]
        settings |= {"spans": [(-reach, reach)] * 2, "plane": wanted.plane}
    along = {job.trial: {"axes": job.file.name} for job in axes}
    data = (wanted.dates, wanted.stocks)
    return [
        job_of(store, row.id, split, data, "surface", settings | along.get(row.id, {}))
        for row in rows
        for split in _SPLITS
    ]


def _lines(store: Store, rows: Sequence[TrialRow], wanted: Iterable[str]) -> list[tuple[TrialRow, TrialRow]]:
    """The trials at the two ends of each line: from the baseline, or the first seed, to each of the others."""
    found = []
    for kind in dict.fromkeys(wanted):
        if kind == "optimizers":
            among = [row for row in rows if row.seed == rows[0].seed]
            base = next((row for row in among if row.optimizer == store.spec["baseline"]), among[0])
            pairs = [(base, row) for row in among if row is not base]
        else:
            first = {row.optimizer: row for row in reversed(rows)}
            pairs = [(first[row.optimizer], row) for row in rows if row is not first[row.optimizer]]
        if not pairs:
            raise DataError(f"lines between {kind} need two finished trials; choose more {kind}.")
        found += pairs
    return found


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
    found: Iterable[tuple[Job, Result]],
) -> dict[str, pl.DataFrame]:
    about = {
        row.id: {"trial": row.id, "optimizer": row.optimizer, "seed": row.seed, "part": row.part}
        for row in rows
    }
    tables: dict[str, list[pl.DataFrame]] = {name: [] for name in _TABLES}
    for job, result in found:
        of = {**about[job.trial], "split": job.split, "dates": job.data[0], "stocks": job.data[1]}
        name, table = _rows(job, result, of)
        tables[name].append(table)
    for trial, (epochs, plane) in planes.items():
        x, y = plane.coordinates.T.numpy()
        tables["landscape_path"].append(_table(about[trial], {"epoch": epochs, "x": x, "y": y}))
        shares = ("explained", "null", "explained_centred", "null_centred")
        told = {name: getattr(plane, name).numpy() for name in shares}
        tables["landscape_axes"].append(_table(about[trial], {"axis": [1, 2], **told}))
    return {name: pl.concat(parts) if parts else pl.DataFrame() for name, parts in tables.items()}


def _rows(job: Job, result: Result, of: Mapping[str, Any]) -> tuple[str, pl.DataFrame]:
    """The table that a job's result belongs to, and its rows there."""
    if job.what == "surface":
        y, x = torch.meshgrid(result["y"], result["x"], indexing="ij")
        columns = {"x": x, "y": y, "loss": result["loss"], "computed": result["computed"]}
        flat = {name: values.flatten().numpy() for name, values in columns.items()}
        # the plane of a trajectory is called after how its axes are found
        return "landscape_surface", _table({**of, "kind": job.settings.get("plane", "pca")}, flat)
    if job.what == "line":
        columns = {"t": result["x"].numpy(), "loss": result["loss"].flatten().numpy()}
        return "landscape_line", _table({**of, "origin": job.settings["origin"]}, columns)
    if job.what == "eigenvectors":
        columns = {"eigenvalue": result["values"].numpy(), "residual": result["residuals"].numpy()}
        axes = list(range(1, len(result["values"]) + 1))
        constant = {**of, "converged": result["converged"]}
        return "landscape_eigenvalues", _table(constant, {"axis": axes, **columns})
    if job.what == "density":
        columns = {"eigenvalue": result["nodes"].numpy(), "weight": result["weights"].numpy()}
        constant = {**of, "dim": result["dim"], "converged": result["converged"]}
        return "landscape_density", _table(constant, columns)
    return "measures", pl.DataFrame({**of, "measure": job.settings["measure"]} | dict(result))


def _table(constant: Mapping[str, Any], columns: Mapping[str, Any]) -> pl.DataFrame:
    """The constant columns, then the others."""
    rows = len(next(iter(columns.values())))
    return pl.DataFrame({name: [value] * rows for name, value in constant.items()} | dict(columns))


def _beside(store: Store, name: str, table: pl.DataFrame, done: Sequence[str]) -> pl.DataFrame:
    """The table with the rows of an earlier one that it does not replace and whose trials are still there."""
    if name not in store.tables():
        return table
    old = store.table(name)
    ends = [column for column in ("trial", "origin") if column in old.columns]
    old = old.filter(pl.all_horizontal(pl.col(ends).is_in(done)))
    return pl.concat([old.join(table, on=list(_TABLES[name]), how="anti", maintain_order="left"), table])

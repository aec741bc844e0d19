"""Tables of a study of functions: how low, how soon, at what cost; and the published figures beside ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from markupsafe import Markup

from steppe.report.cells import (
    DASH,
    Column,
    Row,
    Table,
    chip,
    finite,
    flatten,
    number,
    plain,
    significant,
    two_lines,
)
from steppe.report.function_results import Functions, Problem, Run

__all__ = ["ends", "printed"]


def ends(functions: Functions, problem: Problem) -> Table:
    """One row per optimizer: lowest losses over seeds, evaluations to the floor, cost, distance from a minimum."""
    results, reached = functions.results, functions.reached(problem)
    rows: list[dict[str, Any]] = []
    for label, runs in functions.runs(problem.part).items():
        lowest = sorted(run.lowest for run in runs)
        rows.append(
            {
                "optimizer": label,
                "settings": _settings(results.spec["optimizers"][label]),
                "runs": len(runs),
                "diverged": sum(run.diverged for run in runs),
                "best": lowest[0],
                "median": float(np.median(lowest)),
                "worst": lowest[-1],
                "final_median": float(np.median([run.final for run in runs])),
                "reached": reached[label].seeds,
                "evaluations_to_floor": reached[label].median,
                "forward": _mean(runs, lambda run: run.forward),
                "gradient": _mean(runs, lambda run: run.gradient),
                "seconds": _mean(runs, lambda run: run.seconds),
                "distance": _distance(problem, runs),
            }
        )

    def name(row: Row) -> Markup:
        mark = Markup(' <span class="bad">diverged</span>') if row["diverged"] else Markup("")
        return chip(results, row["optimizer"]) + mark

    def loss(key: str) -> Callable[[Row], str]:
        return lambda row: (
            significant(row[key], 5) if finite(row[key]) else "∞" if row["diverged"] else "failed"
        )

    def to_floor(row: Row) -> str:
        if not row["reached"]:
            return "not reached"
        of = "" if row["reached"] == row["runs"] else f"{row['reached']} of {row['runs']} seeds"
        return two_lines(number(row["evaluations_to_floor"], 0), of)

    def over_seeds(row: Row) -> Markup:
        best, worst = loss("best")(row), loss("worst")(row)
        return two_lines(loss("median")(row), f"{best} to {worst}" if best != worst else "")

    several = any(row["runs"] > 1 for row in rows)
    columns = [
        Column("Optimizer", name, numeric=False),
        Column("Settings", lambda row: two_lines(*row["settings"].partition(", ")[::2]), numeric=False),
        Column(
            "Lowest loss, median of seeds" if several else "Lowest loss", over_seeds, best=-1, key="median"
        ),
        Column("At the end", loss("final_median")),
        Column("Evaluations to the floor", to_floor),
    ]
    if any(row["forward"] > 0 for row in rows):
        columns.append(Column("Forward passes", lambda row: number(row["forward"], 0)))
    columns += [
        Column("Gradients", lambda row: number(row["gradient"], 0)),
        Column("CPU s", lambda row: number(row["seconds"], 2)),
    ]
    if any(finite(row["distance"]) for row in rows):
        columns.append(Column("Distance to a minimum", lambda row: significant(row["distance"], 3)))
    floor = "the floor is not known, so the lowest loss found stands for it"
    if problem.floor is not None:
        floor = f"floor {plain(problem.floor, 7)}"
    caption = f"{problem.title}: {floor}; reached means at or below {plain(functions.target(problem), 4)}."
    return Table(f"ends-{problem.part}", caption, columns, rows)


def printed(functions: Functions, problem: Problem) -> Table:
    """The publication's figures, and ours of the optimizer that is called as a figure is."""
    ours = {_plain(label): runs for label, runs in functions.runs(problem.part).items()}
    rows: list[dict[str, Any]] = []
    for what, value in problem.printed.items():
        runs = ours.get(_plain(what), [])
        rows.append(
            {
                "what": what,
                "printed": value,
                "ours": float(np.median([run.lowest for run in runs])) if runs else math.nan,
                "best": min((run.lowest for run in runs), default=math.nan),
                "worst": max((run.lowest for run in runs), default=math.nan),
            }
        )
    columns = [
        Column("Published", lambda row: row["what"], numeric=False),
        Column("Printed", lambda row: _told(row["printed"])),
    ]
    if any(finite(row["ours"]) for row in rows):

        def span(row: Row) -> str:
            if not finite(row["ours"]):
                return DASH
            low, high = significant(row["best"], 5), significant(row["worst"], 5)
            return two_lines(significant(row["ours"], 5), f"[{low}, {high}]" if low != high else "")

        columns.append(Column("Ours, median over seeds [best, worst]", span))
    return Table(f"printed-{problem.part}", f"Figures of {problem.source}", columns, rows)


def _told(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_told, value))
    return str(value).replace("-", "\N{MINUS SIGN}")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _settings(settings: Any) -> str:
    """The kind and the few numbers a reader looks for; all of them are under Settings."""
    shown = (
        "lr",
        "momentum",
        "alpha",
        "rho",
        "form",
        "sigma",
        "population",
        "local_search",
        "bounds",
    )
    known = {key: value for key, value in settings.items() if key in shown}
    return ", ".join([str(settings.get("kind")), *(f"{key} {value}" for key, value in flatten(known))])


def _mean(runs: list[Run], of: Callable[[Run], float]) -> float:
    known = [value for run in runs if math.isfinite(value := of(run))]
    return sum(known) / len(known) if known else math.nan


def _distance(problem: Problem, runs: list[Run]) -> float:
    """From the last weights to the nearest minimum, median over seeds; NaN without a path or known minima."""
    if problem.minima.shape[1] != 2:
        return math.nan
    last = [run.path[-1] for run in runs if run.path.size]
    gaps = [float(np.linalg.norm(problem.minima - end, axis=1).min()) for end in last]
    return float(np.median(gaps)) if gaps else math.nan

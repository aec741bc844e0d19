"""The tables of the landscapes: measures, what the axes of planes are, barriers, measures against generalisation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import polars as pl
from markupsafe import Markup

from steppe.report.cells import (
    DASH,
    Column,
    Row,
    Table,
    chip,
    finite,
    interval,
    number,
    percent,
    significant,
    two_lines,
)
from steppe.report.landscape_curves import lines
from steppe.report.landscapes import Landscapes, facts_of, sample_of
from steppe.study.statistics import FEWEST, p_text

__all__ = ["associations", "barriers", "eigenvalues", "explained", "measures"]

DAGGER = "\N{DAGGER}"

PERFECT = "perfect order"
"""What stands where an interval cannot."""


def measures(landscapes: Landscapes) -> list[Table]:
    """One table per part and split: an optimizer per row, a measure per column."""
    return [
        _measures(landscapes, part, split) for part in landscapes.parts for split in landscapes.splits(part)
    ]


def _measures(landscapes: Landscapes, part: str, split: str) -> Table:
    results = landscapes.results
    keys = [
        key
        for key in landscapes.keys(part)
        if any(landscapes.taken(part, split, label, key) for label in landscapes.labels(part))
    ]
    rows: list[dict[str, Any]] = []
    for label in landscapes.labels(part):
        row: dict[str, Any] = {"optimizer": label}
        for key in keys:
            taken = landscapes.taken(part, split, label, key)
            row |= {
                key: taken.value if taken else None,
                f"{key}_stderr": taken.stderr if taken else None,
                f"{key}_trials": taken.trials if taken else 0,
                f"{key}_converged": taken.converged if taken else None,
            }
        rows.append(row)
    columns = [Column("Optimizer", lambda r: chip(results, r["optimizer"]), numeric=False)]
    columns += [
        Column(
            facts_of(key).title + ("" if facts_of(key).invariant else "\N{NO-BREAK SPACE}*"),
            partial(_measure_cell, key=key),
            best=1 if facts_of(key).larger == "flatter" else -1,
            key=key,
        )
        for key in keys
    ]
    trials = max((row[f"{key}_trials"] for row in rows for key in keys), default=0)
    several = f"; means over {trials} seeds" if trials > 1 else ""
    unfinished = any(row[f"{key}_converged"] is False for row in rows for key in keys)
    caption = (
        f"Flatness on {split} dates{_of(landscapes, part)}{several}. ± is the standard error of the measurement; bold "
        "is the flattest. * depends on the scale of the layers, which the function does not."
        + (f" {DAGGER} did not converge." if unfinished else "")
    )
    return Table(f"measures-{part}-{split}", caption, columns, rows)


def _measure_cell(row: Row, key: str) -> Markup | str:
    value = significant(row[key])
    if row[f"{key}_converged"] is False:
        value += DAGGER
    stderr = row[f"{key}_stderr"]
    return two_lines(value, f"± {significant(stderr, 2)}" if finite(stderr) else "")


def explained(landscapes: Landscapes) -> Table:
    """What two axes explain of each trajectory, over what they explain of a random walk of the same steps."""
    results = landscapes.results
    rows: list[dict[str, Any]] = []
    for part in landscapes.parts:
        for label in results.optimizers:
            found = landscapes.axes.filter(pl.col("part") == part, pl.col("optimizer") == label)
            for (seed,), axes in sorted(found.partition_by("seed", as_dict=True).items()):
                row: dict[str, Any] = {"optimizer": label, "part": part, "seed": seed}
                for share in ("explained", "null", "explained_centred", "null_centred"):
                    of = dict(axes.select("axis", share).iter_rows())
                    row |= {f"{share}_{axis}": of.get(axis) for axis in (1, 2)}
                    row[f"{share}_both"] = of[1] + of[2] if {1, 2} <= set(of) else None
                rows.append(row)
    columns = [Column("Optimizer", lambda r: chip(results, r["optimizer"]), numeric=False), *_where(rows)]
    columns += [
        Column(title + about, partial(_share_cell, axis=axis, centred=centred))
        for centred, about in (("", ""), ("_centred", ", about the mean"))
        for axis, title in (("1", "Axis 1"), ("2", "Axis 2"), ("both", "Both"))
    ]
    caption = (
        "Share of the trajectory that the plane’s axes explain, about the kept weights and about the mean of the "
        "epochs. Small: of a random walk with the same step lengths, which has no direction to explain."
    )
    return Table("landscape-axes", caption, columns, rows)


def _share_cell(row: Row, axis: str, centred: str) -> Markup | str:
    null = row[f"null{centred}_{axis}"]
    return two_lines(
        percent(row[f"explained{centred}_{axis}"]), f"walk {percent(null)}" if finite(null) else ""
    )


def eigenvalues(landscapes: Landscapes) -> Table:
    """The largest eigenvalues of the Hessian of the train loss, whose eigenvectors are the axes of a plane."""
    if landscapes.eigenvalues.is_empty():
        return Table("landscape-eigenvalues", "", [])
    results = landscapes.results
    rows: list[dict[str, Any]] = []
    for part in landscapes.parts:
        for label in results.optimizers:
            found = landscapes.eigenvalues.filter(pl.col("part") == part, pl.col("optimizer") == label)
            for (seed,), axes in sorted(found.partition_by("seed", as_dict=True).items()):
                row: dict[str, Any] = {"optimizer": label, "part": part, "seed": seed}
                for axis, value, residual in axes.select("axis", "eigenvalue", "residual").iter_rows():
                    row |= {f"eigenvalue_{axis}": value, f"residual_{axis}": residual}
                rows.append(row | {"converged": axes["converged"].all()})
    unfinished = any(not row["converged"] for row in rows)
    columns = [
        Column("Optimizer", lambda r: chip(results, r["optimizer"]), numeric=False),
        *_where(rows),
        Column("Axis 1", partial(_eigenvalue_cell, axis=1), best=-1, key="eigenvalue_1"),
        Column("Axis 2", partial(_eigenvalue_cell, axis=2), best=-1, key="eigenvalue_2"),
    ]
    caption = (
        "Eigenvalues of the train loss’s Hessian that belong to the axes of the eigenvectors’ plane, on "
        f"{sample_of(landscapes.eigenvalues)}. An eigenvalue lies within ± of each; bold is the flattest."
        + (f" {DAGGER} did not converge." if unfinished else "")
    )
    return Table("landscape-eigenvalues", caption, columns, rows)


def _eigenvalue_cell(row: Row, axis: int) -> Markup | str:
    value = significant(row[f"eigenvalue_{axis}"]) + ("" if row["converged"] else DAGGER)
    return two_lines(value, f"± {significant(row[f'residual_{axis}'], 1)}")


def barriers(landscapes: Landscapes) -> list[Table]:
    """One table per part: the barrier of each line, per split."""
    tables = []
    for part in landscapes.parts:
        found = [one for among in lines(landscapes, part).values() for one in among]
        if not found:
            continue
        splits = list(dict.fromkeys(one.split for one in found))
        of: dict[tuple[Any, ...], dict[str, Any]] = {}
        for one in found:
            names = ("from", "from_seed", "optimizer", "seed")
            row = of.setdefault((one.start, one.end), dict(zip(names, (*one.start, *one.end), strict=True)))
            row |= {f"barrier_{one.split}": one.barrier, f"at_{one.split}": one.highest}
        columns = [
            Column("From", lambda r: f"{r['from']}, seed {r['from_seed']}", numeric=False),
            Column("To", lambda r: chip(landscapes.results, r["optimizer"]), numeric=False),
            Column("Seed", lambda r: number(r["seed"], 0)),
        ]
        columns += [
            Column(f"Barrier, {split}", partial(_barrier_cell, split=split), best=-1, key=f"barrier_{split}")
            for split in splits
        ]
        caption = (
            f"Barriers on the straight way between kept weights{_of(landscapes, part)}: how far the loss rises above "
            "the straight line between the losses at its ends, at most, and where; on "
            f"{sample_of(landscapes.lines.filter(pl.col('part') == part))}. Bold is the lowest."
        )
        tables.append(Table(f"barriers-{part}", caption, columns, list(of.values())))
    return tables


def _barrier_cell(row: Row, split: str) -> Markup | str:
    if row[f"barrier_{split}"] == 0:
        return "none"
    return two_lines(significant(row[f"barrier_{split}"], 2), f"at {number(row[f'at_{split}'], 2)}")


def _where(rows: Sequence[Row]) -> list[Column]:
    """Columns for part and seed, where there are several."""
    columns = []
    if len({row["part"] for row in rows}) > 1:
        columns.append(Column("Part", lambda r: r["part"], numeric=False))
    if len({row["seed"] for row in rows}) > 1:
        columns.append(Column("Seed", lambda r: number(r["seed"], 0)))
    return columns


def associations(landscapes: Landscapes) -> list[Table]:
    """One table per part: Kendall's tau between each measure and each outcome, across trials."""
    tables = []
    for part in landscapes.parts:
        rows: list[dict[str, Any]] = [
            {
                "measure": link.measure,
                "outcome": link.outcome,
                "trials": link.association.n,
                "tau": link.association.tau,
                "tau_low": link.association.low,
                "tau_high": link.association.high,
                "p": link.association.p,
                "p_holm": link.p_holm,
                "for_flatness": link.sign,
            }
            for link in landscapes.links(part)
        ]
        columns = [
            Column("Measure", _measure_name, numeric=False),
            Column("Against", lambda r: r["outcome"], numeric=False),
            Column("Trials", lambda r: number(r["trials"], 0)),
            Column("Kendall’s τ", lambda r: number(r["tau"], 2, sign=True)),
            Column("95 % interval", _tau_interval),
            Column("Flatter is better if", lambda r: "τ < 0" if r["for_flatness"] < 0 else "τ > 0"),
            Column("p (Holm)", lambda r: p_text(r["p_holm"]) if finite(r["p_holm"]) else DASH),
        ]
        caption = (
            f"Measures on train dates against generalisation, across trials{_of(landscapes, part)}. Intervals are from "
            "a bootstrap over trials; p is from permutations, all of them for up to seven trials."
        )
        if any(_tau_interval(row) == PERFECT for row in rows):
            caption += " A perfect order has no interval: every resample of it is perfect too."
        if any(row["trials"] < FEWEST for row in rows):
            caption += f" Fewer than {FEWEST} trials are too few: chance alone could order them perfectly."
        tables.append(Table(f"flatness-{part}", caption, columns, rows))
    return [table for table in tables if table.rows]


def _tau_interval(row: Row) -> str:
    if row["trials"] < FEWEST:
        return "too few trials"
    if abs(row["tau"]) == 1:
        return PERFECT
    return interval(row["tau_low"], row["tau_high"], 2, sign=True) or DASH


def _measure_name(row: Row) -> str:
    facts = facts_of(row["measure"])
    return facts.title + (" (more is flatter)" if facts.larger == "flatter" else "")


def _of(landscapes: Landscapes, part: str) -> str:
    return f", {part}" if len(landscapes.results.parts) > 1 else ""

"""The tables of the report: numbers for the CSV files, and how each is written on the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from markupsafe import Markup

from steppe.report.cells import (
    DASH,
    Column,
    Row,
    Table,
    chip,
    finite,
    interval,
    is_best,
    number,
    outcome,
    percent,
    score_name,
    significant,
    times,
    two_lines,
    whisker,
)
from steppe.report.results import Cost, Results, frequency
from steppe.report.series import mean
from steppe.study.statistics import Comparison, p_text
from steppe.study.store import TrialRow

__all__ = ["costs", "factor_tests", "leaderboard", "steps"]


def leaderboard(results: Results) -> Table:
    """Optimizers by test RankIC of the final score: quality, cost, and the difference to the baseline."""
    rows: list[dict[str, Any]] = []
    for label in results.shown:
        score = results.estimates.get(label)
        cost = results.costs.get(label)
        c = results.comparisons.get(label) or results.reference_comparisons.get(label)
        rows.append(
            {
                "optimizer": label,
                "seeds": score.n_seeds if score else 0,
                "dates": score.n_dates if score else 0,
                "rank_ic": score.mean if score else None,
                "rank_ic_low": score.low if score else None,
                "rank_ic_high": score.high if score else None,
                "icir": results.icir(label, results.final),
                **{
                    key: results.factor_mean(label, results.final, key)
                    for key in ("top_annual_return", "top_annual_excess", "top_information_ratio")
                },
                **_cost_row(cost),
                "difference": c.difference if c else None,
                "difference_low": c.low if c else None,
                "difference_high": c.high if c else None,
                "p": c.p if c else None,
                "p_holm": c.p_holm if c else None,
                "outcome": _outcome(label, results.baseline, c),
            }
        )
    rows.sort(key=lambda row: -row["rank_ic"] if finite(row["rank_ic"]) else math.inf)
    scale = max(
        (abs(row[key]) for row in rows for key in ("difference_low", "difference_high") if finite(row[key])),
        default=0.0,
    )
    columns = [
        Column("Optimizer", lambda r: chip(results, r["optimizer"]), numeric=False),
        Column(
            "RankIC",
            lambda r: two_lines(number(r["rank_ic"], 4), interval(r["rank_ic_low"], r["rank_ic_high"], 3)),
            best=1,
            key="rank_ic",
        ),
        Column("ICIR", lambda r: number(r["icir"], 2), best=1, key="icir"),
        Column("Top layer", lambda r: percent(r["top_annual_return"]), best=1, key="top_annual_return"),
        Column("Excess", lambda r: percent(r["top_annual_excess"]), best=1, key="top_annual_excess"),
        Column("IR", lambda r: number(r["top_information_ratio"], 2), best=1, key="top_information_ratio"),
        Column("Gradients", lambda r: times(r["gradient_ratio"])),
        Column("Seconds", lambda r: times(r["seconds_ratio"])),
        Column(
            "RankIC − baseline",
            lambda r: two_lines(
                number(r["difference"], 4, sign=True),
                interval(r["difference_low"], r["difference_high"], 3, sign=True),
            ),
        ),
        Column("", lambda r: whisker(results, r, scale), numeric=False),
        Column(
            "Told from chance?",
            lambda r: two_lines(outcome(r["outcome"]), p_text(r["p_holm"]) if finite(r["p_holm"]) else ""),
            numeric=False,
        ),
    ]
    caption = (
        f"Test block, {score_name(results.final)}. Intervals are 95 %. Cost is the whole training up to early "
        "stopping, relative to the baseline. Top layer and its excess over equal weight are per year."
    )
    return Table("leaderboard", caption, columns, rows)


def _count(value: float | None) -> str:
    return number(value, 0)


def _two(value: float | None) -> str:
    return number(value, 2)


def _four(value: float | None) -> str:
    return number(value, 4)


def _correlation(key: str, name: str) -> dict[str, tuple[str, Callable[[float | None], str], int]]:
    """The five figures the factor test gives of one correlation."""
    return {
        key: (name, _four, 1),
        f"{key}_stderr": (f"{name}, standard error", _four, 0),
        f"{key}_std": (f"{name}, deviation over dates", _four, 0),
        f"{key}_ir": (f"{name} to its deviation (ICIR)", _two, 1),
        f"{key}_positive": (f"{name}, dates above 0", percent, 1),
    }


FACTOR_ROWS: dict[str, tuple[str, Callable[[float | None], str], int]] = {
    **_correlation("rank_ic", "RankIC"),
    **_correlation("rank_ic_5", "RankIC, next 5 sessions"),
    **_correlation("rank_ic_neutral", "RankIC, industry and size taken out"),
    **_correlation("ic", "IC"),
    "top_annual_return": ("Top layer, return p.a.", percent, 1),
    "universe_annual_return": ("Equal-weight universe, return p.a.", percent, 0),
    "top_annual_excess": ("Top layer, excess p.a.", percent, 1),
    "top_tracking_error": ("Top layer, tracking error p.a.", percent, 0),
    "top_information_ratio": ("Top layer, information ratio", _two, 1),
    "top_max_drawdown": ("Top layer, maximum drawdown of the excess", percent, -1),
    "top_monthly_win_rate": ("Top layer, months ahead", percent, 1),
    "top_turnover": ("Top layer, turnover per rebalance (two-sided)", percent, 0),
    "top_annual_return_10": ("Top layer held ten sessions, return p.a.", percent, 1),
    "top_annual_excess_10": ("Top layer held ten sessions, excess p.a.", percent, 1),
    "top_information_ratio_10": ("Top layer held ten sessions, information ratio", _two, 1),
    "rank_autocorrelation": ("Rank autocorrelation from date to date", _two, 0),
    "dates": ("Dates", _count, 0),
    "layer_dates": ("Dates with layers", _count, 0),
    "stocks": ("Stocks per date", _count, 0),
}
"""What is known of a column of ``factor``: its name in words, how to write it, and which direction is better."""


def factor_tests(results: Results) -> list[Table]:
    """One table per tested score: a measure per row, an optimizer per column, means over seeds.

    Measures nobody named here are listed too, under their own name and after the known ones.
    """
    given = [c for c in results.factor.columns if c not in ("optimizer", "seed", "part")]
    order = [c for c in FACTOR_ROWS if c in given] + [c for c in given if c not in FACTOR_ROWS]
    found = set(results.factor["optimizer"])
    labels = [*(label for label in results.optimizers if label in found), *results.references]
    tables = []
    for part in results.scores if labels else []:
        rows = []
        for column in order:
            title = FACTOR_ROWS[column][0] if column in FACTOR_ROWS else column.replace("_", " ")
            values = {label: results.factor_mean(label, part, column) for label in labels}
            if any(map(finite, values.values())):
                rows.append({"measure": title, "column": column, **values})
        columns = [Column("", lambda r: r["measure"], numeric=False)]
        columns += [
            Column(chip(results, label), partial(_factor_cell, label=label, labels=labels))
            for label in labels
        ]
        tables.append(Table(f"factor-{part}", f"Factor test of the {score_name(part)}.", columns, rows))
    return tables


def costs(results: Results) -> Table:
    """What training took, per optimizer and frequency, means over the trials that are done."""
    rows = []
    finished: dict[tuple[str, str], list[TrialRow]] = {}
    for trial in results.trials:
        if trial.state == "done":
            finished.setdefault((frequency(trial.part), trial.optimizer), []).append(trial)
    for name in results.frequencies:
        for label in results.optimizers:
            done = finished.get((name, label), [])
            if not done:
                continue
            seconds = mean([t.seconds for t in done])
            epochs = mean([t.epochs for t in done])
            gradients = mean([t.gradient_evaluations for t in done])
            samples = mean([t.samples for t in done])
            rows.append(
                {
                    "part": name,
                    "optimizer": label,
                    "trials": len(done),
                    "epochs": epochs,
                    "best_epoch": mean([t.best_epoch for t in done]),
                    "forward_evaluations": mean([t.forward_evaluations for t in done]),
                    "gradient_evaluations": gradients,
                    "gradient_evaluations_per_epoch": gradients / epochs if epochs else math.nan,
                    "seconds": seconds,
                    "seconds_per_epoch": seconds / epochs if epochs else math.nan,
                    "samples_per_second": samples / seconds if seconds else math.nan,
                }
            )
    several = any(len(done) > 1 for done in finished.values())
    columns = [
        Column("Part", lambda r: r["part"], numeric=False),
        Column("Optimizer", lambda r: chip(results, r["optimizer"]), numeric=False),
        Column("Trials", lambda r: number(r["trials"], 0)),
        Column("Epochs", lambda r: number(r["epochs"], int(several))),
        Column("Best epoch", lambda r: number(r["best_epoch"], int(several))),
        Column("Forward evaluations", lambda r: number(r["forward_evaluations"], 0)),
        Column("Gradient evaluations", lambda r: number(r["gradient_evaluations"], 0)),
        Column("per epoch", lambda r: number(r["gradient_evaluations_per_epoch"], 0)),
        Column("Seconds", lambda r: number(r["seconds"], 1)),
        Column("per epoch", lambda r: number(r["seconds_per_epoch"], 2)),
        Column("Samples/s", lambda r: number(r["samples_per_second"], 0)),
    ]
    caption = "Per trial. Counted where the model is called. Seconds are those of optimizer steps, without validation."
    return Table("costs", caption, columns, rows)


def steps(results: Results) -> Table:
    """What the steps of each optimizer that perturbs were like, per part; means over epochs and trials."""
    columns = [
        Column("Part", lambda r: r["part"], numeric=False),
        Column("Optimizer", lambda r: chip(results, r["optimizer"]), numeric=False),
        Column("Trials", lambda r: number(r["trials"], 0)),
        Column("Gradients per step", lambda r: number(r["gradients"], 2)),
        Column("Steps perturbed", lambda r: percent(r["perturbed"])),
        Column("rho", lambda r: significant(r["rho"])),
        Column("‖e‖", lambda r: significant(r["perturbation"])),
        Column("Surrogate gap", lambda r: significant(r["surrogate_gap"])),
        Column("cos(g, p)", lambda r: number(r["cosine"], 4)),
        Column("‖g‖", lambda r: significant(r["gradient_norm"])),
        Column("Steps skipped", lambda r: percent(r["skipped"], 2)),
    ]
    rows = []
    for s in results.steps:
        values = asdict(s)
        head = {key: values.pop(key) for key in ("part", "optimizer", "trials")}
        rows.append({**head, "rho": results.spec["optimizers"][s.optimizer].get("rho"), **values})
    caption = "Means over epochs and trials. g is the gradient at the weights w, p that at the perturbed weights w + e."
    return Table("perturbation", caption, columns, rows)


def _outcome(label: str, baseline: str, comparison: Comparison | None) -> str:
    if label == baseline:
        return DASH
    if comparison is None:
        return "no shared seed"
    if not comparison.shown:
        return "tie"
    return "better" if comparison.difference > 0 else "worse"


def _factor_cell(row: Row, label: str, labels: Sequence[str]) -> str:
    _, show, best = FACTOR_ROWS.get(row["column"], ("", number, 0))
    text = show(row[label])
    best_of_all = is_best(row[label], [row[other] for other in labels], best)
    return Markup("<b>{}</b>").format(text) if best_of_all else text


def _cost_row(cost: Cost | None) -> dict[str, float | None]:
    names = ("gradient_evaluations", "seconds", "gradient_ratio", "seconds_ratio")
    return {name: getattr(cost, name) if cost else None for name in names}

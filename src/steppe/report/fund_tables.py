"""The tables of the portfolios, of single years, and of every difference with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    number,
    outcome,
    percent,
    two_lines,
)
from steppe.report.funds import LAST, Funds
from steppe.report.results import Results
from steppe.study.statistics import Comparison, p_text

__all__ = ["differences", "factor_years", "fund_tables", "fund_years"]

MEASURES = (
    "annual_return",
    "annual_excess",
    "tracking_error",
    "information_ratio",
    "excess_max_drawdown",
    "excess_calmar",
    "monthly_win_rate",
    "turnover",
    "relaxed",
)


def fund_tables(funds: Funds) -> list[Table]:
    """One table per index: what each optimizer's fund earned over it, and the difference to the baseline's."""
    return [_fund_table(funds, index) for index in funds.indices]


def _fund_table(funds: Funds, index: str) -> Table:
    results = funds.results
    estimates, comparisons = funds.estimates(index), funds.comparisons(index)
    rows: list[dict[str, Any]] = []
    for label in funds.labels:
        e = estimates.get(label)
        c = comparisons.get(label)
        if label not in results.optimizers:
            c = funds.reference_comparison(index)
        rows.append(
            {"optimizer": label}
            | {key: funds.figure(index, label, key) for key in MEASURES}
            | {
                "excess_low": e.low if e else None,
                "excess_high": e.high if e else None,
            }
            | _difference(c)
        )
    rows.sort(key=lambda row: -row["annual_excess"] if finite(row["annual_excess"]) else 1.0)
    columns = [
        Column("Fund", lambda r: chip(results, r["optimizer"]), numeric=False),
        Column("Return p.a.", lambda r: percent(r["annual_return"]), best=1, key="annual_return"),
        Column(
            "Excess p.a.",
            lambda r: two_lines(percent(r["annual_excess"]), _percents(r["excess_low"], r["excess_high"])),
            best=1,
            key="annual_excess",
        ),
        Column("Tracking error", lambda r: percent(r["tracking_error"])),
        Column("IR", lambda r: number(r["information_ratio"], 2), best=1, key="information_ratio"),
        Column(
            "Drawdown of excess",
            lambda r: percent(r["excess_max_drawdown"]),
            best=-1,
            key="excess_max_drawdown",
        ),
        Column("Calmar", lambda r: number(r["excess_calmar"], 2), best=1, key="excess_calmar"),
        Column("Months ahead", lambda r: percent(r["monthly_win_rate"], 0), best=1, key="monthly_win_rate"),
        Column("Turnover a week", lambda r: percent(r["turnover"])),
        Column("Limits relaxed", lambda r: number(r["relaxed"], 0)),
        Column(
            "Excess − baseline",
            lambda r: two_lines(
                percent(r["difference"], sign=True),
                _percents(r["difference_low"], r["difference_high"], sign=True),
            ),
        ),
        Column("Told from chance?", _told, numeric=False),
    ]
    several = len(results.spec["seeds"]) > 1
    caption = (
        f"Funds on {index}, after costs. "
        + ("Each trades the score averaged over the seeds. " if several else "")
        + "Intervals are 95 %, of the mean excess per year"
        + (" of the single seeds' funds." if several else ".")
    )
    return Table(f"fund-{index}", caption, columns, rows)


def fund_years(funds: Funds) -> list[Table]:
    """One table per index: excess and IR by calendar year, and of the last year alone."""
    tables = []
    for index in funds.indices:
        periods = funds.periods(index)
        rows = [
            {"optimizer": label}
            | {
                f"{measure} {period}": funds.of_period(index, label, period, measure)
                for period in periods
                for measure in ("annual_excess", "information_ratio")
            }
            for label in funds.labels
        ]
        columns = [Column("Fund", partial(_name, results=funds.results), numeric=False)]
        columns += [
            Column(
                period.capitalize() if period == LAST else period,
                partial(_excess_and_ir, period=period),
                best=1,
                key=f"annual_excess {period}",
            )
            for period in periods
        ]
        if periods:
            caption = (
                f"{index}: excess of each year after costs, and its information ratio. Years may be partial."
            )
            tables.append(Table(f"fund-years-{index}", caption, columns, rows))
    return tables


def factor_years(results: Results) -> Table:
    """RankIC and the top layer's excess by calendar year."""
    found = {label: results.factor_years(label) for label in results.shown}
    years = sorted({year for by_year in found.values() for year in by_year})
    measures = ("rank_ic", "top_annual_excess")
    rows = [
        {"optimizer": label}
        | {f"{m} {year}": found[label].get(year, {}).get(m) for year in years for m in measures}
        for label in results.shown
    ]
    columns = [Column("Optimizer", partial(_name, results=results), numeric=False)]
    columns += [
        Column(str(year), partial(_rank_ic_and_excess, year=year), best=1, key=f"rank_ic {year}")
        for year in years
    ]
    caption = "RankIC by year, and the top layer's excess over equal weight in it (per year, no costs)."
    return Table("factor-years", caption, columns, rows if years else [])


def differences(results: Results, funds: Funds) -> Table:
    """Every difference to the baseline with its interval: RankIC, top layer, funds."""
    families: dict[str, tuple[Mapping[str, Comparison], Callable[..., str]]] = {
        "RankIC": (results.comparisons, partial(number, digits=4)),
        "Top layer, return p.a.": (results.layer_comparisons, percent),
    }
    for index in funds.indices:
        families[f"Fund on {index}, excess p.a."] = (funds.comparisons(index), percent)
    rows = []
    for label in results.tested:
        if label != results.baseline:
            row: dict[str, Any] = {"optimizer": label}
            for name, (family, _) in families.items():
                row |= {f"{name} {key}": value for key, value in _difference(family.get(label)).items()}
            rows.append(row)
    columns = [Column("Optimizer", partial(_name, results=results), numeric=False)]
    columns += [Column(name, partial(_cell, name=name, show=show)) for name, (_, show) in families.items()]
    caption = (
        f"Differences to {results.baseline}, paired by seed and date: 95 % block-bootstrap intervals; "
        "p-values are corrected within each column (Holm)."
    )
    return Table("differences", caption, columns, rows)


def _difference(c: Comparison | None) -> dict[str, float | None]:
    keys = {
        "difference": "difference",
        "difference_low": "low",
        "difference_high": "high",
        "p_holm": "p_holm",
    }
    return {key: getattr(c, name) if c else None for key, name in keys.items()}


def _cell(row: Row, name: str, show: Callable[..., str]) -> Markup:
    value, low, high, p = (
        row[f"{name} {key}"] for key in ("difference", "difference_low", "difference_high", "p_holm")
    )
    if not finite(value):
        return Markup(DASH)
    told = finite(p) and p < 0.05
    text = Markup('<span class="{}">{}</span>').format(
        ("good" if value > 0 else "bad") if told else "", show(value, sign=True)
    )
    bounds = f"[{show(low, sign=True)}, {show(high, sign=True)}]" if finite(low) else ""
    return two_lines(text, f"{bounds} {p_text(p) if finite(p) else ''}".strip())


def _told(row: Row) -> Markup:
    if not finite(row["p_holm"]):
        return Markup(DASH)
    text = "tie" if row["p_holm"] >= 0.05 else "better" if row["difference"] > 0 else "worse"
    return two_lines(outcome(text), p_text(row["p_holm"]))


def _name(row: Row, results: Results) -> Markup:
    return chip(results, row["optimizer"])


def _excess_and_ir(row: Row, period: str) -> Markup:
    ir = row[f"information_ratio {period}"]
    return two_lines(percent(row[f"annual_excess {period}"]), f"IR {number(ir, 2)}" if finite(ir) else "")


def _rank_ic_and_excess(row: Row, year: int) -> Markup:
    excess = row[f"top_annual_excess {year}"]
    return two_lines(number(row[f"rank_ic {year}"], 4), percent(excess) if finite(excess) else "")


def _percents(low: float | None, high: float | None, *, sign: bool = False) -> str:
    if not (finite(low) and finite(high)):
        return ""
    return f"{interval(100 * low, 100 * high, 1, sign=sign)}"

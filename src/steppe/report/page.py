"""One offline HTML page per study, and its tables as CSV files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline.offline import get_plotlyjs

from steppe.core.files import write_atomically
from steppe.report import (
    figures,
    function_page,
    fund_tables,
    landscape_curves,
    landscape_figures,
    landscape_tables,
    landscape_words,
    tables,
    words,
)
from steppe.report.cells import DASH, Table, chip, flatten
from steppe.report.figures import COLORS
from steppe.report.funds import Funds
from steppe.report.landscapes import Landscapes
from steppe.report.results import Results
from steppe.study.store import Store, TrialRow

__all__ = ["build"]


def build(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report of the study in ``folder``; returns the page's path.

    The page is one file that needs no network. A study that still runs, or of which trials failed, gets a page too,
    which says what is missing.

    Args:
        folder: a study folder; nothing in it is run or changed but the report itself.
        out: the page; ``<folder>/report.html`` if None. The tables go to ``report/*.csv`` beside it, the folder
            being called as the page is.

    Raises:
        DataError: ``folder`` is not a study folder.
    """
    store = Store.open(folder)
    page = Path(out) if out is not None else store.folder / "report.html"
    results = Results.of(store)
    if results.spec["problem"].get("kind") == "functions":
        template, (made, context) = "functions.html.j2", function_page.contents(store, results)
    else:
        template, (made, context) = "page.html.j2", _stock_contents(store, results)
    csv_folder = page.with_suffix("")
    csv_folder.mkdir(parents=True, exist_ok=True)
    for table in made:
        if table.rows:
            _write(csv_folder / f"{table.name}.csv", table.csv())
    _write(page, _render(template, results, context))
    return page


def _stock_contents(store: Store, results: Results) -> tuple[list[Table], dict[str, Any]]:
    """The tables, for CSV files, and what ``page.html.j2`` needs beside what all pages have."""
    funds, landscapes = Funds.of(store, results), Landscapes.of(store, results)
    made: dict[str, Table] = {
        "leaderboard": tables.leaderboard(results),
        "steps": tables.steps(results),
        "costs": tables.costs(results),
        "factor_years": fund_tables.factor_years(results),
        "differences": fund_tables.differences(results, funds),
        "explained": landscape_tables.explained(landscapes),
        "eigenvalues": landscape_tables.eigenvalues(landscapes),
    }
    lists = {
        "factors": tables.factor_tests(results),
        "fund_tables": fund_tables.fund_tables(funds),
        "fund_years": fund_tables.fund_years(funds),
        "barriers": landscape_tables.barriers(landscapes),
        "measures": landscape_tables.measures(landscapes),
        "associations": landscape_tables.associations(landscapes),
    }
    context = {
        "verdict": words.judge(results),
        "held_equal": words.held_equal(results),
        "missing": words.missing(results),
        "limits": words.limits(results),
        "facts": _facts(results),
        **made,
        **lists,
        "funds": funds,
        "fund_words": words.funds(funds),
        "fund_terms": words.fund_terms(funds),
        "landscapes": landscapes,
        "flatness_words": landscape_words.judge_flatness(landscapes),
        "flatness_cautions": landscape_words.cautions(landscapes),
        "plane_headings": landscape_words.HEADINGS,
        "density_note": landscape_words.density_note(landscapes),
        "how_to_read": landscape_words.how_to_read(landscapes),
        "contours": landscape_figures.contours,
        "contour_scale": landscape_figures.scale,
        "line_figures": landscape_curves.line_figures,
        "density_figures": landscape_curves.density_figures,
        "decay": figures.decay(results),
        "fund_excess": figures.fund_excess(funds),
        "doubts": words.doubts(results),
        "curves": figures.training_curves(results),
        "step_curves": figures.step_curves(results),
        "rank_ic": figures.cumulative_rank_ic(results),
        "bars": figures.layer_bars(results),
        "values": figures.layer_values(results),
        "relative": figures.relative_value(results),
    }
    return list(itertools.chain(made.values(), *lists.values())), context


def _render(template: str, results: Results, context: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("steppe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    spec = results.spec
    return environment.get_template(template).render(
        title=spec.get("title") or spec["name"],
        results=results,
        failed=[trial for trial in results.trials if trial.state == "failed"],
        problem=flatten(spec["problem"]),
        study=flatten({k: v for k, v in spec.items() if k not in ("problem", "optimizers", "title")}),
        optimizers={label: _settings(spec["optimizers"][label]) for label in results.optimizers},
        environment=flatten(results.environment),
        palette=_palette(results),
        chip=lambda label: chip(results, label),
        trace_name=figures.trace_name,
        first_line=_first_line,
        script=Markup(get_plotlyjs()),
        **context,
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    """The panel and its blocks, as far as they are known."""
    panel, problem = results.panel, results.spec["problem"]
    facts = [("Panel", str(panel.get("name", problem.get("panel", "unknown"))))]
    if "dates" in panel:
        span = " to ".join(map(str, panel["dates"]))
        facts.append(("Dates", f"{span} ({panel['sessions']} sessions)" if "sessions" in panel else span))
    if "stocks" in panel:
        facts.append(("Stocks", str(panel["stocks"])))
    facts.append(("Universe", ", ".join(problem.get("universe", [])) or "every listed stock"))
    blocks = panel.get("walk_forward")
    if blocks:
        facts.append(("Walk-forward", f"{len(blocks)} blocks, each trained on the years before it"))
    for name in ("train", "validation", "test"):
        block = panel.get("blocks", {}).get(name)
        if block:
            facts.append((name.capitalize(), f"{block['first']} to {block['last']}, {block['dates']} dates"))
        elif name in problem:
            facts.append((name.capitalize(), " to ".join(map(str, problem[name]))))
    if "fingerprint" in panel:
        facts.append(("Fingerprint", str(panel["fingerprint"])[:16]))
    return facts


def _settings(optimizer: Mapping[str, Any]) -> dict[str, str]:
    hyper = {key: value for key, value in optimizer.items() if key not in ("kind", "base")}
    return {
        "kind": str(optimizer.get("kind", "")),
        "base": str(optimizer.get("base") or DASH),
        "hyper": ", ".join(f"{key} = {value}" for key, value in flatten(hyper)) or "defaults",
    }


def _palette(results: Results) -> Iterable[tuple[str, str]]:
    """``--opt-<n>`` for every optimizer: grey for the baseline, then the style sheet's colours in turn."""
    for order in range(len(results.optimizers)):
        yield f"--opt-{order}", f"var(--color-{(order - 1) % COLORS + 1})" if order else "var(--color-0)"


def _first_line(trial: TrialRow) -> str:
    """What a reader needs of an error: the message itself is the last line of a traceback."""
    lines = (trial.error or "").strip().splitlines() or ["no message was recorded"]
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

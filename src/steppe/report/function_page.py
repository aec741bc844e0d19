"""The page of a study of functions: which tables it has, and what its template is given."""

from __future__ import annotations

from typing import Any

from steppe.report import function_figures, function_tables, function_words
from steppe.report.cells import Table
from steppe.report.function_results import Functions, Problem
from steppe.report.results import Results
from steppe.study.store import Store

__all__ = ["contents"]


def contents(store: Store, results: Results) -> tuple[list[Table], dict[str, Any]]:
    """The tables, for CSV files, and what ``functions.html.j2`` needs beside what all pages have."""
    functions = Functions.of(store, results)
    problems = [_problem(functions, p) for p in functions.problems if functions.runs(p.part)]
    context = {
        "verdict": function_words.judge(functions),
        "held_equal": function_words.budget(functions),
        "missing": function_words.missing(functions),
        "limits": function_words.limits(functions),
        "facts": _facts(functions),
        "problems": problems,
        "sweep": functions.sweep,
    }
    return [table for p in problems for table in (p["ends"], p["printed"])], context


def _problem(functions: Functions, problem: Problem) -> dict[str, Any]:
    return {
        "problem": problem,
        "ways": function_figures.paths(functions, problem),
        "counts": function_figures.stops(functions, problem.part),
        "losses": function_figures.losses(functions, problem),
        "ends": function_tables.ends(functions, problem),
        "boundaries": function_figures.boundaries(functions, problem),
        "printed": function_tables.printed(functions, problem),
        "diverged": any(run.diverged for runs in functions.runs(problem.part).values() for run in runs),
    }


def _facts(functions: Functions) -> list[tuple[str, str]]:
    spec = functions.results.spec
    facts = [
        ("Problems", ", ".join(problem.title for problem in functions.problems)),
        ("Optimizers", str(len(spec["optimizers"]))),
        ("Seeds", ", ".join(map(str, spec["seeds"]))),
    ]
    named = [source for problem in functions.problems for source in problem.source.split("; ") if source]
    sources = list(dict.fromkeys(named))
    return [*facts, ("Sources", "; ".join(sources))] if sources else facts

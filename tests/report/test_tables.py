from __future__ import annotations

import math
from datetime import date

import numpy as np
import pytest

from steppe.report.cells import flatten, number, percent, significant, times
from steppe.report.figures import Figure
from steppe.report.results import Results
from steppe.report.series import PERIODS_PER_YEAR, annual
from steppe.report.tables import leaderboard

from .conftest import Maker


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(0.12345), "0.123"),
        (number(-0.5, 1), "−0.5"),
        (number(0.25, 2, sign=True), "+0.25"),
        (number(-0.00001, 2), "0.00"),
        (number(1234567.0, 0), "1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567"),
        (number(None), "–"),
        (number(math.nan), "–"),
        (number(math.inf), "–"),
        (percent(-0.0312), "−3.1\N{NO-BREAK SPACE}%"),
        (percent(None), "–"),
        (significant(0.05), "0.0500"),
        (significant(123.4), "123"),
        (significant(-0.0012345), "−0.00123"),
        (significant(2.5e-7), "2.50e−7"),
        (significant(0.0), "0.00"),
        (significant(None), "–"),
        (significant(math.nan), "–"),
        (times(2.0), "2.00×"),
        (times(math.nan), "–"),
    ],
)
def test_how_numbers_are_written(text: str, expected: str) -> None:
    assert text == expected


def test_annual_compounds() -> None:
    weekly = 1.1 ** (1 / PERIODS_PER_YEAR) - 1
    assert annual(np.full(7, weekly)) == pytest.approx(0.1)
    assert annual(np.array([0.5, -1.0])) == -1
    assert math.isnan(annual(np.array([])))


def test_flatten() -> None:
    tree = {"a": 1, "b": {"c": [1, 2], "d": {"e": True}}, "f": []}
    assert flatten(tree) == [("a", "1"), ("b.c", "1, 2"), ("b.d.e", "True"), ("f", "none")]


def test_figure_json_is_safe_and_plain() -> None:
    figure = Figure("f", {"x": [date(2022, 1, 4), math.nan, 1 / 3], "name": "</script>"})
    assert figure.json() == '{"x":["2022-01-04",null,0.33333],"name":"\\u003c/script>"}'


def test_ratios_use_shared_seeds_and_results_read_the_final_score(study: Maker) -> None:
    results = Results.of(study())
    assert (results.final, results.scores, results.block) == ("blend", ["blend", "daily", "weekly"], 4)
    assert results.costs["adamw"].gradient_ratio == 1
    assert 1.5 < results.costs["sam"].gradient_ratio < 2.6
    trials = [t for t in results.trials if t.optimizer == "gam"]
    assert results.costs["gam"].gradient_evaluations == sum(t.gradient_evaluations or 0 for t in trials) / 2
    assert results.icir("gsam", "blend") == pytest.approx(
        np.mean([row.mean() / row.std(ddof=1) for row in results.series("gsam", "blend")])
    )
    excess = results.layer_excess("gsam")
    assert list(excess) == list(range(1, 11))
    assert excess[10] > 0 > excess[1]


def test_best_of_a_column_needs_a_difference(study: Maker) -> None:
    table = leaderboard(Results.of(study()))
    best = [(c.title, row["optimizer"]) for c in table.columns for row in table.rows if table.is_best(c, row)]
    assert ("RankIC", "gsam") in best
    assert len({title for title, _ in best}) == len(best)

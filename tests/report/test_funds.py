"""Portfolios on the page: which fund is shown, how differences are paired, what stands in every table."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from steppe.report import build
from steppe.report.fund_tables import differences, factor_years, fund_tables, fund_years
from steppe.report.funds import LAST, Funds
from steppe.report.results import NO_MODEL, Results
from steppe.report.words import fund_terms, funds as fund_words, judge
from steppe.study.store import Store

INDICES = ("csi300", "csi500")

Make = Callable[..., Store]


@pytest.fixture
def funds(studies: Callable[..., Path]) -> Funds:
    store = Store.open(studies(funds=INDICES))
    return Funds.of(store, Results.of(store))


def test_the_fund_of_the_averaged_score_is_shown(funds: Funds) -> None:
    averaged = funds.summary.filter(
        pl.col("seed").is_null(), pl.col("index") == "csi300", pl.col("optimizer") == "gsam"
    )
    assert funds.figure("csi300", "gsam", "annual_excess") == averaged["annual_excess"].item()
    sessions, excess = funds.excess("csi300", "gsam")
    own = funds.daily.filter(
        pl.col("seed").is_null(), pl.col("index") == "csi300", pl.col("optimizer") == "gsam"
    )
    assert sessions == own["date"].to_list()
    np.testing.assert_allclose(excess, (own["ret"] - own["benchmark"]).to_numpy())


def test_without_an_averaged_score_the_seed_is_shown(study: Make) -> None:
    store = study(funds=INDICES, seeds=(3,))
    for name in ("fund", "fund_daily", "fund_yearly"):
        table = store.table(name)
        store.write_table(
            name, table.filter(pl.col("seed").is_not_null() | (pl.col("optimizer") == NO_MODEL))
        )
    funds = Funds.of(store, Results.of(store))
    row = funds.summary.filter(pl.col("index") == "csi300", pl.col("optimizer") == "sam")
    assert funds.figure("csi300", "sam", "tracking_error") == row["tracking_error"].item()
    assert len(fund_tables(funds)) == 2


def test_differences_are_those_of_the_seeds(funds: Funds) -> None:
    def mean(label: str) -> float:
        rows = funds.daily.filter(
            pl.col("seed").is_not_null(), pl.col("index") == "csi500", pl.col("optimizer") == label
        )
        return 252 * float((rows["ret"] - rows["benchmark"]).mean())  # type: ignore[arg-type]

    found = funds.comparisons("csi500")
    assert set(found) == set(funds.results.optimizers) - {"adamw"}
    assert found["gsam"].difference == pytest.approx(mean("gsam") - mean("adamw"))
    assert (found["gsam"].n_seeds, found["gsam"].n_comparisons) == (2, 5)
    reference = funds.reference_comparison("csi500")
    assert reference is not None
    assert reference.n_comparisons == 1


def test_the_score_without_a_model_stands_in_every_table(funds: Funds) -> None:
    results = funds.results
    tables = [*fund_tables(funds), *fund_years(funds), factor_years(results)]
    assert len(tables) == 5
    for table in tables:
        assert NO_MODEL in [row["optimizer"] for row in table.rows]
    assert results.shown[-1] == NO_MODEL
    assert NO_MODEL not in judge(results).headline


def test_every_difference_has_its_interval(funds: Funds) -> None:
    table = differences(funds.results, funds)
    assert [row["optimizer"] for row in table.rows] == ["sam", "asam", "gsam", "gam", "friendly_sam"]
    assert [c.title for c in table.columns[1:]] == [
        "RankIC",
        "Top layer, return p.a.",
        "Fund on csi300, excess p.a.",
        "Fund on csi500, excess p.a.",
    ]
    for row in table.rows:
        for name in ("RankIC", "Top layer, return p.a.", "Fund on csi300, excess p.a."):
            assert (
                row[f"{name} difference_low"] <= row[f"{name} difference"] <= row[f"{name} difference_high"]
            )


def test_years_come_in_order_and_the_last_one_alone(funds: Funds) -> None:
    assert funds.periods("csi300") == ["2022", LAST]


def test_words(funds: Funds) -> None:
    sentences = fund_words(funds)
    assert len(sentences) == 2 * 6
    assert any("score without a model" in sentence for sentence in sentences)
    terms = " ".join(fund_terms(funds))
    assert "dividend" in terms
    assert "0.2" in terms
    assert "float-cap weights" in terms


def test_page_and_csv(studies: Callable[..., Path], tmp_path: Path) -> None:
    page = build(studies(funds=INDICES), tmp_path / "page.html")
    text = page.read_text("utf-8")
    assert 'id="funds"' in text
    assert "no model" in text
    with (tmp_path / "page" / "fund-csi300.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    assert {"annual_excess", "difference_low", "p_holm"} <= set(rows[0])


def test_a_study_without_funds_has_no_such_section(studies: Callable[..., Path], tmp_path: Path) -> None:
    assert 'id="funds"' not in build(studies(), tmp_path / "page.html").read_text("utf-8")

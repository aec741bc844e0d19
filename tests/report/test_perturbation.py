"""Did the perturbation act? The section of the page on what optimizers tell of their steps."""

from __future__ import annotations

import pytest

from steppe.report import build
from steppe.report.figures import step_curves
from steppe.report.results import Results
from steppe.report.tables import steps
from steppe.report.words import doubts, judge

from .conftest import HEALTHY, OPTIMIZERS, Maker
from .test_page import Page


def test_means_over_epochs_and_trials(study: Maker) -> None:
    store = study()
    results = Results.of(store)
    assert [(s.part, s.optimizer) for s in results.steps] == [
        (part, label) for part in ("daily", "weekly") for label in list(OPTIMIZERS)[1:]
    ]
    rows = [
        row for row in store.history().to_dicts() if (row["part"], row["optimizer"]) == ("weekly", "asam")
    ]
    trials = {row["trial"]: [r["step_cosine"] for r in rows if r["trial"] == row["trial"]] for row in rows}
    (asam,) = [s for s in results.steps if (s.part, s.optimizer) == ("weekly", "asam")]
    assert asam.cosine == pytest.approx(sum(sum(c) / len(c) for c in trials.values()) / 2)
    assert (asam.trials, asam.gradients, asam.perturbation, asam.skipped) == (2, 2, 0.5, 0)
    row = steps(results).rows[0]
    assert (row["optimizer"], row["rho"], row["perturbation"]) == ("sam", 0.05, 0.05)


def test_a_healthy_study_has_no_doubts(study: Maker) -> None:
    store = study()
    assert doubts(Results.of(store)) == []
    page = Page(build(store.folder))
    assert "Nothing that was measured looks dead." in page.sections["perturbation"]
    assert "in doubt" not in page.text


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"perturbed": 0.0, "perturbation": None}, "no gradient was taken at perturbed weights"),
        ({"perturbation": 0.0, "surrogate_gap": 0.0, "cosine": 1.0}, "the perturbation is zero"),
        ({"surrogate_gap": -1e-4}, "the loss does not rise from w to w + e"),
        ({"cosine": 0.9999}, "the second one tells nothing new"),
        ({"skipped": 0.02}, "2.0\N{NO-BREAK SPACE}% of the steps were skipped"),
        (dict.fromkeys(HEALTHY) | {"skipped": 1.0}, "every step was skipped"),
    ],
)
def test_what_looks_dead_is_said_once(study: Maker, told: dict[str, float | None], words: str) -> None:
    store = study(seeds=(0,), steps={"sam": told, "daily/gsam": told})
    (sentence,) = doubts(Results.of(store))
    assert sentence.startswith("sam and gsam (daily): ")
    assert words in sentence
    page = Page(build(store.folder))
    assert sentence in page.sections["perturbation"]
    assert "Whether sam and gsam did what the name says is in doubt" in page.sections["verdict"]


def test_what_was_not_told_is_not_doubted(study: Maker) -> None:
    results = Results.of(study(seeds=(0,), steps={"sam": {"surrogate_gap": None, "cosine": None}}))
    assert doubts(results) == []
    row = steps(results).rows[0]
    shown = {column.title: column.show(row) for column in steps(results).columns}
    assert (shown["Surrogate gap"], shown["cos(g, p)"]) == ("–", "–")
    for figure in step_curves(results):
        assert {trace["name"] for trace in figure.spec["data"]} == set(OPTIMIZERS) - {"adamw", "sam"}


def test_one_pass_optimizers_have_no_figure_but_a_row(study: Maker) -> None:
    told = {label: {"surrogate_gap": None, "cosine": None} for label in OPTIMIZERS}
    results = Results.of(study(seeds=(0,), steps=told))
    assert step_curves(results) == []
    assert len(steps(results).rows) == 2 * (len(OPTIMIZERS) - 1)


def test_no_section_where_no_optimizer_perturbs(study: Maker) -> None:
    plain = {"adamw": OPTIMIZERS["adamw"], "sgd": ({"kind": "sgd", "lr": 0.1}, 1, 0.01)}
    store = study(optimizers=plain, seeds=(0,))
    page = Page(build(store.folder))
    assert "perturbation" not in page.sections
    assert not (store.folder / "report" / "perturbation.csv").exists()
    assert judge(Results.of(store)).headline


def test_a_study_that_has_begun_already_tells(study: Maker) -> None:
    page = Page(build(study(running=list(OPTIMIZERS), seeds=(0,)).folder))
    assert "gsam" in page.sections["perturbation"]

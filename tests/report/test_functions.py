"""The page of a study of functions: who came to the floor, paths, boundaries, divergence, errors in articles."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from steppe.report import build
from steppe.report.function_figures import LEAST, losses, paths, stops
from steppe.report.function_results import Functions
from steppe.report.function_tables import ends, printed
from steppe.report.function_words import judge
from steppe.report.results import Results
from steppe.study.store import Store

from .test_page import Page

FACTS = {
    "bowl": {
        "title": "Quadratic bowl",
        "formula": "x² + y²",
        "dim": 2,
        "floor": 0.0,
        "minima": [[0.0, 0.0]],
        "source": "an article",
        "errors": ["The article's gradient belongs to <another> function."],
        "printed": {"GD": 0.5, "lost": [1.0, -2.0]},
    },
    "classes": {"title": "Two classes", "dim": 3, "floor": 0.25, "minima": []},
}
EPOCHS = 12
KINDS = {
    "gd": {"kind": "gd", "lr": 0.1},
    "fast": {"kind": "nag", "lr": 0.2},
    "wild": {"kind": "sgd", "lr": 2.0},
}


def make(folder: Path, rates: Mapping[str, float], kinds: Mapping[str, Any] = KINDS, **spec: Any) -> Store:
    """A study whose losses shrink by ``rates`` per epoch of one gradient; a rate above one diverges."""
    store = Store.create(
        folder,
        {
            "name": "functions",
            "title": "Functions",
            "problem": {"kind": "functions", "names": list(FACTS), "steps": 1},
            "optimizers": {label: kinds[label] for label in rates},
            "baseline": next(iter(rates)),
            "seeds": [0, 1],
            "epochs": EPOCHS,
            "patience": EPOCHS,
        }
        | spec,
    )
    store.write_json("panel_info", {"kind": "functions", "parts": FACTS})
    plan = []
    with store.lock():
        for part, facts in FACTS.items():
            for label, rate in rates.items():
                for seed in (0, 1):
                    plan.append(trial := f"{part}-{label}-s{seed}")
                    store.add_trial(trial, part=part, optimizer=label, seed=seed, spec=kinds[label])
                    store.set_state(trial, "running")
                    for epoch in range(1, EPOCHS + 1):
                        x = (1 + 0.1 * seed) * rate**epoch
                        metrics = {"validation_value": facts["floor"] + 2 * x * x}
                        if facts["dim"] == 2:
                            metrics |= {"validation_x0": x, "validation_x1": -x}
                        store.record_epoch(
                            trial,
                            epoch,
                            metrics,
                            gradient_evaluations=epoch,
                            forward_evaluations=0,
                            seconds=0.1,
                        )
                    store.set_state(trial, "done", best_epoch=1, epochs=EPOCHS)
    store.set_plan(plan)
    axis = np.linspace(-2, 2, 9)
    x, y = (a.ravel() for a in np.meshgrid(axis, axis))
    store.write_table("function_grid", pl.DataFrame({"part": "bowl", "x": x, "y": y, "value": x * x + y * y}))
    store.write_table(
        "function_start",
        pl.DataFrame(
            {"seed": [0, 1], "part": "bowl", "x": [1.0, 1.1], "y": [-1.0, -1.1], "value": [2.0, 2.42]}
        ),
    )
    store.write_table(
        "function_points",
        pl.DataFrame({"part": "classes", "x": [0.0, 1.0], "y": [0.0, 1.0], "label": [0, 1]}),
    )
    store.write_table(
        "boundary",
        pl.concat(
            pl.DataFrame(
                {
                    "optimizer": label,
                    "seed": 0,
                    "part": "classes",
                    "x": x,
                    "y": y,
                    "probability": 1 / (1 + np.exp(-x)),
                }
            )
            for label in rates
        ),
    )
    return store


def of(store: Store) -> Functions:
    return Functions.of(store, Results.of(store))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make(tmp_path_factory.mktemp("functions"), {"gd": 0.5, "fast": 0.1, "wild": 3.0})


def test_page(store: Store) -> None:
    page = Page(build(store.folder))
    assert {"verdict", "problem-bowl", "problem-classes", "limits", "settings"} <= set(page.sections)
    assert not [url for url in page.urls if url.startswith(("http", "//"))]
    assert "fast" in page.sections["verdict"]
    assert "<another>" in page.sections["problem-bowl"]
    assert "simulated" not in page.text
    assert "What the classifiers learned" in page.sections["problem-classes"]
    assert (
        len(page.figures) == 1 + 1 + 1 + 3
    )  # ways and losses of the bowl; losses and boundaries of the classes
    assert {f.stem for f in (store.folder / "report").iterdir()} == {
        "ends-bowl",
        "ends-classes",
        "printed-bowl",
    }


def test_evaluations_to_the_floor(store: Store) -> None:
    functions = of(store)
    bowl = functions.problems[0]
    reached = functions.reached(bowl)
    # 2 x² ≤ 0.001 at x = 0.0224: 0.5^6 = 0.0156 and 0.1^2; a gradient counts as three
    assert (reached["gd"].seeds, reached["gd"].median, reached["gd"].span) == (2, 18.0, (15.0, 18.0))
    assert reached["fast"].median == 6.0
    assert reached["wild"].seeds == 0
    rows = {row["optimizer"]: row for row in ends(functions, bowl).rows}
    assert rows["gd"]["distance"] == pytest.approx(math.sqrt(2) * 1.05 * 0.5**EPOCHS)
    assert (rows["gd"]["gradient"], rows["gd"]["forward"]) == (EPOCHS, 0)
    assert rows["wild"]["diverged"] == 2
    assert not rows["gd"]["diverged"]


def test_ties_are_told_as_ties(tmp_path: Path) -> None:
    verdict = judge(of(make(tmp_path, {"gd": 0.1, "fast": 0.11})))
    assert all("gd and fast tie" in sentence for sentence in verdict.comparisons)


def test_nobody_at_the_floor(tmp_path: Path) -> None:
    verdict = judge(of(make(tmp_path, {"gd": 0.9, "fast": 0.85, "wild": 3.0})))
    assert verdict.headline.startswith("On none of 2 problems")
    assert "fast came nearest" in verdict.comparisons[0]
    assert "wild diverged on Quadratic bowl and Two classes." in verdict.details


def test_a_lost_run_is_infinite_not_missing(tmp_path: Path) -> None:
    store = make(tmp_path, {"gd": 0.5, "wild": 3.0})
    store.set_state(
        "bowl-wild-s0", "failed", error="validation value is nan after epoch 2: training has diverged."
    )
    functions = of(store)
    run = functions.runs("bowl")["wild"][0]
    assert run.diverged
    assert run.final == math.inf
    assert "diverged" in Page(build(store.folder)).sections["problem-bowl"]


def test_a_floor_of_zero_is_below_a_logarithmic_axis(store: Store) -> None:
    functions = of(store)
    bowl, classes = (
        losses(functions, problem).spec["layout"]["annotations"][0]["text"] for problem in functions.problems
    )
    assert bowl.startswith("reached")
    assert classes.startswith("floor 0.25")
    values = [v for trace in losses(functions, functions.problems[0]).spec["data"] for v in trace["y"]]
    assert min(values) >= LEAST


def test_paths_start_at_the_start_and_the_slider_covers_them(store: Store) -> None:
    functions = of(store)
    (figure,) = paths(functions, functions.problems[0])
    ways = [trace for trace in figure.spec["data"] if "evaluations" in trace.get("meta", {})]
    assert [way["x"][0] for way in ways] == [1.0] * 3
    counts = stops(functions, "bowl")
    assert counts[0] == 0
    assert counts[-1] == 3 * EPOCHS
    assert counts == sorted(set(counts))
    assert json.loads(figure.json())["data"][0]["type"] == "contour"
    assert paths(functions, functions.problems[1]) == []


def test_a_sweep_stands_side_by_side(tmp_path: Path) -> None:
    kinds = {"small": {"kind": "gd", "lr": 0.01}, "right": {"kind": "gd", "lr": 0.1}}
    functions = of(make(tmp_path, {"small": 0.9, "right": 0.1}, kinds))
    assert functions.sweep
    assert [figure.optimizer for figure in paths(functions, functions.problems[0])] == ["small", "right"]


def test_printed_figures_stand_beside_ours(store: Store) -> None:
    functions = of(store)
    table = printed(functions, functions.problems[0])
    assert table.rows[0]["ours"] == pytest.approx(2 * (0.5 ** (2 * EPOCHS)) * (1 + 1.21) / 2)
    assert math.isnan(table.rows[1]["ours"])
    assert printed(functions, functions.problems[1]).rows == []


def test_a_study_that_has_only_begun_gets_a_page(tmp_path: Path) -> None:
    store = make(tmp_path, {"gd": 0.5})
    for trial in store.trials():
        store.drop_epochs(trial.id, after=0)
        store.set_state(trial.id, "running")
    (tmp_path / "panel_info.json").unlink()
    page = Page(build(tmp_path))
    assert "There is no verdict yet" in page.text
    assert "not complete" in page.text

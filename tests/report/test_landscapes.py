"""Landscapes on the page: shared contours, measures with their errors, flatness against generalisation."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import polars as pl
import pytest

from steppe.core.errors import DataError, SpecError
from steppe.report import build
from steppe.report.landscape_curves import densities, density_figures, line_figures, lines
from steppe.report.landscape_figures import contours, levels, scale
from steppe.report.landscape_tables import associations, barriers, eigenvalues, explained, measures
from steppe.report.landscape_words import HEADINGS, cautions, density_note, how_to_read, judge_flatness
from steppe.report.landscapes import MEASURES, PLANES, Landscapes
from steppe.report.paper import write_figures
from steppe.report.results import Results
from steppe.study.store import Store

from .conftest import Maker, add_other_landscapes


def of(store: Store) -> Landscapes:
    return Landscapes.of(store, Results.of(store))


@pytest.fixture
def landscapes(studies: Callable[..., Path]) -> Landscapes:
    return of(Store.open(studies(landscapes="daily")))


def test_the_page_knows_every_measure() -> None:
    from steppe.landscape.measures import MEASURES as REGISTERED

    known = {key: (REGISTERED[key].invariant, REGISTERED[key].larger) for key in REGISTERED}
    assert {key: facts[1:] for key, facts in MEASURES.items()} == known


def test_contours_are_shared(landscapes: Landscapes) -> None:
    figures = contours(landscapes, "daily", 0)
    assert [figure.optimizer for figure in figures] == landscapes.results.optimizers
    drawn = [trace for figure in figures for trace in figure.spec["data"] if trace["type"] == "contour"]
    assert len(drawn) == 12
    for key in ("contours", "zmin", "zmax", "colorscale"):
        assert all(trace[key] == drawn[0][key] for trace in drawn)
    panels = [p for pair in landscapes.panels("daily", 0).values() for p in pair.values()]
    shared = levels(panels)
    assert len(shared) >= 8
    assert shared == sorted(set(shared))
    for panel, trace in zip(panels, drawn, strict=True):
        # a point lies between the contours between which its loss lies
        bands = np.searchsorted(shared, panel.loss, side="right")
        inside = np.array(trace["z"]) - bands
        assert (inside > -1e-3).all()
        assert (inside < 1 + 1e-3).all()
    band = scale(landscapes, "daily", 0)
    assert band is not None
    assert len(band.spec["layout"]["xaxis"]["ticktext"]) == len(shared)
    for figure in (*figures, band):
        go.Figure(json.loads(re.sub(r"var\(--[a-z0-9-]+\)", "#123456", figure.json())))


def test_the_trajectory_is_projected_and_the_origin_marked(landscapes: Landscapes) -> None:
    figure = contours(landscapes, "daily", 0)[0]
    way = landscapes.way(landscapes.panels("daily", 0)["adamw"]["train"])
    lines = [trace for trace in figure.spec["data"] if "customdata" in trace]
    assert len(lines) == 2
    for line in lines:
        assert line["customdata"] == way["epoch"].to_list()
        assert line["x"] == way["x"].to_list()
    diamonds = [t for t in figure.spec["data"] if t.get("marker", {}).get("symbol") == "diamond"]
    assert [(t["x"], t["y"], t["xaxis"]) for t in diamonds] == [([0], [0], "x"), ([0], [0], "x2")]


def test_a_level_surface_has_no_contours(study: Maker) -> None:
    store = study(landscapes="daily")
    store.write_table("landscape_surface", store.table("landscape_surface").with_columns(loss=pl.lit(0.5)))
    flat = of(store)
    assert scale(flat, "daily", 0) is None
    assert len(contours(flat, "daily", 0)) == 6
    build(store.folder)


def test_the_loss_at_the_kept_weights_lies_between_grid_points(study: Maker) -> None:
    store = study(landscapes="daily")
    table = store.table("landscape_surface").filter(pl.col("x") != 0, pl.col("y") != 0)
    store.write_table("landscape_surface", table.with_columns(loss=3 + pl.col("x") + 2 * pl.col("y")))
    panel = of(store).panels("daily", 0)["sam"]["train"]
    assert 0 not in panel.x
    assert panel.at_origin == pytest.approx(3)
    assert panel.lowest == (panel.x[0], panel.y[0])


def test_measures_are_means_over_seeds(landscapes: Landscapes) -> None:
    tables = measures(landscapes)
    assert [table.name for table in tables] == ["measures-daily-train", "measures-daily-test"]
    rows = {row["optimizer"]: row for row in tables[0].rows}
    own = landscapes.measures.filter(optimizer="sam", split="train", measure="trace")
    assert rows["sam"]["trace"] == pytest.approx(own["value"].mean())
    assert rows["sam"]["trace_stderr"] == pytest.approx(8 / math.sqrt(2))
    assert math.isnan(rows["sam"]["lambda_max_stderr"])
    assert rows["gam"]["trace_converged"] is False
    trace = tables[0].columns[2]
    assert trace.title.startswith("Trace")
    assert "\N{DAGGER}" in trace.show(rows["gam"])
    assert "\N{DAGGER}" not in trace.show(rows["sam"])
    assert "did not converge" in tables[0].caption
    assert "did not reach" in " ".join(cautions(landscapes))
    assert tables[0].is_best(trace, rows["gsam"])


def test_a_measure_that_could_not_be_taken_is_told(study: Maker) -> None:
    store = study(landscapes="daily", seeds=(0,))
    lost = (pl.col("optimizer") == "asam") & (pl.col("measure") == "sam")
    table = store.table("measures").with_columns(
        value=pl.when(lost).then(math.nan).otherwise("value"),
        note=pl.when(lost).then(pl.lit("the loss is not finite")).otherwise("note"),
    )
    store.write_table("measures", table)
    found = of(store)
    assert found.taken("daily", "train", "asam", "sam") is None
    assert any("SAM sharpness of asam, seed 0, train" in sentence for sentence in cautions(found))
    assert {row["trials"] for row in associations(found)[0].rows if row["measure"] == "sam"} == {5}
    build(store.folder)


def test_axes_stand_beside_their_null(landscapes: Landscapes) -> None:
    table = explained(landscapes)
    assert len(table.rows) == 6
    assert table.rows[0]["explained_both"] == pytest.approx(0.98)
    assert table.rows[0]["null_both"] == pytest.approx(0.90)
    assert "walk 81.0" in table.columns[1].show(table.rows[0])


def test_associations(landscapes: Landscapes) -> None:
    (table,) = associations(landscapes)
    assert {row["outcome"]: row["trials"] for row in table.rows} == {
        "test RankIC": 12,
        "test loss − train loss": 6,
    }
    for row in table.rows:
        assert row["tau"] * row["for_flatness"] > 0  # the bowls were made so
        if abs(row["tau"]) < 1:
            assert row["tau_low"] <= row["tau"] <= row["tau_high"]
        assert row["p"] <= row["p_holm"]


def test_without_a_test_the_validation_metric_is_taken(study: Maker) -> None:
    found = of(study(landscapes="daily", tested=False))
    assert list(found.outcomes("daily")) == ["validation rank ic", "test loss − train loss"]
    sign, values = found.outcomes("daily")["validation rank ic"]
    assert (sign, len(values)) == (-1, 12)


def test_words(landscapes: Landscapes) -> None:
    sentences = judge_flatness(landscapes)
    assert re.search(r"holds for sam, asam, gsam and friendly_sam, not for gam\.", sentences[0])
    assert "not tested" in sentences[0]
    assert any(s.startswith("gsam is flatter than adamw on train by 6 of 6 measures") for s in sentences)
    assert any("flatter ones generalise better by 6 of 6 measures" in s for s in sentences)
    text = " ".join(cautions(landscapes))
    assert "does not say why" in text
    assert "Dinh" in text


def test_few_trials_are_said_to_be_few(study: Maker) -> None:
    store = study(landscapes="daily", seeds=(0,))
    keep = pl.col("optimizer").is_in(["adamw", "sam"])
    for name in ("measures", "landscape_surface"):
        store.write_table(name, store.table(name).filter(keep))
    sentences = judge_flatness(of(store))
    assert sentences[0].startswith("“Flatter on train, lower on test” than adamw holds for sam.")
    assert sentences[-1].startswith("2 trials are too few")


def test_page_and_csv(studies: Callable[..., Path], tmp_path: Path) -> None:
    page = build(studies(landscapes="daily"), tmp_path / "page.html")
    text = page.read_text("utf-8")
    assert text.index('id="differences"') < text.index('id="landscapes"') < text.index('id="cost"')
    assert page.stat().st_size < 6e6
    names = {"measures-daily-train", "measures-daily-test", "landscape-axes", "flatness-daily"}
    assert names <= {file.stem for file in (tmp_path / "page").iterdir()}
    with (tmp_path / "page" / "flatness-daily.csv").open(encoding="utf-8") as file:
        assert {"measure", "tau", "tau_low", "p_holm"} <= set(next(csv.DictReader(file)))


def test_measures_without_surfaces_and_surfaces_without_measures(study: Maker) -> None:
    store = study(landscapes="daily", seeds=(0,))
    for name in ("landscape_surface", "landscape_path", "landscape_axes"):
        store.write_table(name, store.table(name).clear())
    text = build(store.folder).read_text("utf-8")
    assert "The loss in the plane" not in text
    assert "measures-" in " ".join(f.name for f in (store.folder / "report").iterdir())
    assert judge_flatness(of(store))[0].startswith("sam is flatter")


def test_a_study_without_landscapes_has_no_such_section(studies: Callable[..., Path], tmp_path: Path) -> None:
    assert 'id="landscapes"' not in build(studies(), tmp_path / "page.html").read_text("utf-8")


def test_every_plane_is_called_by_its_name(study: Maker) -> None:
    store = study(landscapes="daily")
    before = judge_flatness(of(store))
    add_other_landscapes(store)
    found = of(store)
    assert found.views("daily") == [(0, plane) for plane in PLANES]
    assert set(HEADINGS) == set(PLANES)
    for plane in PLANES:
        (first, *_) = contours(found, "daily", 0, plane)
        drawn = [trace for trace in first.spec["data"] if "customdata" in trace]
        assert len(drawn) == (2 if plane == "trajectory" else 0)  # a trajectory is seen in its own plane only
        band = scale(found, "daily", 0, plane)
        assert band is not None
        assert band.title.endswith("20 dates of up to 125 stocks" if plane == "trajectory" else "100 stocks")
    assert judge_flatness(found) == before  # losses of other planes are on other dates
    text = build(store.folder).read_text("utf-8")
    assert all(heading in text for heading in HEADINGS.values())
    assert len(how_to_read(found)) == 4
    # explained variance is of trajectories, eigenvalues of eigenvectors
    one_plane = store.table("landscape_surface").filter(kind="eigenvectors")
    store.write_table("landscape_surface", one_plane)
    store.write_table("landscape_axes", store.table("landscape_axes").clear())
    only = of(store)
    assert not any("random walk" in sentence for sentence in (*how_to_read(only), *cautions(only)))
    assert not explained(only).rows
    table = eigenvalues(only)
    assert [row["eigenvalue_1"] for row in table.rows] == pytest.approx([3 - 0.2 * n for n in range(6)])
    assert "\N{DAGGER}" in table.columns[1].show(table.rows[1])
    assert "8 dates of up to 100 stocks" in table.caption
    assert "The loss in the plane of each training" not in build(store.folder).read_text("utf-8")


def test_lines_and_their_barriers(study: Maker) -> None:
    store = study(landscapes="daily")
    assert barriers(of(store)) == []
    add_other_landscapes(store)
    found = of(store)
    groups = lines(found, "daily")
    assert list(groups) == ["adamw and the others, seed 0", "seed 0 and the others"]
    assert [len(among) for among in groups.values()] == [10, 12]
    rise = groups["adamw and the others, seed 0"][0]
    assert (rise.start, rise.end, rise.split) == (("adamw", 0), ("sam", 0), "train")
    assert (rise.barrier, rise.highest) == (pytest.approx(0.05), 0.5)
    level = groups["seed 0 and the others"][0]
    assert level.barrier == pytest.approx(0, abs=1e-12)
    (table,) = barriers(found)
    assert len(table.rows) == 11
    assert table.rows[0]["barrier_test"] == pytest.approx(0.02)
    assert "at 0.50" in table.columns[3].show(table.rows[0])
    for figures in line_figures(found, "daily").values():
        assert [figure.title for figure in figures] == ["Loss on train dates", "Loss on test dates"]
        for figure in figures:
            go.Figure(json.loads(re.sub(r"var\(--[a-z0-9-]+\)", "#123456", figure.json())))
    build(store.folder)
    assert (store.folder / "report" / "barriers-daily.csv").exists()


def test_densities_are_smoothed_alike(study: Maker) -> None:
    store = study(landscapes="daily")
    assert density_note(of(store)) == ""
    add_other_landscapes(store)
    found = of(store)
    (density,) = densities(found, "daily").values()
    assert density.width == pytest.approx(0.032)
    assert list(density.curves) == found.results.optimizers
    step = density.eigenvalue[1] - density.eigenvalue[0]
    for curve in density.curves.values():
        assert np.nansum(curve) * step == pytest.approx(1, abs=1e-3)
        assert np.isnan(curve).any()
    (figure,) = density_figures(found, "daily").values()
    assert figure.spec["layout"]["yaxis"]["type"] == "log"
    go.Figure(json.loads(re.sub(r"var\(--[a-z0-9-]+\)", "#123456", figure.json())))
    assert "spectrum of sam did not converge" in density_note(found)


def test_a_perfect_order_has_no_interval_and_few_trials_are_called_few(study: Maker) -> None:
    store = study(landscapes="daily", seeds=(0,))
    for few in (False, True):
        if few:
            labels = ["adamw", "sam", "asam", "gsam"]
            store.write_table("measures", store.table("measures").filter(pl.col("optimizer").is_in(labels)))
        (table,) = associations(of(store))
        interval = next(column for column in table.columns if "interval" in column.title)
        perfect = [row for row in table.rows if abs(row["tau"]) == 1]
        assert perfect
        for row in perfect:
            assert math.isnan(row["tau_low"])
            assert interval.show(row) == ("too few trials" if few else "perfect order")
            assert math.isnan(row["p"]) if few else row["p"] == pytest.approx(2 / 720)
        assert ("too few" if few else "every resample of it is perfect too") in table.caption
    sentence = judge_flatness(of(store))[-1]
    assert sentence.startswith("4 trials are too few")
    assert "once in 12" in sentence


@pytest.mark.parametrize("kind", ["pdf", "svg", "png"])
def test_figures_for_papers_are_the_same_bytes_again(
    kind: str, studies: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="the extra `figures` is not installed")
    folder = studies(landscapes="daily")
    first, again = (write_figures(folder, tmp_path / name, kind) for name in "ab")
    assert [file.name for file in first] == [file.name for file in again] == [f"landscape-daily-s0.{kind}"]
    assert first[0].read_bytes() == again[0].read_bytes()


def test_figures_for_papers_of_all_planes_lines_and_densities(study: Maker, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `figures` is not installed")
    store = study(landscapes="daily")
    add_other_landscapes(store)
    store.write_table("landscape_surface", store.table("landscape_surface").filter(optimizer="sam"))
    first, again = (write_figures(store.folder, tmp_path / name, "svg") for name in "ab")
    assert [file.stem for file in first] == [
        "landscape-daily-s0", "landscape-daily-s0-random", "landscape-daily-s0-eigenvectors",
        "lines-daily-1", "lines-daily-2", "density-daily-s0",
    ]  # fmt: skip
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_figures_of_nothing_say_what_to_run(studies: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="pdf, svg, png"):
        write_figures(studies(landscapes="daily"), tmp_path, "eps")
    with pytest.raises(DataError, match="steppe landscape"):
        write_figures(studies(), tmp_path)

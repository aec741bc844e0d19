import shutil
import subprocess
import sys
from dataclasses import replace

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from pydantic import ValidationError

from steppe.core.errors import DataError, SpecError
from steppe.core.seeding import generator
from steppe.landscape.directions import random_directions
from steppe.landscape.measures.lines import barrier
from steppe.landscape.spectrum import density, lanczos
from steppe.landscape.trajectory import read_trajectory
from steppe.report.landscape_curves import Line
from steppe.study import landscape as module, landscape_jobs as jobs
from steppe.study.landscape import point_of_trial, run_landscape
from steppe.study.run import run_study
from steppe.study.spec import LandscapeSpec, StudySpec, read_spec
from steppe.study.store import Store

QUICK = {"measures": ("lambda_max", "adaptive_sam"), "dates": 3, "resolution": 6}


def look(store, workers=0, on_progress=lambda *_: None, **settings):
    wanted = LandscapeSpec.model_validate(QUICK | settings)
    run_landscape(store, wanted, workers=workers, on_progress=on_progress)


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return run_study(read_spec(tiny), tmp_path_factory.mktemp("landscape"))


@pytest.fixture(scope="module")
def tables(store):
    look(store)
    return {
        name: store.table(name)
        for name in ("landscape_surface", "landscape_path", "landscape_axes", "measures")
    }


def daily(store, optimizer="adamw"):
    return next(row for row in store.trials() if (row.optimizer, row.part) == (optimizer, "daily"))


def test_a_trial_leaves_the_weights_of_every_epoch(store):
    row = daily(store)
    way = read_trajectory(store.trial_folder(row.id))
    assert way.epochs == tuple(range(row.epochs + 1))
    best = point_of_trial(store, row.id, dates=2).theta
    assert torch.equal(way.thetas[way.epochs.index(row.best_epoch)], best)
    other = read_trajectory(store.trial_folder(daily(store, "friendly_sam").id))
    assert torch.equal(way.thetas[0], other.thetas[0])


def test_a_point_is_the_model_on_evenly_spaced_dates(store):
    row = daily(store)
    point = point_of_trial(store, row.id, "validation", dates=1000, stocks=1000)
    history = store.history().filter(trial=row.id, epoch=row.best_epoch)
    assert -point.value() == pytest.approx(history["validation_ic"].item(), abs=1e-6)
    assert len(point_of_trial(store, row.id, "train", dates=5).batches) == 5
    with pytest.raises(DataError, match="no finished trial"):
        point_of_trial(store, "daily-nothing")


def test_surfaces_share_their_grid_and_hold_the_trajectories(store, tables):
    surfaces, path = tables["landscape_surface"], tables["landscape_path"]
    panels = surfaces.partition_by("optimizer", "split", as_dict=True, maintain_order=True)
    assert set(panels) == {(o, s) for o in ("adamw", "friendly_sam") for s in ("train", "test")}
    grids = [panel.select("x", "y") for panel in panels.values()]
    assert all(grid.equals(grids[0]) for grid in grids)
    assert surfaces["part"].unique().to_list() == ["daily"]
    assert len(grids[0]) == 36
    for axis in ("x", "y"):
        assert surfaces[axis].min() < path[axis].min() < path[axis].max() < surfaces[axis].max()
    for row in (daily(store), daily(store, "friendly_sam")):
        best = path.filter(trial=row.id, epoch=row.best_epoch)
        assert best.select("x", "y").row(0) == (0, 0)
    assert tables["landscape_axes"].columns[4:] == [
        "axis", "explained", "null", "explained_centred", "null_centred",
    ]  # fmt: skip


def test_measures_are_those_of_the_point(store, tables):
    taken = tables["measures"]
    assert taken.select("optimizer", "measure").unique().height == 4
    assert set(taken["split"]) == {"train"}
    assert taken["note"].dtype == pl.String
    assert taken["converged"].all()
    assert (taken["gradient"] > 0).all()


def test_what_is_done_is_not_computed_again_and_other_results_are_added(store, tables, monkeypatch):
    asked = []
    whole = jobs.measure
    monkeypatch.setattr(jobs, "measure", lambda key, *rest: asked.append(key) or whole(key, *rest))
    monkeypatch.setattr(jobs, "surface", None)
    look(store, measures=("adaptive_sam", "sam"), optimizers=["adamw"], surfaces=False)
    assert asked == ["sam"]
    assert store.table("landscape_surface").equals(tables["landscape_surface"])
    assert store.table("measures").height == tables["measures"].height + 1
    old = store.table("measures").join(tables["measures"], on=["trial", "split", "measure"], how="semi")
    assert old.sort("trial", "measure").equals(tables["measures"].sort("trial", "measure"))


def test_a_killed_run_resumes_to_the_same_tables(store, tables, tmp_path):
    left_out = shutil.ignore_patterns("landscape", "landscape_*", "measures.parquet")
    again = Store.open(shutil.copytree(store.folder, tmp_path / "again", ignore=left_out))
    ended = []

    def stop(done, total, job):
        ended.append(job)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look(again, on_progress=stop)
    assert "measures" not in again.tables()
    look(again, workers=1, on_progress=lambda done, total, job: ended.append(job))
    assert ended.count("") == 2
    assert len(ended) == 2 + len(set(ended)) - 1  # no job ran twice
    for name, table in tables.items():
        assert_frame_equal(again.table(name), table, check_exact=True)


def test_a_measure_that_cannot_be_taken_says_why(store, tables, monkeypatch):
    def refuse(*_):
        raise DataError("too flat")

    monkeypatch.setattr(jobs, "measure", refuse)
    look(store, measures=("fisher_rao",), surfaces=False)
    rows = store.table("measures").filter(measure="fisher_rao")
    assert rows["value"].is_nan().all()
    assert set(rows["note"]) == {"too flat"}


@pytest.mark.parametrize("plane", ["random", "eigenvectors"])
def test_other_planes_stand_beside_that_of_the_trajectory(store, tables, plane, tmp_path):
    # without trajectories, which they do not need
    left_out = shutil.ignore_patterns("trajectory")
    own = Store.open(shutil.copytree(store.folder, tmp_path / "own", ignore=left_out))
    jobs = []
    look(own, measures=(), plane=plane, on_progress=lambda done, total, job: jobs.append(job))
    surfaces = own.table("landscape_surface")
    before = surfaces.filter(kind="pca").select(tables["landscape_surface"].columns)
    assert_frame_equal(before, tables["landscape_surface"], check_row_order=False)
    seen = surfaces.filter(kind=plane)
    reach = {"random": 1.0, "eigenvectors": 0.05}[plane]
    assert (seen["x"].min(), seen["y"].max()) == (-reach, reach)
    assert seen.height == before.height
    for name in ("landscape_path", "landscape_axes"):
        assert own.table(name).equals(store.table(name))
    point = point_of_trial(own, daily(own).id, dates=3)
    if plane == "random":
        axes = random_directions(point, generator(0, "random plane"))
    else:
        eigen = lanczos(point, generator(0, "eigenvectors"), 2)
        axes = eigen.vectors * point.theta.norm()
        told = own.table("landscape_eigenvalues").filter(optimizer="adamw")
        assert told["axis"].to_list() == [1, 2]
        assert told["eigenvalue"].to_list() == pytest.approx(eigen.values.tolist())
        assert [job.split()[-1] for job in jobs[1:]] == ["eigenvectors"] * 2 + ["surface"] * 4
    corner = seen.filter(optimizer="adamw", split="train").sort("y", "x").row(0, named=True)
    theta = point.theta.double() + corner["x"] * axes[0].double() + corner["y"] * axes[1].double()
    assert point.value(theta) == pytest.approx(corner["loss"], abs=1e-6)
    again = []
    look(own, measures=(), plane=plane, on_progress=lambda done, total, job: again.append(job))
    assert again == [""]


def test_lines_join_the_weights_of_two_trials(store, tables, tmp_path):
    own = Store.open(shutil.copytree(store.folder, tmp_path / "own"))
    look(own, measures=(), surfaces=False, lines=("optimizers",), resolution=5)
    line = own.table("landscape_line")
    start, end = daily(own), daily(own, "friendly_sam")
    assert set(zip(line["origin"], line["trial"], strict=True)) == {(start.id, end.id)}
    assert set(line["split"]) == {"train", "test"}
    train = line.filter(split="train")
    assert train["t"].to_list() == [0, 0.25, 0.5, 0.75, 1]
    points = [point_of_trial(own, row.id, dates=3) for row in (start, end)]
    assert train["loss"][0] == pytest.approx(points[0].value(), abs=1e-7)
    assert train["loss"][4] == pytest.approx(points[1].value(), abs=1e-7)
    found = Line(
        (start.optimizer, 0), (end.optimizer, 0), "train", train["t"].to_numpy(), train["loss"].to_numpy()
    )
    wanted = barrier(points[0], generator(0), points[1].theta, resolution=5).value
    assert found.barrier == pytest.approx(wanted, abs=1e-7)


def test_a_density_is_kept_as_its_quadrature(store, tables, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DENSITY", {"probes": 2, "steps": 8})
    own = Store.open(shutil.copytree(store.folder, tmp_path / "own"))
    look(own, measures=(), surfaces=False, density=True, optimizers=["adamw"])
    rows = own.table("landscape_density")
    point = point_of_trial(own, daily(own).id, dates=3)
    found = density(point, generator(0, "density"), probes=2, steps=8)
    assert rows["eigenvalue"].to_list() == pytest.approx(found.nodes.tolist())
    assert rows["weight"].sum() == pytest.approx(1)
    assert set(rows["dim"]) == {point.dim}
    assert set(rows["converged"]) == {found.converged}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"lines": ["optimizers"], "optimizers": ["adamw"]}, "between optimizers need two"),
        ({"lines": ["seeds"], "seeds": [0]}, "between seeds need two"),
        ({"plane": "pca"}, "'trajectory', 'random' or 'eigenvectors'"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_training(asked, message):
    with pytest.raises(ValidationError, match=message):
        LandscapeSpec.model_validate(asked)
    one = {
        "name": "one",
        "problem": {"kind": "stock_factor"},
        "optimizers": {"adamw": {}},
        "baseline": "adamw",
    }
    with pytest.raises(ValidationError, match="between optimizers need two"):
        StudySpec.model_validate(one | {"landscape": {"lines": ["optimizers"]}})


def test_lines_between_seeds_start_at_the_first(store):
    rows = [replace(row, seed=seed, id=f"{row.id}-{seed}") for seed in (3, 1) for row in store.trials()[:2]]
    pairs = module._lines(store, rows, ["seeds"])
    assert [(start.seed, end.seed, start.optimizer == end.optimizer) for start, end in pairs] == [
        (3, 1, True)
    ] * 2
    with pytest.raises(DataError, match="two finished trials"):
        module._lines(store, rows[:1], ["optimizers"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"optimizers": ["adam"]}, "Did you mean 'adamw'"),
        ({"seeds": [7]}, "unknown trained seed"),
        ({"part": "monthly"}, "Known: daily, weekly"),
        ({"measures": ["lambda"]}, "Did you mean 'lambda_max'"),
        ({"measures": ["barrier"]}, "needs other"),
    ],
)
def test_what_is_not_there_is_refused(store, asked, message):
    with pytest.raises(SpecError, match=message):
        look(store, **asked)


def test_the_command_ends_with_the_report(store, tables):
    code = "import sys; from steppe.cli import main; sys.argv = ['steppe', *sys.argv[1:]]; main()"
    given = [
        "--optimizers",
        "adamw",
        "friendly_sam",
        "--measures",
        "sam",
        "--dates",
        "3",
        "--resolution",
        "6",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, "landscape", store.folder, *given, "--workers", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(".html")
    assert "[6/6]" in done.stderr
    assert Store.open(store.folder).table("landscape_surface").equals(tables["landscape_surface"])


def test_a_study_may_ask_for_its_landscapes(tiny, store, tables, tmp_path):
    text = f"{tiny.read_text()}\n[landscape]\noptimizers = ['adamw', 'friendly_sam']\n"
    text += "".join(f"{key} = {list(v) if isinstance(v, tuple) else v}\n" for key, v in QUICK.items())
    asking = tmp_path / "asking.toml"
    asking.write_text(text)
    again = run_study(read_spec(asking), shutil.copytree(store.folder, tmp_path / "again"))
    assert [row.id for row in again.trials()] == [row.id for row in store.trials()]
    for name, table in tables.items():  # the store's own have grown by what other tests asked for
        assert_frame_equal(
            again.table(name).join(table, on=table.columns, how="semi", nulls_equal=True), table
        )
    with pytest.raises(SpecError, match=r"\[landscape\] unknown optimizer 'adam'.*adamw"):
        read_spec(asking, ["landscape.optimizers=['adam']"])
    with pytest.raises(SpecError, match="measur"):
        read_spec(asking, ["landscape.measure=['sam']"])
    with pytest.raises(SpecError, match="lambda_max"):
        run_study(read_spec(asking, ["landscape.measures=['lambda']"]), tmp_path / "never")
    assert not (tmp_path / "never").exists()

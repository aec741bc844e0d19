import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
import torch
from torch import nn

import steppe.study.trial as trials
from steppe.core.checkpoint import load_tree
from steppe.core.errors import DataError
from steppe.optim.registry import create
from steppe.study.run import run_study
from steppe.study.spec import read_spec
from steppe.study.store import Store

RUN = "import sys; from steppe.cli import main; sys.argv = ['steppe', *sys.argv[1:]]; main()"


def outputs(store):
    return {
        row.label: load_tree(path)["scores"]
        for row in store.trials()
        for path in store.trial_folder(row.id).glob("outputs-*.safetensors")
    }


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[k].nan_to_num(-1e9), other[k].nan_to_num(-1e9)) for k in one
    )


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    return run_study(read_spec(tiny), tmp_path_factory.mktemp("run") / "whole")


def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(tiny, tmp_path, whole):
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", RUN, "run", str(tiny), "--out", str(folder), "--set", "workers=2"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "ledger.sqlite").exists() and (folder / "study.toml").exists():
            history = Store.open(folder).history()
            if len(history) >= 2:
                break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)  # orphaned workers end by themselves within moments of their parent
    store = run_study(read_spec(tiny), folder)
    assert same(outputs(store), outputs(whole))
    metrics = pl.exclude("seconds")
    assert store.history().select(metrics).equals(whole.history().select(metrics))
    for name in ("ic", "layers", "factor"):
        assert store.table(name).equals(whole.table(name), null_equal=True)


def test_a_second_run_does_nothing_again(tiny, whole):
    before = {row.id: row.finished for row in whole.trials()}
    again = run_study(read_spec(tiny), whole.folder)
    assert {row.id: row.finished for row in again.trials()} == before


def test_worker_processes_give_the_same_bits_as_this_process(tiny, tmp_path, whole):
    command = [
        sys.executable,
        "-c",
        RUN,
        "run",
        str(tiny),
        "--out",
        str(tmp_path / "two"),
        "--set",
        "workers=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("report.html")
    assert same(outputs(Store.open(tmp_path / "two")), outputs(whole))


def test_a_failing_trial_is_recorded_and_the_study_goes_on(tiny, tmp_path):
    spec = read_spec(tiny, ["optimizers.friendly_sam.rho=-1"])
    store = run_study(spec, tmp_path / "failing")
    states = {row.optimizer: row for row in store.trials()}
    assert states["adamw"].state == "done"
    assert states["friendly_sam"].state == "failed"
    assert "rho=-1" in states["friendly_sam"].error
    assert set(store.table("factor")["optimizer"]) == {"adamw", "no_model"}


def test_a_worker_that_dies_fails_its_trial_alone(tiny, tmp_path):
    # an optimizer of the user's own, by import path
    code = "import os, torch\nclass Killer(torch.optim.SGD):\n    def step(self, closure=None):\n        os._exit(3)\n"
    (tmp_path / "own.py").write_text(code)
    folder = tmp_path / "dying"
    overrides = ["workers=2", "epochs=1", "optimizers.friendly_sam.kind=own:Killer"]
    command = [sys.executable, "-c", RUN, "run", str(tiny), "--out", str(folder)]
    command += [part for override in overrides for part in ("--set", override)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "exit code 3" in done.stderr
    assert done.stdout.strip().endswith("report.html")
    states = {(row.part, row.optimizer): row.state for row in Store.open(folder).trials()}
    assert states == {
        ("daily", "adamw"): "done",
        ("weekly", "adamw"): "done",
        ("daily", "friendly_sam"): "failed",
        ("weekly", "friendly_sam"): "failed",
    }


def test_two_runs_on_one_folder_are_an_error(tiny, tmp_path, whole):
    with whole.lock(), pytest.raises(DataError, match="another run"):
        run_study(read_spec(tiny), whole.folder)


def test_the_blend_is_tested_beside_its_parts(whole):
    assert whole.table("factor")["part"].unique().sort().to_list() == ["blend", "daily", "weekly"]
    assert set(whole.table("layers")["layer"].unique()) == set(range(11))


def test_the_ledger_holds_what_optimizers_tell_of_their_steps(whole):
    history = whole.history()
    told = history.filter(pl.col("optimizer") == "friendly_sam").select("^step_.*$")
    assert told.width == 7
    assert told.null_count().sum_horizontal().item() == 0
    assert (told["step_gradients"] == 2).all()
    plain = history.filter(pl.col("optimizer") == "adamw").select("^step_.*$")
    assert plain.null_count().row(0) == (plain.height,) * 7


def test_sharpness_aware_optimizers_are_given_the_model_and_the_seed(tiny, tmp_path, monkeypatch):
    given = {}

    def spy(kind, params, **hyper):
        given[kind] = hyper
        return create(kind, params, **hyper)

    monkeypatch.setattr(trials, "create", spy)
    run_study(read_spec(tiny, ["epochs=1", "seeds=[3]"]), tmp_path / "given")
    assert isinstance(given["friendly_sam"]["model"], nn.Module)
    assert given["friendly_sam"]["seed"] == 3
    assert not {"model", "seed"} & set(given["adamw"])

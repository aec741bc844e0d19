"""A study whose problem walks forward: blocks are trials, done blocks are never trained again."""

import json
import os
import signal
import subprocess
import sys
import time

import polars as pl
import pytest
import torch

import steppe.study.trial as trials
from steppe.core.checkpoint import load_tree
from steppe.study.run import run_study
from steppe.study.spec import read_spec
from steppe.study.store import Store

RUN = "import sys; from steppe.cli import main; sys.argv = ['steppe', *sys.argv[1:]]; main()"
PARTS = ["daily-2016-11-15", "weekly-2016-11-15", "daily-2017-02-15", "weekly-2017-02-15"]


def outputs(store):
    return {
        row.label: load_tree(path)
        for row in store.trials()
        for path in store.trial_folder(row.id).glob("outputs-*.safetensors")
    }


@pytest.fixture(scope="module")
def whole(walk, tmp_path_factory):
    return run_study(read_spec(walk), tmp_path_factory.mktemp("walk") / "whole")


def test_blocks_are_trials_and_the_tables_are_stitched(whole):
    assert [row.part for row in whole.trials() if row.optimizer == "adamw"] == PARTS
    assert {row.state for row in whole.trials()} == {"done"}
    dates = whole.table("ic").filter(optimizer="adamw", part="daily")["date"]
    rows = torch.cat([outputs(whole)[f"{part}/adamw/0"]["rows"] for part in PARTS[::2]])
    assert rows.tolist() == list(range(int(rows[0]), int(rows[-1]) + 1, 5))
    assert len(dates) == len(rows)
    assert set(whole.table("factor")["part"]) == {"daily", "weekly", "blend"}
    assert whole.table("fund")["optimizer"].to_list() == ["adamw", "friendly_sam", "no_model"]
    facts = json.loads((whole.folder / "panel_info.json").read_text())
    assert list(facts["walk_forward"]) == ["2016-11-15", "2017-02-15"]
    assert list(facts["fund"]["indices"]) == ["SIM-L"]


def test_a_killed_run_resumes_to_the_same_bits(walk, tmp_path, whole):
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", RUN, "run", str(walk), "--out", str(folder), "--set", "workers=2"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "study.toml").exists() and len(Store.open(folder).history()) >= 3:
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(2)  # orphaned workers end by themselves within moments of their parent
    store = run_study(read_spec(walk), folder)
    one, two = outputs(store), outputs(whole)
    assert one.keys() == two.keys()
    for label, output in one.items():
        assert torch.equal(output["scores"].nan_to_num(-1e9), two[label]["scores"].nan_to_num(-1e9))
    for name in whole.tables():
        assert store.table(name).equals(whole.table(name), null_equal=True)


def test_a_later_end_trains_new_blocks_only_and_scores_the_new_dates_of_the_last(walk, whole, monkeypatch):
    epochs = whole.history().select(pl.exclude("seconds"))
    finished = {row.id: row.finished for row in whole.trials()}
    trained = []
    train = trials.train

    def spy(problem, *rest, on_epoch, **settings):
        def seen(epoch):
            trained.append(str(problem.feed.dates[problem.split.test[0]]))
            on_epoch(epoch)

        return train(problem, *rest, on_epoch=seen, **settings)

    monkeypatch.setattr(trials, "train", spy)
    time.sleep(1)  # `finished` counts in seconds
    longer = run_study(read_spec(walk, ["problem.walk_forward.last=2017-05-31"]), whole.folder)
    rows = {row.id: row for row in longer.trials()}
    assert len(rows) == 12
    # 2 frequencies x 2 optimizers of the new block, and not one epoch of another
    assert len(trained) == 4
    assert len(set(trained)) == 1
    assert trained[0] > "2017-05-15"
    assert (
        longer.history().select(epochs.columns).filter(pl.col("trial").is_in(list(finished))).equals(epochs)
    )
    scored_again = {id for id, before in finished.items() if rows[id].finished != before}
    assert scored_again == {id for id in finished if "-2017-02-15-" in id}
    assert longer.table("ic")["date"].max() > pl.Series([trained[0]]).str.to_date()[0]

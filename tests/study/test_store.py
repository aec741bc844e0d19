from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from steppe.core.errors import DataError, SpecError
from steppe.study.store import Store

SPEC = {"name": "demo", "seeds": [0, 1], "problem": {"kind": "stocks", "train": ("2019-01-02", "2020-12-31")}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "study", SPEC)


def add(store: Store, trial: str, **changes: object) -> None:
    fields = {"part": "daily", "optimizer": "sam", "seed": 0, "spec": {"rho": 0.05}} | changes
    store.add_trial(trial, **fields)  # type: ignore[arg-type]


def test_create_resolves_and_opens(store: Store) -> None:
    spec = Store.open(store.folder).spec
    assert spec["problem"]["train"] == ["2019-01-02", "2020-12-31"]
    assert not list(store.folder.glob(".*"))


def test_same_spec_is_not_written_again_but_a_changed_one_is(store: Store) -> None:
    file = store.folder / "study.toml"
    os.utime(file, ns=(0, 0))
    add(store, "a")
    Store.create(store.folder, SPEC)
    assert file.stat().st_mtime_ns == 0
    Store.create(store.folder, SPEC | {"seeds": [0, 1, 2], "title": None})
    assert store.spec["seeds"] == [0, 1, 2]
    assert "title" not in store.spec
    assert [row.id for row in store.trials()] == ["a"]


def test_folders_that_are_no_study(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        Store.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no study\.toml and no ledger\.sqlite"):
        Store.open(tmp_path)
    (tmp_path / "study.toml").write_text("mine = true")
    with pytest.raises(DataError, match="not the output of a study"):
        Store.create(tmp_path, SPEC)
    assert (tmp_path / "study.toml").read_text() == "mine = true"
    (tmp_path / "ledger.sqlite").write_text("this is not a database, it is a text of some length" * 20)
    with pytest.raises(DataError, match="not a database"):
        Store.open(tmp_path)
    with pytest.raises(DataError, match="is a file"):
        Store.create(tmp_path / "study.toml", SPEC)


@pytest.mark.parametrize(("value", "message"), [([1, None], r"spec\.x\[1\]"), (object(), r"spec\.x = ")])
def test_spec_that_toml_cannot_say(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Store.create(tmp_path / "study", {"x": value})


def test_trial_life(store: Store) -> None:
    add(store, "a")
    (row,) = store.trials()
    assert (row.state, row.label, row.started, row.best_epoch) == ("pending", "daily/sam/0", None, None)
    store.set_state("a", "running")
    started = store.trials()[0].started
    store.set_state("a", "failed", error="loss is NaN at epoch 3", epochs=3)
    (row,) = store.trials()
    assert (row.state, row.error, row.epochs, row.started) == ("failed", "loss is NaN at epoch 3", 3, started)
    assert row.finished is not None
    store.set_state("a", "running")
    (row,) = store.trials()
    assert (row.error, row.finished, row.started) == (None, None, started)
    store.set_state(
        "a", "done", best_epoch=2, gradient_evaluations=40, forward_evaluations=12, seconds=1.5, samples=9
    )
    (row,) = store.trials()
    assert (row.best_epoch, row.gradient_evaluations, row.forward_evaluations) == (2, 40, 12)
    assert (row.epochs, row.seconds, row.samples, row.spec) == (3, 1.5, 9, {"rho": 0.05})
    add(store, "a", optimizer="other")  # adding again changes nothing
    assert store.trials()[0].state == "done"


def test_wrong_use_is_said(store: Store) -> None:
    with pytest.raises(DataError, match="no trial 'x'"):
        store.set_state("x", "done")
    with pytest.raises(SpecError, match="Did you mean 'done'"):
        store.set_state("x", "don")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="FOREIGN KEY"):
        store.record_epoch("x", 1, {}, gradient_evaluations=0, forward_evaluations=0, seconds=0.0)
    for name in ("../x", "a/b", "a b", "a.", "", ".hidden"):
        with pytest.raises(SpecError, match="file name"):
            store.trial_folder(name)
    with pytest.raises(DataError, match="result table 'icc'"):
        store.table("icc")
    with pytest.raises(DataError, match=r"panel\.json cannot be written"):
        store.write_json("panel", {"x": math.nan})


def test_plan_chooses_and_orders(store: Store) -> None:
    for trial in "abc":
        add(store, trial)
        store.record_epoch(trial, 1, {"ic": 0.1}, gradient_evaluations=1, forward_evaluations=1, seconds=1.0)
    assert store.plan() is None
    store.set_plan(["c", "missing", "a"])
    assert [row.id for row in store.trials()] == ["c", "a"]
    assert [row.id for row in store.trials(planned=False)] == ["a", "b", "c"]
    assert store.history()["trial"].to_list() == ["c", "a"]


def test_epochs_overwrite_and_drop(store: Store) -> None:
    add(store, "a")
    assert store.history().is_empty()
    for epoch in (1, 2, 3, 2):
        costs = {"gradient_evaluations": 10 * epoch, "forward_evaluations": epoch, "seconds": float(epoch)}
        store.record_epoch("a", epoch, {"ic": epoch / 10}, **costs)  # type: ignore[arg-type]
    store.drop_epochs("a", after=2)
    history = store.history()
    assert history["epoch"].to_list() == [1, 2]
    assert history["ic"].to_list() == [0.1, 0.2]
    assert history["gradient_evaluations"].to_list() == [10, 20]


def test_metrics_of_different_parts_share_a_table(store: Store) -> None:
    add(store, "a")
    add(store, "b", part="weekly")
    costs = {"gradient_evaluations": 1, "forward_evaluations": 1, "seconds": 1.0}
    store.record_epoch("a", 1, {"x": 1.0}, **costs)  # type: ignore[arg-type]
    store.record_epoch("b", 1, {"y": math.nan}, **costs)  # type: ignore[arg-type]
    history = store.history()
    assert history["x"].to_list() == [1.0, None]
    assert history["y"].is_nan().to_list() == [None, True]


@settings(max_examples=10, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).map("m_".__add__), st.floats()
    )
)
def test_every_float_survives(tmp_path_factory: pytest.TempPathFactory, metrics: dict[str, float]) -> None:
    store = Store.create(tmp_path_factory.mktemp("floats") / "study", SPEC)
    add(store, "a")
    store.record_epoch("a", 1, metrics, gradient_evaluations=1, forward_evaluations=1, seconds=1.0)
    (row,) = store.history().to_dicts()
    for name, value in metrics.items():
        assert row[name] == value or (math.isnan(row[name]) and math.isnan(value))


def test_tables_and_facts(store: Store) -> None:
    frame = pl.DataFrame({"optimizer": ["sam"], "ic": [math.nan], "date": [None]})
    store.write_table("ic", frame)
    store.write_table("ic", frame.with_columns(ic=pl.lit(0.1)))
    assert store.tables() == ["ic"]
    assert store.table("ic")["ic"].to_list() == [0.1]
    assert store.read_json("environment") is None
    store.write_json("environment", {"threads": 1, "name": "数据"})
    assert store.read_json("environment") == {"threads": 1, "name": "数据"}
    assert not list(store.folder.rglob("*.tmp"))


def _work(store: Store, worker: int) -> None:
    trial = f"t{worker}"
    store.add_trial(trial, part="daily", optimizer="sam", seed=worker, spec={})
    store.set_state(trial, "running")
    for epoch in range(1, 11):
        store.record_epoch(
            trial, epoch, {"ic": 0.0}, gradient_evaluations=1, forward_evaluations=1, seconds=1.0
        )
        store.write_json("shared", {"worker": worker, "epoch": epoch})
    store.set_state(trial, "done")


def test_processes_write_at_once(store: Store) -> None:
    assert pickle.loads(pickle.dumps(store)).folder == store.folder
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(_work, store, worker) for worker in range(4)]:
            future.result()
    assert store.history().height == 40
    assert {row.state for row in store.trials()} == {"done"}


def test_lock_excludes_and_dies_with_its_process(store: Store) -> None:
    with store.lock():
        with pytest.raises(DataError, match="another run is working"), store.lock():
            pass
        add(store, "a")  # the lock does not stop the workers
    code = (
        "import sys, time; from steppe.study.store import Store\n"
        "with Store.open(sys.argv[1]).lock(): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, store.folder], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="another run is working"), store.lock():
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    for _ in range(50):  # the system frees the lock when it has buried the process
        try:
            with store.lock():
                return
        except DataError:
            time.sleep(0.02)
    pytest.fail("the lock outlived its process")


def test_a_killed_write_leaves_the_old_file(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_json("plan", ["a"])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write_json("plan", ["b"])
    assert store.plan() == ["a"]
    assert not list(store.folder.glob(".plan*"))


def test_store_does_not_import_torch() -> None:
    code = "import sys, steppe.study.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

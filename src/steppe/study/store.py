"""The folder of a study: plain files and one SQLite ledger, safe for several processes and against kills.

    study.toml       the resolved spec
    plan.json        ids of the trials this spec asks for, in order
    ledger.sqlite    trials, their states and costs, and the metrics of every epoch
    trials/<id>/     what a trial leaves: weights, predictions
    results/*.parquet   tables of the analysis
    *.json           panel and environment information

A trial is identified by the content hash of its spec, so a changed study keeps the trials it does not change.
Those the current plan no longer asks for stay in the ledger and are left out of `Store.trials` and
`Store.history`. Files are written to a temporary name and renamed. Every ledger call opens and closes its own
connection, so nothing is shared across fork or threads. The ledger is in WAL mode, which needs a local disk.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, get_args

import polars as pl
import tomli_w

from steppe.core.errors import DataError, SpecError, unknown
from steppe.core.files import write_atomically
from steppe.study.encoding import dump_json, plain_name, toml_ready

__all__ = ["State", "Store", "TrialRow", "write_atomically"]

State = Literal["pending", "running", "done", "failed"]

_VERSION = 1
_BUSY_SECONDS = 30.0
_SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS trials (
    id TEXT PRIMARY KEY,
    part TEXT NOT NULL,
    optimizer TEXT NOT NULL,
    label TEXT NOT NULL,
    seed INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'running', 'done', 'failed')),
    error TEXT,
    best_epoch INTEGER,
    epochs INTEGER,
    gradient_evaluations INTEGER,
    forward_evaluations INTEGER,
    seconds REAL,
    samples INTEGER,
    started TEXT,
    finished TEXT,
    spec TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS epochs (
    trial TEXT NOT NULL REFERENCES trials (id),
    epoch INTEGER NOT NULL,
    gradient_evaluations INTEGER NOT NULL,
    forward_evaluations INTEGER NOT NULL,
    seconds REAL NOT NULL,
    metrics TEXT NOT NULL,
    PRIMARY KEY (trial, epoch)
) WITHOUT ROWID;
PRAGMA user_version = 1;
COMMIT;
"""


@dataclass(frozen=True, slots=True)
class TrialRow:
    """One trial as the ledger knows it; what is not known yet is None.

    Attributes:
        id: content hash of the trial's spec.
        part: the separately trained part of the problem (``"daily"``, ``"weekly"``); ``"model"`` if just one.
        optimizer: the study's label for the optimizer.
        label: a readable name of the trial.
        best_epoch: the epoch whose weights are kept (early stopping), counted from 1.
        epochs: epochs trained.
        gradient_evaluations: evaluations of a batch's gradient, all epochs together.
        forward_evaluations: evaluations of a batch's loss, with or without a gradient, all epochs together.
        seconds: CPU seconds of training; validation is not counted.
        samples: training samples a plain pass would have seen (epochs x samples per epoch).
        started: UTC, ISO 8601; the first start if the trial was resumed.
        finished: UTC, ISO 8601.
        spec: the resolved spec whose hash is the id.
    """

    id: str
    part: str
    optimizer: str
    label: str
    seed: int
    state: State
    error: str | None
    best_epoch: int | None
    epochs: int | None
    gradient_evaluations: int | None
    forward_evaluations: int | None
    seconds: float | None
    samples: int | None
    started: str | None
    finished: str | None
    spec: dict[str, Any]


_COLUMNS = ", ".join(field.name for field in fields(TrialRow))


class Store:
    """Read and write access to one study folder; make one with `Store.create` or `Store.open`.

    Instances hold a path and nothing else: they may be pickled, forked and shared between threads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"Store({str(self.folder)!r})"

    # ---- the folder ----

    @classmethod
    def create(cls, folder: str | os.PathLike[str], spec: Mapping[str, Any]) -> Self:
        """The store at ``folder``, made or brought up to ``spec``.

        Keys of ``spec`` that are None are left out (TOML has no null). Old trials stay when the spec changed.

        Raises:
            DataError: ``folder`` is a file, or holds a ``study.toml`` without a ledger (somebody's own file).
            SpecError: ``spec`` holds something TOML cannot say.
        """
        store = cls(Path(folder))
        if store.folder.exists() and not store.folder.is_dir():
            raise DataError(f"{store.folder} is a file; a study needs a folder.")
        if store._spec_path.exists() and not store._ledger_path.exists():
            raise DataError(
                f"{store.folder} holds a study.toml but no ledger.sqlite: it is not the output of a study. "
                "Choose another output folder, so that this file is not overwritten."
            )
        wanted = toml_ready(spec, "spec")
        (store.folder / "trials").mkdir(parents=True, exist_ok=True)
        (store.folder / "results").mkdir(exist_ok=True)
        store._create_ledger()  # before study.toml: a kill in between leaves a folder this method accepts
        if not store._spec_path.exists() or store.spec != wanted:
            text = tomli_w.dumps(wanted)
            write_atomically(store._spec_path, lambda path: path.write_text(text, encoding="utf-8"))
        return store

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Self:
        """The store at an existing study folder; a `DataError` says what is missing if it is none."""
        store = cls(Path(folder))
        if not store.folder.is_dir():
            raise DataError(f"there is no folder {store.folder}. Run the study first, or correct the path.")
        missing = [path.name for path in (store._spec_path, store._ledger_path) if not path.is_file()]
        if missing:
            raise DataError(f"{store.folder} is not a study folder: it has no {' and no '.join(missing)}.")
        with store._ledger() as ledger:
            version = ledger.execute("PRAGMA user_version").fetchone()[0]
        if version != _VERSION:
            raise DataError(
                f"{store._ledger_path} has layout {version}; this version of steppe reads layout {_VERSION}."
            )
        return store

    @property
    def spec(self) -> dict[str, Any]:
        """The resolved spec of the study, read from ``study.toml``."""
        try:
            return tomllib.loads(self._spec_path.read_text(encoding="utf-8"))
        except tomllib.TOMLDecodeError as error:
            raise DataError(f"{self._spec_path} is not valid TOML: {error}.") from error

    @property
    def _spec_path(self) -> Path:
        return self.folder / "study.toml"

    @property
    def _ledger_path(self) -> Path:
        return self.folder / "ledger.sqlite"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one run; a `DataError` if another run holds it.

        The lock is an open exclusive transaction on ``lock.sqlite``: the operating system frees it when the
        process ends, however it ends.
        """
        with closing(sqlite3.connect(self.folder / "lock.sqlite", timeout=0, isolation_level=None)) as held:
            try:
                held.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                raise DataError(
                    f"another run is working on {self.folder} ({error}). Wait until it ends, stop it, "
                    "or choose another output folder."
                ) from error
            with self._ledger() as ledger:
                # SQLite folds its log into the file when the last connection closes, which waits for the disk; with
                # this one open, the many short ones of a run do not
                ledger.execute("SELECT 1 FROM trials").fetchone()
                yield

    # ---- trials ----

    def add_trial(
        self, trial: str, *, part: str, optimizer: str, seed: int, spec: Mapping[str, Any], label: str = ""
    ) -> None:
        """Enter a trial as pending; one that is there already is left as it is."""
        self._write(
            "INSERT INTO trials (id, part, optimizer, label, seed, spec) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (id) DO NOTHING",
            (
                trial,
                part,
                optimizer,
                label or f"{part}/{optimizer}/{seed}",
                seed,
                dump_json(spec, "trial spec"),
            ),
        )

    def set_state(
        self,
        trial: str,
        state: State,
        *,
        error: str | None = None,
        best_epoch: int | None = None,
        epochs: int | None = None,
        gradient_evaluations: int | None = None,
        forward_evaluations: int | None = None,
        seconds: float | None = None,
        samples: int | None = None,
    ) -> None:
        """Set the state of a trial and whatever else is given; what is None stays as it is.

        ``started`` and ``finished`` follow the state by themselves, and the error of an earlier attempt is
        forgotten unless the new state is "failed".
        """
        if state not in get_args(State):
            raise SpecError(unknown("trial state", state, get_args(State)))
        now = datetime.now(UTC).isoformat(timespec="seconds")
        given = {
            "best_epoch": best_epoch,
            "epochs": epochs,
            "gradient_evaluations": gradient_evaluations,
            "forward_evaluations": forward_evaluations,
            "seconds": seconds,
            "samples": samples,
        }
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        values["state"] = state
        values["error"] = error if state == "failed" else None
        values["finished"] = now if state in ("done", "failed") else None
        sets = ", ".join(f"{name} = ?" for name in values)
        if state == "running":
            sets += f", started = coalesce(started, '{now}')"
        changed = self._write(f"UPDATE trials SET {sets} WHERE id = ?", (*values.values(), trial))
        if not changed:
            raise DataError(f"{self.folder} has no trial {trial!r}: add_trial comes first.")

    def trials(self, *, planned: bool = True) -> list[TrialRow]:
        """The trials of the current plan in its order, or with ``planned=False`` all the ledger ever saw.

        Without a plan these are the same. An id of the plan that was never added is left out.
        """
        with self._ledger() as ledger:
            rows = ledger.execute(
                f"SELECT {_COLUMNS} FROM trials ORDER BY part, optimizer, seed, id"
            ).fetchall()
        found = {row[0]: TrialRow(*(*row[:-1], json.loads(row[-1]))) for row in rows}
        plan = self.plan() if planned else None
        return list(found.values()) if plan is None else [found[trial] for trial in plan if trial in found]

    def set_plan(self, trials: Sequence[str]) -> None:
        """Say which trials, in which order, the current spec asks for."""
        self.write_json("plan", list(trials))

    def plan(self) -> list[str] | None:
        """The ids given to `set_plan`, or None before that."""
        plan: list[str] | None = self.read_json("plan")
        return plan

    def trial_folder(self, trial: str) -> Path:
        """The folder a trial leaves its files in; made if need be."""
        folder = self.folder / "trials" / plain_name(trial)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    # ---- epochs ----

    def record_epoch(
        self,
        trial: str,
        epoch: int,
        metrics: Mapping[str, float],
        *,
        gradient_evaluations: int,
        forward_evaluations: int,
        seconds: float,
    ) -> None:
        """Write the metrics at the end of an epoch (counted from 1); the same epoch again overwrites.

        The three costs are totals since the trial began, not those of the epoch alone, so a resumed trial and
        a curve over cost need no sums. NaN and infinite metrics come back as they went in.
        """
        # JSON has no NaN: non-finite values travel as the strings float() reads
        told = {name: float(x) if math.isfinite(x) else str(float(x)) for name, x in metrics.items()}
        self._write(
            "INSERT OR REPLACE INTO epochs VALUES (?, ?, ?, ?, ?, ?)",
            (trial, epoch, gradient_evaluations, forward_evaluations, seconds, dump_json(told, "metrics")),
        )

    def drop_epochs(self, trial: str, after: int) -> None:
        """Forget the epochs of a trial later than ``after``: those a resumed trial will run again."""
        self._write("DELETE FROM epochs WHERE trial = ? AND epoch > ?", (trial, after))

    def history(self, *, planned: bool = True) -> pl.DataFrame:
        """One row per trial and epoch, in the order of `trials`.

        Columns: trial, part, optimizer, seed, epoch, gradient_evaluations, forward_evaluations, seconds
        (totals at the end of the epoch), then one Float64 column per metric, null where a trial lacks it.
        """
        trials = {trial.id: trial for trial in self.trials(planned=planned)}
        with self._ledger() as ledger:
            rows = ledger.execute(
                "SELECT trial, epoch, gradient_evaluations, forward_evaluations, seconds, metrics "
                "FROM epochs ORDER BY trial, epoch"
            ).fetchall()
        by_trial: dict[str, list[tuple[Any, ...]]] = {trial: [] for trial in trials}
        names: dict[str, None] = {}
        for row in rows:
            if row[0] in by_trial:
                metrics = {name: float(value) for name, value in json.loads(row[-1]).items()}
                names.update(dict.fromkeys(metrics))
                by_trial[row[0]].append((*row[1:-1], metrics))
        schema: dict[str, Any] = {
            "trial": pl.String,
            "part": pl.String,
            "optimizer": pl.String,
            "seed": pl.Int64,
            "epoch": pl.Int64,
            "gradient_evaluations": pl.Int64,
            "forward_evaluations": pl.Int64,
            "seconds": pl.Float64,
            **dict.fromkeys(names, pl.Float64),
        }
        table = [
            (row.id, row.part, row.optimizer, row.seed, *costs, *map(metrics.get, names))
            for row in trials.values()
            for *costs, metrics in by_trial[row.id]
        ]
        return pl.DataFrame(table, schema=schema, orient="row")

    # ---- tables and facts ----

    def write_table(self, name: str, table: pl.DataFrame) -> Path:
        """Write ``results/<name>.parquet``; returns its path."""
        path = self.folder / "results" / f"{plain_name(name)}.parquet"
        write_atomically(path, lambda temporary: table.write_parquet(temporary, compression="zstd"))
        return path

    def tables(self) -> list[str]:
        """Names of the tables there are."""
        return sorted(path.stem for path in (self.folder / "results").glob("[!.]*.parquet"))

    def table(self, name: str) -> pl.DataFrame:
        """The table of that name; a `DataError` names those there are if it is missing."""
        path = self.folder / "results" / f"{plain_name(name)}.parquet"
        if not path.is_file():
            raise DataError(f"{self.folder}: {unknown('result table', name, self.tables())}")
        return pl.read_parquet(path)

    def write_json(self, name: str, content: object) -> Path:
        """Write ``<name>.json`` into the folder; returns its path. NaN is refused: JSON has none."""
        text = dump_json(content, f"{name}.json", indent=1)
        path = self.folder / f"{plain_name(name)}.json"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return path

    def read_json(self, name: str, default: Any = None) -> Any:
        """The content of ``<name>.json``, or ``default`` if there is no such file."""
        path = self.folder / f"{plain_name(name)}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return default
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not valid JSON: {error}.") from error

    # ---- SQLite ----

    @contextmanager
    def _ledger(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self._ledger_path, timeout=_BUSY_SECONDS, isolation_level=None)
            with closing(connection) as ledger:
                # with WAL: consistent after a crash, fewer waits
                ledger.execute("PRAGMA synchronous = NORMAL")
                ledger.execute("PRAGMA foreign_keys = ON")
                yield ledger
        except sqlite3.Error as error:
            raise DataError(f"{self._ledger_path}: {error}.") from error

    def _create_ledger(self) -> None:
        with self._ledger() as ledger:
            if ledger.execute("PRAGMA user_version").fetchone()[0] == 0:
                ledger.execute("PRAGMA journal_mode = WAL")
                ledger.executescript(_SCHEMA)

    def _write(self, statement: str, values: tuple[Any, ...]) -> int:
        """Run one statement as its own transaction; returns the number of rows it changed."""
        with self._ledger() as ledger:
            return ledger.execute(statement, values).rowcount

"""The page: complete, offline, honest about simulated data, about gaps and about what is not shown."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import polars as pl
import pytest
from plotly.offline.offline import get_plotlyjs

from steppe.core.errors import DataError
from steppe.report import build

from .conftest import OPTIMIZERS, Maker


class Page(HTMLParser):
    """What a browser would find in a page: its words, attributes, scripts and figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8").replace(get_plotlyjs(), "/* plotly.js */")
        self.urls: list[str] = []
        self.tags: list[str] = []
        self.figures: list[dict] = []
        self.words: list[str] = []
        self.sections: dict[str, str] = {}
        self._inside: list[str] = []
        self._section = ""
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.urls += [value or "" for key, value in attrs if key in ("src", "href", "data", "action")]
        if tag == "section":
            self._section = given["id"] or ""
        if tag in ("script", "style"):
            self._inside.append(given.get("type") or tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside.pop()
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.words.append(data)
            self.sections[self._section] = self.sections.get(self._section, "") + data
        elif self._inside[-1] == "application/json":
            self.figures.append(json.loads(data))


def test_complete_page(study: Maker) -> None:
    store = study(seeds=(0, 1, 2))
    path = build(store.folder)
    assert path == store.folder / "report.html"
    page = Page(path)
    assert path.read_text("utf-8").count(get_plotlyjs()[:400]) == 1
    order = [
        "verdict",
        "leaderboard",
        "training",
        "perturbation",
        "test",
        "differences",
        "cost",
        "limits",
        "settings",
    ]
    assert [section for section in page.sections if section] == order
    for label in OPTIMIZERS:
        for section in ("leaderboard", "training", "test", "cost", "settings"):
            assert label in page.sections[section], (label, section)
    assert "gsam generalised best" in page.sections["verdict"]
    assert "times the gradient evaluations" in page.sections["verdict"]
    assert "gsam beats adamw on RankIC by" in page.sections["verdict"]
    for score in ("blend of all parts", "daily score", "weekly score"):
        assert f"Factor test of the {score}." in page.sections["test"]
    assert "not complete" not in page.text
    assert path.stat().st_size < 6e6


def test_page_asks_the_network_for_nothing(study: Maker) -> None:
    page = Page(build(study().folder))
    assert page.urls == []
    assert not {"link", "iframe", "img", "object", "base"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", page.source)


@pytest.mark.parametrize("simulated", [True, False])
def test_simulated_stands_beside_every_block_of_numbers(study: Maker, simulated: bool) -> None:
    page = Page(build(study(simulated=simulated).folder))
    if not simulated:
        assert 'class="badge"' not in page.source
        assert "Simulated data" not in page.text
        return
    assert "Simulated data." in page.text
    for section in ("verdict", "leaderboard", "training", "perturbation", "test", "cost"):
        assert page.sections[section].split("\n")[1].strip().endswith("simulated"), section
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page.source, re.DOTALL)
    assert len(captions) == page.tags.count("figure") == len(page.figures) + 7
    assert all("simulated" in caption for caption in captions)


def test_figures_are_valid_and_switchable(study: Maker) -> None:
    page = Page(build(study().folder))
    # two parts x two metrics of validation and of the steps, two lines over the test, bars and net values per optimizer
    assert len(page.figures) == 4 + 4 + 2 + 2 * len(OPTIMIZERS)
    for figure in page.figures:
        # the page puts the style sheet's colours in; plotly itself knows no var()
        go.Figure(json.loads(re.sub(r"var\(--[a-z0-9-]+\)", "#123456", json.dumps(figure))))
    names = set(re.findall(r"var\((--[a-z0-9-]+)\)", json.dumps(page.figures)))
    assert all(f"{name}:" in page.source for name in names)
    for at, curve in enumerate(page.figures[:8]):
        for trace in curve["data"]:
            assert set(trace["meta"]) == {"epoch", "gradient evaluations", "seconds"}
            assert all(len(axis) == len(trace["y"]) for axis in trace["meta"].values())
        dots = [trace for trace in curve["data"] if trace["mode"] == "markers"]
        assert len(dots) == 2 * (len(OPTIMIZERS) - (at >= 4))  # the baseline tells nothing of its steps
        assert all(len(trace["x"]) == 1 for trace in dots)
    assert {f'"{axis}"' for axis in ("epoch", "gradient evaluations", "seconds")} <= set(
        re.findall(r'data-axis=("[^"]*")', page.source)
    )


def test_an_optimizer_keeps_its_colour(study: Maker) -> None:
    page = Page(build(study(seeds=(0,)).folder))
    colours: dict[str, set[str]] = {}
    for figure in page.figures:
        for trace in figure["data"]:
            if trace.get("name") in OPTIMIZERS and "line" in trace:
                colours.setdefault(trace["name"], set()).add(trace["line"]["color"])
    assert {name: len(found) for name, found in colours.items()} == dict.fromkeys(OPTIMIZERS, 1)
    assert colours["adamw"] == {"var(--opt-0)"}
    assert len(set.union(*colours.values())) == len(OPTIMIZERS)


def test_one_seed_is_said(study: Maker) -> None:
    page = Page(build(study(seeds=(0,)).folder))
    assert "only one seed was run" in page.sections["verdict"]
    assert "Seed-to-seed variation is not measured." in page.sections["verdict"]
    assert "One seed:" in page.sections["limits"]
    assert "Thin lines are seeds" not in page.text


def test_nothing_shown_is_said_plainly(study: Maker) -> None:
    flat = {label: (settings, passes, 0.0) for label, (settings, passes, _) in OPTIMIZERS.items()}
    page = Page(build(study(optimizers=flat).folder))
    assert "No optimizer can be told from adamw on these data" in page.sections["verdict"]
    assert page.sections["leaderboard"].count("tie") >= len(OPTIMIZERS) - 1


def test_failures_and_gaps_are_listed(study: Maker) -> None:
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: loss <nan> & worse'
    store = study(failed={"gam": trace}, running=["sam"])
    page = Page(build(store.folder))
    assert "of 24 trials 16 done, 4 running, 4 failed" in page.text
    assert "Without test results so far: sam, gam." in page.text
    assert page.sections["failed"].count("ValueError: loss <nan> & worse") == 2 * 4  # summary and full text
    assert "<nan>" not in page.source
    assert "sam" not in [row["optimizer"] for row in _csv(store.folder / "report" / "leaderboard.csv")]


@pytest.mark.parametrize("running", [list(OPTIMIZERS), list(OPTIMIZERS)[:1], list(OPTIMIZERS)[1:]])
def test_unfinished_studies_get_a_page(study: Maker, running: list[str]) -> None:
    page = Page(build(study(running=running, seeds=(0,)).folder))
    assert "not complete" in page.text
    assert re.search("There is no(thing to compare|.*verdict) yet", page.sections["verdict"])
    assert ("leaderboard" in page.sections) == (running != list(OPTIMIZERS))


def test_study_before_its_first_trial(study: Maker) -> None:
    store = study(tested=False, running=list(OPTIMIZERS))
    store.set_plan([])
    assert "No trial has been entered yet." in Page(build(store.folder)).text


def test_single_part_and_many_optimizers(study: Maker) -> None:
    many = {"adamw": OPTIMIZERS["adamw"]} | {f"sam-{n}": OPTIMIZERS["sam"] for n in range(13)}
    page = Page(build(study(optimizers=many, parts=("model",), seeds=(0,)).folder))
    assert "model's score" in page.text
    assert "--opt-13: var(--color-1)" in page.source
    dashes = {t["line"]["dash"] for f in page.figures[:1] for t in f["data"] if t["mode"] != "markers"}
    assert dashes == {"solid", "dash"}


def test_other_metrics_than_those_of_stocks(study: Maker) -> None:
    store = study(tested=False, seeds=(0,))
    for trial in store.trials():
        store.drop_epochs(trial.id, after=0)
        store.record_epoch(
            trial.id,
            1,
            {"train_loss": 0.3, "validation_accuracy": float("nan")},
            gradient_evaluations=1,
            forward_evaluations=1,
            seconds=1.0,
        )
    page = Page(build(store.folder))
    assert "validation accuracy" in page.sections["training"]
    assert page.figures[0]["data"][0]["y"] == [None]


def test_weird_names_are_escaped(study: Maker) -> None:
    weird = "</script><b>sam</b> & 'co'"
    optimizers = {"adamw": OPTIMIZERS["adamw"], weird: OPTIMIZERS["gsam"]}
    page = Page(build(study(optimizers=optimizers, title='<i>"quoted"</i> {{ 7 * 7 }}').folder))
    assert "<b>sam" not in page.source
    assert "<i>" not in page.source
    assert '<i>"quoted"</i> {{ 7 * 7 }}' in page.text
    assert weird in page.sections["leaderboard"]
    shown = {t["name"] for f in page.figures[:1] for t in f["data"]}
    assert {unescape(name) for name in shown} == {"adamw", weird}
    assert all("<" not in name for name in shown)
    buttons = {unescape(name) for name in re.findall(r'data-name="([^"]*)"', page.source)}
    assert buttons == shown


def test_dropped_optimizers_leave_the_page(study: Maker) -> None:
    store = study(seeds=(0,))
    smaller = store.spec
    for label in ("gam", "asam"):
        del smaller["optimizers"][label]
    type(store).create(store.folder, smaller)
    store.set_plan([row.id for row in store.trials() if row.optimizer in smaller["optimizers"]])
    page = Page(build(store.folder))
    assert "gam" not in page.text.replace("gamma", "")
    assert len(_csv(store.folder / "report" / "leaderboard.csv")) == 4


def test_tables_beside_the_page(study: Maker, tmp_path: Path) -> None:
    store = study(seeds=(0, 1, 2))
    page = build(store.folder, tmp_path / "elsewhere" / "gsam.html")
    folder = tmp_path / "elsewhere" / "gsam"
    assert page.is_file()
    assert {f.name for f in folder.iterdir()} == {
        "leaderboard.csv",
        "perturbation.csv",
        "costs.csv",
        "differences.csv",
        "factor-blend.csv",
        "factor-daily.csv",
        "factor-weekly.csv",
    }
    board = {row["optimizer"]: row for row in _csv(folder / "leaderboard.csv")}
    ic = store.table("ic").filter(pl.col("part") == "blend")
    for label, row in board.items():
        mean = ic.filter(pl.col("optimizer") == label)["rank_ic"].mean()
        assert float(row["rank_ic"]) == pytest.approx(mean)
    assert float(board["gsam"]["difference"]) == pytest.approx(
        float(board["gsam"]["rank_ic"]) - float(board["adamw"]["rank_ic"])
    )
    assert board["gsam"]["outcome"] == "better"
    assert float(board["gam"]["gradient_ratio"]) > 3
    assert board["adamw"]["p_holm"] == ""
    assert list(board) == sorted(board, key=lambda label: -float(board[label]["rank_ic"]))


def test_not_a_study(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a study folder"):
        build(tmp_path)


def test_report_does_not_import_torch() -> None:
    code = "import sys, steppe.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))

"""The ``steppe`` command. Imports what a command needs when it runs: help, lists and reports stay free of torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

try:
    from cyclopts import App, Parameter
except ModuleNotFoundError as missing:  # the base install holds the optimizers only
    raise SystemExit("the steppe command needs the lab: pip install 'steppe[lab]'") from missing

import steppe
from steppe.core.errors import DataError, SpecError, SteppeError, explain_validation

T = TypeVar("T")
_Several = Annotated[tuple[T, ...], Parameter(consume_multiple=True, negative=(), show_default=False)]

if TYPE_CHECKING:
    from steppe.study.run import Progress

app = App(
    name="steppe",
    help="Which optimizer makes my model generalise, what does it cost, and why?",
    version=steppe.__version__,
)
data = App(name="data", help="Market panels.")
app.command(data)

DEFAULT_STUDY = Path(__file__).parent / "study" / "default.toml"


@app.command
def run(
    study: Annotated[Path, Parameter(show_default=False)] = DEFAULT_STUDY,
    *,
    out: Path | None = None,
    overrides: Annotated[
        tuple[str, ...], Parameter(name=["--set", "-s"], negative=(), show_default=False)
    ] = (),
) -> None:
    """Run a study, or resume it: trials that are done are not run again. Ends with the path of the report.

    Parameters
    ----------
    study
        The study's TOML file; the embedded stock-selection study on a simulated market if omitted.
    out
        The study's folder; ``runs/<name>`` if omitted.
    overrides
        ``key.sub=value``, as in ``--set epochs=3 --set problem.panel=PATH``.
    """
    # one thread per process, set before torch loads: two OpenMP threads on shared cores are slower than one
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from steppe.report import build
    from steppe.study.run import run_study
    from steppe.study.spec import read_spec

    spec = read_spec(study, overrides)
    folder = out or Path("runs") / spec.name
    with _progress() as show:
        store = run_study(spec, folder, show, _landscape_progress)
    failed = [row for row in store.trials() if row.state == "failed"]
    for row in failed:
        print(f"failed: {row.id}: {(row.error or '').strip().splitlines()[-1]}", file=sys.stderr)
    print(build(store.folder))
    if failed:
        raise SystemExit(1)


@app.command
def report(folder: Path) -> None:
    """Build the page of a study's folder again and print its path.

    Parameters
    ----------
    folder
        The study's folder.
    """
    from steppe.report import build

    print(build(folder))


@app.command
def landscape(
    folder: Path,
    *,
    optimizers: _Several[str] = (),
    seeds: _Several[int] = (),
    part: str | None = None,
    surfaces: bool = True,
    plane: str = "trajectory",
    lines: _Several[str] = (),
    density: bool = False,
    measures: _Several[str] = (),
    measure_on: _Several[str] = ("train",),
    dates: int = 12,
    stocks: int = 125,
    resolution: int = 25,
    workers: int = 2,
) -> None:
    """Look at the landscapes of a study's finished trials, then build its report again and print the path.

    Results that are there already are not computed again.

    Parameters
    ----------
    folder
        The study's folder.
    optimizers
        Labels; all if omitted.
    seeds
        Surfaces, densities and lines between optimizers are drawn for the first one, measures taken for all; the
        study's first if omitted.
    part
        Of the problem; the last daily one if omitted.
    surfaces
        Whether to draw surfaces in a plane through each trial's weights, on train and test dates.
    plane
        Of the surfaces: trajectory (of each trial's training), random (two filter-normalised directions) or
        eigenvectors (the two leading ones of the Hessian).
    lines
        Straight ways between trained weights, with their barrier: optimizers (from the baseline to each other) or
        seeds (from the first seed to each other).
    density
        Whether to estimate the spectral density of the Hessian.
    measures
        Flatness measures to take; a moderate selection if omitted.
    measure_on
        Splits to take them on: train, validation, test.
    dates
        Cross-sections of a split to look at, evenly spaced.
    stocks
        Stocks of each, evenly spaced.
    resolution
        Points of a surface along each axis.
    workers
        Processes.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from pydantic import ValidationError

    from steppe.report import build
    from steppe.study.landscape import run_landscape
    from steppe.study.spec import LandscapeSpec
    from steppe.study.store import Store

    given: dict[str, Any] = {"measures": measures} if measures else {}
    given |= {
        "optimizers": optimizers,
        "seeds": seeds,
        "part": part,
        "surfaces": surfaces,
        "plane": plane,
        "lines": lines,
        "density": density,
        "measure_on": measure_on,
    }
    given |= {"dates": dates, "stocks": stocks, "resolution": resolution}
    try:
        wanted = LandscapeSpec.model_validate(given)
    except ValidationError as error:
        raise SpecError(explain_validation(error, LandscapeSpec, "steppe landscape")) from error
    run_landscape(Store.open(folder), wanted, workers=workers, on_progress=_landscape_progress)
    print(build(folder))


@app.command
def figures(folder: Path, *, out: Path | None = None, kind: str = "pdf") -> None:
    """Write a study's landscapes as files for papers and print their paths.

    Parameters
    ----------
    folder
        The study's folder.
    out
        Where the files go; ``FOLDER/figures`` if omitted.
    kind
        pdf, svg or png.
    """
    from steppe.report.paper import write_figures

    for file in write_figures(folder, out, kind):
        print(file)


@app.command(name="list")
def list_() -> None:
    """List every optimizer and problem."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Column, Table

    from steppe.optim.federated.registry import METHODS
    from steppe.optim.registry import LOSSES, OPTIMIZERS
    from steppe.problems.registry import PROBLEMS

    console = Console()

    def table(title: str, *more: str) -> Table:
        key = Column("key", no_wrap=True)
        return Table(key, *more, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)

    specs = {**OPTIMIZERS, **LOSSES, **METHODS}
    for family in dict.fromkeys(spec.family for spec in specs.values()):
        rows = table(f"{family}, with gradients per step", "", "what it does", "paper")
        for key, spec in specs.items():
            if spec.family == family:
                rows.add_row(key, f"{spec.evals:.3g}", spec.summary, spec.paper)
        console.print(rows)
    problems = table("problems", "family", "what it is")
    for key, spec in PROBLEMS.items():
        problems.add_row(key, spec.family, spec.summary)
    console.print(problems)


@data.command
def check(path: Path, *, schema: Path | None = None) -> None:
    """Read a panel with all checks and print what there is to know of it.

    Parameters
    ----------
    path
        A CSV or parquet file, or a folder of them.
    schema
        The TOML file that says how to read it; ``panel.toml`` beside the data if omitted.
    """
    from rich.console import Console

    from steppe.quant.describe import check as describe

    Console().print(describe(path, schema), soft_wrap=True)


@data.command(name="import")
def import_(
    source: str,
    *,
    out: Path,
    schema: Path | None = None,
    symbols: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    index: str | None = None,
    start: date = date(2010, 1, 1),
    end: date | None = None,
) -> None:
    """Read a panel once and save it, or download bars from a vendor, into a folder that studies can name.

    Parameters
    ----------
    source
        What `steppe data check` reads, or a vendor: akshare, baostock, tushare, yfinance.
    out
        The folder to write. A broken download is resumed by the same command.
    schema
        The TOML file that says how to read a path.
    symbols
        Stocks to download, in any style of symbols, such as ``--symbols 600000.SH 000001.SZ``.
    index
        Download all stocks of this index (CSI300, CSI500, CSI1000), with its membership where the vendor knows it.
    start
        First day to download.
    end
        Last day to download; today if omitted, or that of the download to resume.
    """
    from steppe.quant.sources.adapters import ADAPTERS
    from steppe.quant.sources.download import download
    from steppe.quant.sources.table import read_panel

    if source not in ADAPTERS or Path(source).exists():
        if out.exists() and not (out / "manifest.json").is_file():
            raise DataError(f"{out} is there and no saved panel: name a folder that is not there yet.")
        read_panel(source, schema).save(out)
    else:
        download(source, out, symbols=symbols, index=index, start=start, end=end, show=_stocks_done)
        check(out)
    print(out)


def _stocks_done(done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{of} stocks", end="\n" if done == of else "", file=sys.stderr, flush=True)


def _landscape_progress(done: int, total: int, job: str) -> None:
    print(f"[{done}/{total}] {job or 'done before'}", file=sys.stderr, flush=True)


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left on a terminal, a line per finished trial elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    told: set[str] = set()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        whole = bar.add_task("trials", total=None, note="")

        def show(progress: Progress) -> None:
            ended = [row for row in progress.trials if row.state in ("done", "failed")]
            left = "" if progress.eta is None else f"about {_duration(progress.eta)} left"
            count = f"{len(ended)}/{len(progress.trials)} trials"
            bar.update(whole, total=progress.total, completed=progress.work, description=count, note=left)
            for row in ended:
                if row.id not in told:
                    told.add(row.id)
                    what = (
                        f"stopped at epoch {row.epochs}, best {row.best_epoch}, {_duration(row.seconds or 0)}"
                    )
                    console.print(
                        f"{row.label}: {what if row.state == 'done' else 'FAILED'}"
                        + ("" if console.is_terminal else f"  [{count}{', ' + left if left else ''}]"),
                        markup=False,
                        highlight=False,
                        soft_wrap=True,
                    )

        yield show


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def main() -> None:
    """Run the command line; errors steppe raises on purpose are one message, not a traceback."""
    try:
        app()
    except SteppeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the same command resumes.", file=sys.stderr)
        raise SystemExit(130) from None

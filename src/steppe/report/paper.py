"""Landscapes as vector files for papers, drawn by matplotlib (``pip install 'steppe[figures]'``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steppe.core.errors import DataError, SpecError
from steppe.core.files import write_atomically
from steppe.report.landscape_curves import Density, Line, densities, lines
from steppe.report.landscape_figures import COLORSCALE, levels
from steppe.report.landscapes import Landscapes, Panel
from steppe.report.results import Results
from steppe.study.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Drawing = Callable[[Figure], None]

__all__ = ["FORMATS", "write_figures"]

FORMATS = ("pdf", "svg", "png")

COLUMN = 2.4
"""Width of a panel, inches: two make a column and a half of a paper."""


def write_figures(
    folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, kind: str = "pdf"
) -> list[Path]:
    """Write a file per set of surfaces, of lines and of densities; all surfaces of a file share their contours.

    The same store gives the same bytes: no file holds a date.

    Args:
        folder: a study folder with landscapes.
        out: where the files go; ``<folder>/figures`` if None.
        kind: one of `FORMATS`.

    Returns:
        The files: ``landscape-<part>-s<seed>``, with ``-random`` or ``-eigenvectors`` after it for other planes than
        the trajectory's, a row per optimizer and a column per split; ``lines-<part>-<number>``, a column per split;
        ``density-<part>-s<seed>``.

    Raises:
        SpecError: an unknown kind, or matplotlib is not installed.
        DataError: not a study folder, or it has no landscapes.
    """
    if kind not in FORMATS:
        raise SpecError(f"unknown format {kind!r}: one of {', '.join(FORMATS)}.")
    store = Store.open(folder)
    landscapes = Landscapes.of(store, Results.of(store))
    drawings = dict(_drawings(landscapes))
    if not drawings:
        raise DataError(f"{store.folder} has no landscapes yet: run `steppe landscape {store.folder}` first.")
    target = Path(out) if out is not None else store.folder / "figures"
    target.mkdir(parents=True, exist_ok=True)
    return [_write(draw, target / f"{name}.{kind}") for name, draw in drawings.items()]


def _drawings(landscapes: Landscapes) -> Iterator[tuple[str, Drawing]]:
    """File name -> what draws it."""
    for part in landscapes.parts:
        for seed, plane in landscapes.views(part):
            name = f"landscape-{part}-s{seed}" + ("" if plane == "trajectory" else f"-{plane}")
            yield name, partial(_surfaces, landscapes, landscapes.panels(part, seed, plane))
        for number, (words, among) in enumerate(lines(landscapes, part).items(), 1):
            yield f"lines-{part}-{number}", partial(_lines, landscapes, words, among)
        for seed, found in densities(landscapes, part).items():
            yield f"density-{part}-s{seed}", partial(_densities, landscapes, found)


def _write(draw: Drawing, file: Path) -> Path:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SpecError("figures for papers need matplotlib: pip install 'steppe[figures]'.") from error
    # text stays text in a vector file, and nothing random or dated is written
    with rc_context({"font.size": 8, "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "steppe"}):
        figure = Figure(layout="constrained")
        draw(figure)
        dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(file.suffix[1:])
        write_atomically(
            file, lambda path: figure.savefig(path, format=file.suffix[1:], dpi=300, metadata=dated)
        )
    return file


def _surfaces(landscapes: Landscapes, pairs: Mapping[str, Mapping[str, Panel]], figure: Figure) -> None:
    splits = list(dict.fromkeys(split for pair in pairs.values() for split in pair))
    shared = levels([panel for pair in pairs.values() for panel in pair.values()])
    figure.set_size_inches(COLUMN * len(splits) + 0.9, COLUMN * len(pairs))
    grid = figure.subplots(len(pairs), len(splits), sharex=True, sharey=True, squeeze=False)
    shown: Any = None
    for row, (label, pair) in zip(grid, pairs.items(), strict=True):
        for axes, split in zip(row, splits, strict=True):
            if split in pair:
                shown = _draw(axes, landscapes, pair[split], shared) or shown
                axes.set_title(f"{label}, {split}", fontsize=8)
    if shown is not None:
        figure.colorbar(shown, ax=grid, label="loss", shrink=0.8)


def _lines(landscapes: Landscapes, words: str, among: Sequence[Line], figure: Figure) -> None:
    """A column per split; the optimizers' colours are matplotlib's, in the study's order."""
    splits = list(dict.fromkeys(one.split for one in among))
    figure.set_size_inches(COLUMN * len(splits) + 0.9, COLUMN)
    row = figure.subplots(1, len(splits), squeeze=False)[0]
    figure.suptitle(f"between {words}", fontsize=8)
    for axes, split in zip(row, splits, strict=True):
        for one in (one for one in among if one.split == split):
            label, seed = one.end
            color = f"C{landscapes.results.optimizers.index(label)}"
            axes.plot(one.t, one.loss, color=color, linewidth=1, label=f"{label}, seed {seed}")
        axes.set_title(split, fontsize=8)
        axes.set_xlabel("share of the way")
    row[0].set_ylabel("loss")
    row[-1].legend(title="to", fontsize=6, title_fontsize=6)


def _densities(landscapes: Landscapes, found: Density, figure: Figure) -> None:
    figure.set_size_inches(1.5 * COLUMN, COLUMN)
    axes = figure.subplots()
    for label, curve in found.curves.items():
        color = f"C{landscapes.results.optimizers.index(label)}"
        axes.plot(found.eigenvalue, curve, color=color, linewidth=1, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("eigenvalue")
    axes.set_ylabel("share per unit")
    axes.legend(fontsize=6)


def _draw(axes: Axes, landscapes: Landscapes, panel: Panel, shared: list[float]) -> Any:
    """The contours, the trajectory, a diamond at the kept weights; returns what a colour bar describes."""
    shown: Any = None
    if len(shared) > 1:
        loss = np.ma.masked_invalid(panel.loss)
        shown = axes.contourf(panel.x, panel.y, loss, shared, extend="both", cmap=COLORSCALE.lower())
        axes.contour(panel.x, panel.y, loss, shared, colors="white", linewidths=0.3, alpha=0.5)
    way = landscapes.way(panel)
    if not way.is_empty():
        axes.plot(way["x"], way["y"], color="black", linewidth=2)
        axes.plot(way["x"], way["y"], color="white", linewidth=1, marker="o", markersize=2)
    axes.plot(0, 0, marker="D", color="#ffd92f", markeredgecolor="black", markersize=5)
    axes.set_xlim(panel.x[0], panel.x[-1])
    axes.set_ylim(panel.y[0], panel.y[-1])
    return shown

"""Landscapes as vector files for papers, drawn by matplotlib (``pip install 'steppe[figures]'``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steppe.core.errors import DataError, SpecError
from steppe.core.files import write_atomically
from steppe.report.landscape_figures import COLORSCALE, levels
from steppe.report.landscapes import Landscapes, Panel
from steppe.report.results import Results
from steppe.study.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FORMATS", "write_figures"]

FORMATS = ("pdf", "svg", "png")

COLUMN = 2.4
"""Width of a panel, inches: two make a column and a half of a paper."""


def write_figures(
    folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, kind: str = "pdf"
) -> list[Path]:
    """Write one file per part and seed: a row per optimizer, a column per split, one set of contours for all.

    The same store gives the same bytes: no file holds a date.

    Args:
        folder: a study folder with landscapes.
        out: where the files go; ``<folder>/figures`` if None.
        kind: one of `FORMATS`.

    Returns:
        The files, called ``landscape-<part>-s<seed>.<kind>``.

    Raises:
        SpecError: an unknown kind, or matplotlib is not installed.
        DataError: not a study folder, or it has no surfaces.
    """
    if kind not in FORMATS:
        raise SpecError(f"unknown format {kind!r}: one of {', '.join(FORMATS)}.")
    store = Store.open(folder)
    landscapes = Landscapes.of(store, Results.of(store))
    if landscapes.surface.is_empty():
        raise DataError(f"{store.folder} has no landscapes yet: run `steppe landscape {store.folder}` first.")
    target = Path(out) if out is not None else store.folder / "figures"
    target.mkdir(parents=True, exist_ok=True)
    return [
        _write(landscapes, part, seed, target / f"landscape-{part}-s{seed}.{kind}")
        for part in landscapes.parts
        for seed in landscapes.seeds(part)
    ]


def _write(landscapes: Landscapes, part: str, seed: int, file: Path) -> Path:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SpecError("figures for papers need matplotlib: pip install 'steppe[figures]'.") from error
    pairs = landscapes.panels(part, seed)
    splits = list(dict.fromkeys(split for pair in pairs.values() for split in pair))
    shared = levels([panel for pair in pairs.values() for panel in pair.values()])
    # text stays text in a vector file, and nothing random or dated is written
    with rc_context({"font.size": 8, "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "steppe"}):
        figure = Figure(figsize=(COLUMN * len(splits) + 0.9, COLUMN * len(pairs)), layout="constrained")
        grid = figure.subplots(len(pairs), len(splits), sharex=True, sharey=True, squeeze=False)
        shown: Any = None
        for row, (label, pair) in zip(grid, pairs.items(), strict=True):
            for axes, split in zip(row, splits, strict=True):
                if split in pair:
                    shown = _draw(axes, landscapes, pair[split], shared) or shown
                    axes.set_title(f"{label}, {split}", fontsize=8)
        if shown is not None:
            figure.colorbar(shown, ax=grid, label="loss", shrink=0.8)
        dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(file.suffix[1:])
        write_atomically(
            file, lambda path: figure.savefig(path, format=file.suffix[1:], dpi=300, metadata=dated)
        )
    return file


def _draw(axes: Axes, landscapes: Landscapes, panel: Panel, shared: list[float]) -> Any:
    """The contours, the trajectory, a diamond at the kept weights; returns what a colour bar describes."""
    shown: Any = None
    if len(shared) > 1:
        loss = np.ma.masked_invalid(panel.loss)
        shown = axes.contourf(panel.x, panel.y, loss, shared, extend="both", cmap=COLORSCALE.lower())
        axes.contour(panel.x, panel.y, loss, shared, colors="white", linewidths=0.3, alpha=0.5)
    way = landscapes.way(panel.trial)
    axes.plot(way["x"], way["y"], color="black", linewidth=2)
    axes.plot(way["x"], way["y"], color="white", linewidth=1, marker="o", markersize=2)
    axes.plot(0, 0, marker="D", color="#ffd92f", markeredgecolor="black", markersize=5)
    axes.set_xlim(panel.x[0], panel.x[-1])
    axes.set_ylim(panel.y[0], panel.y[-1])
    return shown

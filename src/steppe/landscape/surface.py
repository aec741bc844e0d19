"""The loss over a line or a plane through given weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from steppe.core.errors import DataError, SpecError, SteppeError
from steppe.core.files import write_atomically
from steppe.core.processes import one_thread, pool
from steppe.landscape.point import Point, map_tensors, samples_of

__all__ = ["Surface", "surface"]

STRIDE = 4
"""Steps of the grid along a side of the coarse cells that an adaptive surface starts with."""

TOLERANCE = 0.03
"""Largest expected error of an interpolated loss, as a share of what lies between the least and the median loss."""

PIECE = 8
"""Points that a worker takes at a time."""

Place = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Surface:
    """The loss on a grid around an origin.

    Attributes:
        x: ``[nx]`` coordinates along the first axis.
        y: ``[ny]`` along the second; a line has the single one 0.
        loss: ``[ny, nx]`` float64.
        computed: ``[ny, nx]`` bool: False where the loss is interpolated from its neighbours.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    loss: NDArray[np.float64]
    computed: NDArray[np.bool_]


def surface(
    point: Point,
    origin: Tensor,
    axes: Tensor,
    spans: Sequence[tuple[float, float]],
    resolution: int = 25,
    *,
    adaptive: bool = False,
    chunk: int | None = None,
    workers: int = 0,
    folder: Path | None = None,
) -> Surface:
    """The loss at ``origin + x axes[0] + y axes[1]`` over a grid; a line for a single axis.

    Each point is computed by one thread, apart from the others, from the origin: neither workers, nor a kill and a
    second call with the same folder, nor the order of evaluation changes a bit.

    Args:
        point: model, loss and data; its own weights do not matter.
        origin: ``[dim]`` weights at coordinates (0, 0).
        axes: ``[1 or 2, dim]`` (`steppe.landscape.directions`, `steppe.landscape.trajectory.pca`).
        spans: first and last coordinate along each axis.
        resolution: points along each axis, both ends included.
        adaptive: compute every fourth point, halve the cells where the loss bends, and interpolate the rest linearly.
            A cell is halved once in any case, which shows how far its corners mispredict what is between them, and
            again while that says its parts will be wrong by more than `TOLERANCE`. What is narrower than half a
            coarse cell may be missed.
        chunk: cut batches into this many samples (caches like 250), where the loss is a mean over samples; default:
            batches as they are.
        workers: processes with one thread each; 0 computes here. The model and the loss must then be picklable: a
            loss defined at the top of a module, not a lambda.
        folder: keeps what is computed, about once a second; made if need be.

    Raises:
        SpecError: axes, spans or resolution do not fit together.
        DataError: `folder` holds another surface, or the loss is no mean over samples, so that `chunk` changes it.
        SteppeError: a worker died.
    """
    if (
        axes.dim() != 2
        or len(axes) not in (1, 2)
        or axes.shape[1:] != origin.shape
        or len(spans) != len(axes)
    ):
        raise SpecError(
            f"need one or two axes [k, {origin.numel()}] and as many spans, got {list(axes.shape)} and {len(spans)}."
        )
    if resolution < 2 or any(not low < high for low, high in spans):
        raise SpecError(
            f"need resolution >= 2 and spans (low, high) with low < high, got {resolution}, {spans}."
        )
    x = np.linspace(*spans[0], resolution)
    y = np.linspace(*spans[1], resolution) if len(spans) == 2 else np.zeros(1)
    plane = _Plane(point if chunk is None else _chunked(point, chunk, origin), origin, axes, x, y)
    with one_thread():
        grid = _Grid(plane, folder)
        with _evaluator(plane, workers) as evaluate:

            def compute(places: list[Place]) -> None:
                todo = [place for place in places if not grid.computed[place]]
                grid.fill(evaluate(todo))

            if adaptive:
                cells = _refine(grid, compute)
            else:
                compute([(j, i) for j in range(len(y)) for i in range(len(x))])
                cells = []
    loss = grid.loss.copy()
    for cell in cells:
        for place in _places(range(cell.top, cell.bottom + 1), range(cell.left, cell.right + 1)):
            if not grid.computed[place]:
                loss[place] = cell.predict(grid.loss, place)
    return Surface(x, y, loss, grid.computed.copy())


class _Plane:
    """Weights by their place on the grid, and their loss."""

    def __init__(
        self, point: Point, origin: Tensor, axes: Tensor, x: NDArray[np.float64], y: NDArray[np.float64]
    ) -> None:
        self.point, self.x, self.y = point, x, y
        self.origin, self.axes = origin.detach().double(), axes.detach().double()

    def loss(self, place: Place) -> float:
        theta = self.origin + self.x[place[1]] * self.axes[0]
        if len(self.axes) == 2:
            theta = theta + self.y[place[0]] * self.axes[1]
        return self.point.value(theta)

    def identity(self) -> dict[str, Any]:
        """What its losses depend on, JSON-able; data and loss by the loss at the origin."""

        def digest(tensor: Tensor) -> str:
            return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()

        return {
            "origin": digest(self.origin),
            "axes": digest(self.axes),
            "x": [float(self.x[0]), float(self.x[-1]), len(self.x)],
            "y": [float(self.y[0]), float(self.y[-1]), len(self.y)],
            "loss at the origin": repr(self.point.value(self.origin)),
        }


class _Grid:
    """The losses so far, ``loss [ny, nx]`` and ``computed [ny, nx]``, in a folder where there is one."""

    def __init__(self, plane: _Plane, folder: Path | None) -> None:
        shape = len(plane.y), len(plane.x)
        self.loss, self.computed = np.full(shape, np.nan), np.zeros(shape, dtype=np.bool_)
        self._file = None if folder is None else folder / "grid.npy"
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        text, said = json.dumps(plane.identity(), indent=1), folder / "surface.json"
        if not said.exists():
            write_atomically(said, lambda path: path.write_text(text, "utf-8"))
        elif said.read_text("utf-8") != text:
            raise DataError(
                f"{folder} holds another surface (other weights, axes, grid, data or loss): choose another folder."
            )
        elif self._file and self._file.exists():
            self.loss, computed = np.load(self._file, allow_pickle=False)
            self.computed = computed == 1

    def fill(self, found: Iterator[tuple[Place, float]]) -> None:
        saved = time.monotonic()
        try:
            for place, loss in found:
                self.loss[place], self.computed[place] = loss, True
                if time.monotonic() - saved > 1:
                    self._save()
                    saved = time.monotonic()
        finally:
            self._save()

    def _save(self) -> None:
        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, np.stack([self.loss, self.computed]))

        if self._file:
            write_atomically(self._file, write)


@dataclass(frozen=True)
class _Cell:
    """A rectangle of the grid; rows from top to bottom, columns from left to right, both included."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def divisible(self) -> bool:
        return max(self.bottom - self.top, self.right - self.left) > 1

    def cuts(self) -> tuple[list[int], list[int]]:
        """Rows and columns of the corners of its parts."""
        return _halved(self.top, self.bottom), _halved(self.left, self.right)

    def predict(self, loss: NDArray[np.float64], place: Place) -> float:
        """Bilinear in the corners."""
        v = (place[0] - self.top) / max(self.bottom - self.top, 1)
        u = (place[1] - self.left) / max(self.right - self.left, 1)
        top = (1 - u) * loss[self.top, self.left] + u * loss[self.top, self.right]
        bottom = (1 - u) * loss[self.bottom, self.left] + u * loss[self.bottom, self.right]
        return float((1 - v) * top + v * bottom)


def _refine(grid: _Grid, compute: Callable[[list[Place]], None]) -> list[_Cell]:
    """Compute where the loss bends; returns the cells that are left, which together cover the grid."""
    rows, columns = (_coarse(n) for n in grid.loss.shape)
    compute(_places(rows, columns))
    known = grid.loss[np.ix_(rows, columns)]
    known = known[np.isfinite(known)]
    allowed = TOLERANCE * float(np.median(known) - known.min()) if known.size else 0.0
    open_, left = [_Cell(*r, *c) for r in _sides(rows) for c in _sides(columns)], []
    while open_:
        left += [cell for cell in open_ if not cell.divisible]
        open_ = [cell for cell in open_ if cell.divisible]
        compute(sorted({place for cell in open_ for place in _places(*cell.cuts())}))
        parts: list[_Cell] = []
        for cell in open_:
            rows, columns = cell.cuts()
            wrong = [abs(grid.loss[p] - cell.predict(grid.loss, p)) for p in _places(rows, columns)]
            # the error of linear interpolation falls with the square of the width; a NaN is never small
            fine = max(wrong, key=lambda w: np.inf if np.isnan(w) else w) / 4 <= allowed
            (left if fine else parts).extend(_Cell(*r, *c) for r in _sides(rows) for c in _sides(columns))
        open_ = parts
    return left


def _coarse(n: int) -> list[int]:
    return sorted({*range(0, n, STRIDE), n - 1})


def _halved(first: int, last: int) -> list[int]:
    return sorted({first, (first + last) // 2, last})


def _sides(cuts: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(cuts)) or [(cuts[0], cuts[0])]


def _places(rows: Sequence[int], columns: Sequence[int]) -> list[Place]:
    return [(j, i) for j in rows for i in columns]


@contextlib.contextmanager
def _evaluator(
    plane: _Plane, workers: int
) -> Iterator[Callable[[list[Place]], Iterator[tuple[Place, float]]]]:
    """A function from places to (place, loss), here or in processes."""
    if not workers:
        yield lambda places: ((place, plane.loss(place)) for place in places)
        return
    with pool(workers, _serve, (plane,)) as executor:

        def evaluate(places: list[Place]) -> Iterator[tuple[Place, float]]:
            pieces = [places[k : k + PIECE] for k in range(0, len(places), PIECE)]
            try:
                for piece, losses in zip(pieces, executor.map(_losses, pieces), strict=True):
                    yield from zip(piece, losses, strict=True)
            except BrokenProcessPool as error:
                raise SteppeError(
                    "a worker process died: out of memory, or the loss cannot be read in another process. With a "
                    "folder, the same call goes on where this one ended."
                ) from error

        yield evaluate


_served: _Plane
"""In a worker: the plane it evaluates."""


def _serve(plane: _Plane) -> None:
    global _served
    _served = plane


def _losses(places: list[Place]) -> list[float]:
    return [_served.loss(place) for place in places]


def _chunked(point: Point, size: int, origin: Tensor) -> Point:
    """The point with its batches cut into `size` samples: activations that fit into a cache are faster."""
    batches, weights = [], []
    for share, batch in point.chosen(None):
        samples = samples_of(batch)
        for first in range(0, samples, size):
            rows = slice(first, first + size)
            batches.append(map_tensors(batch, operator.itemgetter(rows)))
            weights.append(share * len(range(samples)[rows]) / samples)
    cut = Point(point.model, point.loss, batches, weights=weights)
    whole, parts = point.value(origin), cut.value(origin)
    if not abs(whole - parts) <= 1e-4 * max(abs(whole), abs(parts)):
        raise DataError(
            f"cutting batches into {size} samples changes the loss from {whole} to {parts}: it is no mean over "
            "samples (or samples are not along the first dimension). Leave out chunk."
        )
    return cut

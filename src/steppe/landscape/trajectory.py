"""Where training went: each epoch's weights on disk, and the plane through them that shows most of their way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steppe.core.checkpoint import load_tree, save_tree
from steppe.core.errors import DataError
from steppe.core.flat import flatten

__all__ = ["Plane", "Trajectory", "pca", "read_trajectory", "record", "walk_null"]

FOLDER = "trajectory"


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What `record` left: ``epochs [E]`` ascending, 0 for the initial weights, and ``thetas [E, dim]`` float32."""

    epochs: tuple[int, ...]
    thetas: Tensor


def record(folder: Path, epoch: int, parameters: Iterable[Tensor]) -> None:
    """Keep the trainable parameters after an epoch (0: the initial ones), float32, in a file of their own.

    The same epoch again overwrites, so a run that is killed and resumed leaves the files of one that was not.
    """
    folder = folder / FOLDER
    folder.mkdir(exist_ok=True)
    theta = flatten(p for p in parameters if p.requires_grad)
    save_tree(folder / f"{epoch:05d}.safetensors", theta.float())


def read_trajectory(folder: Path) -> Trajectory:
    """All that `record` kept in a folder.

    Raises:
        DataError: nothing was recorded there.
    """
    files = sorted((folder / FOLDER).glob("[0-9]*.safetensors"))
    if not files:
        raise DataError(
            f"{folder} holds no trajectory: its training ended before trajectories were recorded. Train it again."
        )
    return Trajectory(tuple(int(file.stem) for file in files), torch.stack([load_tree(f) for f in files]))


@dataclass(frozen=True, eq=False)
class Plane:
    """The plane of a trajectory's first two principal components, through one of its checkpoints.

    A share is of the sum of squared distances that an axis explains. The null is the same share for a random walk in
    many dimensions with steps as long as the trajectory's: it is high for any path (Antognini & Sohl-Dickstein 2018,
    arXiv:1806.08805), so a share means something only beside it.

    Attributes:
        axes: ``[2, dim]`` float64, orthonormal; the first checkpoint has coordinates <= 0.
        coordinates: ``[E, 2]`` float64, the checkpoints projected; the origin's are 0.
        explained, null: ``[2]`` distances from the origin, whose axes these are (Li et al. 2018, section 7).
        explained_centred, null_centred: ``[2]`` of the components about the mean of the checkpoints instead.
    """

    axes: Tensor
    coordinates: Tensor
    explained: Tensor
    null: Tensor
    explained_centred: Tensor
    null_centred: Tensor


def pca(thetas: Tensor, origin: int) -> Plane:
    """The plane of a trajectory ``thetas [E, dim]`` through checkpoint number `origin`.

    From the ``[E, E]`` matrix of scalar products, so the cost is one pass of ``E² dim``.

    Raises:
        DataError: fewer than three checkpoints, or all on one line.
    """
    away = thetas.double() - thetas[origin].double()
    gram = away @ away.T
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:2], vectors.flip(1)[:, :2]
    if len(thetas) < 3 or not values[1] > 1e-12 * values[0]:
        raise DataError(
            f"a plane needs three checkpoints that are not on one line; there are {len(thetas)}. Train for more epochs."
        )
    vectors = torch.where(vectors[0] > 0, -vectors, vectors)  # a sign is arbitrary: fix it
    axes = (away.T @ vectors / values.sqrt()).T
    lengths = away.diff(dim=0).norm(dim=1)
    null, null_centred = walk_null(lengths, origin)
    return Plane(axes, away @ axes.T, _shares(gram), null, _shares(_centred(gram)), null_centred)


def walk_null(lengths: Tensor, origin: int) -> tuple[Tensor, Tensor]:
    """What two principal components explain of a random walk: ``[2]`` about position `origin`, ``[2]`` about the mean.

    In the limit of many dimensions, where independent steps are orthogonal and nothing is left to chance. Many equal
    steps about the last position give ``8/pi²`` and a ninth of it, about the mean ``6/pi²`` and a quarter of it.

    Args:
        lengths: ``[E - 1]`` of the steps.
        origin: number of the checkpoint from which distances count.
    """
    squares = torch.cat([lengths.new_zeros(1, dtype=torch.float64), lengths.double().square()])
    along = squares.cumsum(0)
    # two positions share the steps up to the earlier one; from here on scalar products of positions
    products = torch.minimum(along.unsqueeze(0), along.unsqueeze(1))
    about = products - products[origin] - products[:, origin : origin + 1] + products[origin, origin]
    return _shares(about), _shares(_centred(products))


def _centred(gram: Tensor) -> Tensor:
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def _shares(gram: Tensor) -> Tensor:
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0)[:2] / gram.trace()

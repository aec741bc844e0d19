"""Sharpness-aware training for free: a loss that remembers logits."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steppe.core.errors import DataError, SpecError
from steppe.core.files import write_atomically
from steppe.optim.sharpness.trajectory_loss import TrajectoryLoss, no_loss

__all__ = ["SAF"]

Array: TypeAlias = npt.NDArray[Any]

_DTYPES: Mapping[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
}


class SAF(TrajectoryLoss):
    """SAF: a loss that keeps a sample's prediction near the one the model gave it some epochs ago.

    Du, Zhou, Feng, Tan, Zhou 2022, arXiv:2205.14083. With z the logits of sample i now, z' those it got in epoch
    (epoch − epochs_back), T the temperature and B the batch, from epoch start_epoch + 1 on ::

        loss + lmbda · T² · 1/|B| · Σ_i KL( softmax(z'_i / T) ‖ softmax(z_i / T) )

    It is a loss and no optimizer: it costs no pass, one copy of the logits to the host and one back. ::

        saf = SAF(len(dataset), classes)
        for epoch in range(epochs):
            for index, x, y in loader:                     # index: which samples of the data set these are
                logits = model(x)
                loss = F.cross_entropy(logits, y) + saf(logits, index)
                ...
            saf.next_epoch()

    It compares class probabilities, so it has no meaning for the outputs of a regression.

    What is remembered: the logits of a sample's first evaluation in an epoch whose logits require grad and are
    finite. So the clean pass of SAM counts and its perturbed pass does not, accumulation over micro-batches changes
    nothing, and evaluation under ``no_grad`` leaves no trace. Of an index that stands twice in a batch the first
    counts; each adds to the loss. A sample not seen epochs_back epochs ago (new, or dropped by the loader) adds zero,
    while |B| stays the whole batch. Logits that are not finite make the loss so, as they do the cross-entropy, and
    the optimizer's guard decides.

    Paper and code differ: the factor T² is that of the code (AngusDujw/SAF), and its loss ends at an epoch of its
    own (300 by default; here, set `lmbda` to 0). Its defaults disagree: lmbda is 0.3 in README and run.sh, 0.16 in
    the command line; epochs_back 3 in the command line, 2 in run.sh, "2/3" in the README. The code also reads zeros,
    a uniform prediction, for samples it has not seen, and keeps a bank per process. Here too each process has its
    own: where a sampler deals the samples anew to the processes every epoch, most of them add zero.

    The bank holds epochs_back + 1 epochs and takes ``nbytes`` = (epochs_back + 1) · samples · classes · itemsize
    bytes: ImageNet 20.5 GB, CIFAR-100 80 MB. It stays in memory up to `memory_limit`, and is in `path` beyond: one
    memory-mapped .npy file per epoch. What a `state_dict` refers to stays there until the first `next_epoch` after
    the next `state_dict`, so that a run killed at any time goes on from its last checkpoint to the same bits; that
    takes at most as many files again.

    Args:
        samples: size of the data set; indices are 0 ... samples − 1.
        classes: number of classes, >= 2.
        lmbda: weight of the loss, >= 0.
        temperature: T, > 0.
        epochs_back: how many epochs lie between the two predictions, >= 1.
        start_epoch: the last epoch without the loss, >= 0, counted from 0.
        dtype: ``torch.float32`` or ``torch.float16``, of the bank.
        path: folder for a bank larger than `memory_limit`, made if absent: one of its own for each run.
        memory_limit: bytes, >= 0; default 4 GiB.

    Raises:
        SpecError: a value that is not allowed, or a bank above `memory_limit` without `path`.
    """

    def __init__(
        self,
        samples: int,
        classes: int,
        *,
        lmbda: float = 0.3,
        temperature: float = 5.0,
        epochs_back: int = 3,
        start_epoch: int = 5,
        dtype: torch.dtype = torch.float32,
        path: str | Path | None = None,
        memory_limit: int = 2**32,
    ) -> None:
        super().__init__(lmbda, temperature, start_epoch)
        self.check_integer("samples", samples, 1)
        self.check_integer("classes", classes, 2)
        self.check_integer("epochs_back", epochs_back, 1)
        self.check_integer("memory_limit", memory_limit, 0)
        if dtype not in _DTYPES:
            raise SpecError(f"SAF: dtype={dtype!r}, but it must be torch.float32 or torch.float16.")
        self.samples, self.classes, self.epochs_back, self.dtype = samples, classes, epochs_back, dtype
        shape = (epochs_back + 1, samples, classes)
        self.nbytes = math.prod(shape) * dtype.itemsize
        self._bank: _Memory | _Folder
        if self.nbytes <= memory_limit:
            self._bank = _Memory(shape, _DTYPES[dtype])
        elif path is not None:
            self._bank = _Folder(Path(path), shape, _DTYPES[dtype])
        else:
            raise SpecError(
                f"SAF: the bank of {epochs_back + 1} epochs x {samples} samples x {classes} classes in {dtype} takes "
                f"{self.nbytes} bytes, above memory_limit={memory_limit}. Give a folder as path=, raise memory_limit, "
                "or store float16."
            )
        self._written = np.zeros((epochs_back + 1, samples), dtype=bool)  # which rows each epoch has

    def __call__(self, logits: Tensor, index: Tensor) -> Tensor:
        """The loss of a batch, and its logits remembered.

        Args:
            logits: of the training forward, floating point [batch, classes].
            index: which samples these are, integers [batch].

        Returns:
            A scalar, in float32 at least; zero where there is no past.

        Raises:
            DataError: wrong shape or type, or an index outside the data set. Nothing has been remembered then.
        """
        self.check_logits(logits, self.classes)
        rows = self._rows(logits, index)
        if logits.requires_grad:
            self._remember(logits.detach(), rows)
        past = self.epoch - self.epochs_back
        seen = np.flatnonzero(self._written[past % len(self._written)][rows])
        if not self.active or not seen.size:
            return no_loss(logits)
        reference = torch.from_numpy(self._bank.rows(past)[rows[seen]]).to(logits.device)
        if seen.size < rows.size:
            logits = logits[torch.from_numpy(seen).to(logits.device)]
        return self.weighted(logits, reference, rows.size)

    def next_epoch(self) -> None:
        """Say that the present epoch has ended: call it once after each pass through the loader."""
        super().next_epoch()
        self._written[self.epoch % len(self._written)] = False
        self._bank.forget(self.epoch - self.epochs_back)

    def state_dict(self) -> dict[str, Any]:
        """The epoch, which rows are there and, of a bank in memory, the rows: as in torch not copied.

        Of a bank on disk the files are the state, which stay in `path`; write this to disk before `next_epoch`.
        """
        return {
            "epoch": self.epoch,
            "written": torch.from_numpy(self._written),
            "logits": self._bank.state(self.epoch),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, to the same bits. Rows that a killed run wrote after it are not read.

        Raises:
            SpecError: the state does not fit this object. Nothing has been changed then.
            DataError: files of the bank are missing or of another shape. Nothing has been changed then.
        """
        epoch, written = int(state_dict["epoch"]), state_dict["written"].cpu().numpy()
        if written.shape != self._written.shape:
            raise SpecError(
                f"SAF: the state has {written.shape} (epochs_back + 1, samples), this object {self._written.shape}."
            )
        live = range(epoch - self.epochs_back, epoch + 1)
        self._bank.load(state_dict["logits"], [e for e in live if written[e % len(written)].any()], epoch)
        self._written[...] = written
        self.epoch = epoch

    def _rows(self, logits: Tensor, index: Tensor) -> Array:
        index = torch.as_tensor(index)
        integer = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
        if index.shape != logits.shape[:1] or not integer:
            raise DataError(
                f"SAF: index is {index.dtype} of shape {list(index.shape)}, expected integers [{len(logits)}], one "
                "per row of logits."
            )
        rows: Array = index.cpu().numpy()
        outside = rows[(rows < 0) | (rows >= self.samples)]
        if outside.size:
            raise DataError(
                f"SAF: index {outside[0]} is outside the data set of {self.samples} samples (0 ... {self.samples - 1})."
            )
        return rows

    def _remember(self, logits: Tensor, rows: Array) -> None:
        written = self._written[self.epoch % len(self._written)]
        if written[rows].all():  # the second pass of the step: no copy to the host
            return
        # less their largest, which softmax does not see: float16 would overflow above 65504
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wide = (wide - wide.amax(1, keepdim=True)).clamp_min(torch.finfo(self.dtype).min)
        values = wide.to(self.dtype).cpu().numpy()
        new = np.flatnonzero(~written[rows] & np.isfinite(values).all(1))
        new = new[np.unique(rows[new], return_index=True)[1]]
        self._bank.rows(self.epoch)[rows[new]] = values[new]
        written[rows[new]] = True

    def __repr__(self) -> str:
        return (
            f"SAF({self.samples} samples, {self.classes} classes, lmbda={self.lmbda}, temperature={self.temperature}, "
            f"epochs_back={self.epochs_back}, start_epoch={self.start_epoch}, {self.nbytes} bytes in {self._bank})"
        )


class _Memory:
    """A ring of epochs in memory."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.logits = np.zeros(shape, dtype)

    def rows(self, epoch: int) -> Array:
        ring: Array = self.logits
        return ring[epoch % len(ring)]

    def forget(self, before: int) -> None:
        pass  # the ring overwrites

    def state(self, epoch: int) -> Tensor:
        return torch.from_numpy(self.logits)

    def load(self, logits: Tensor | None, epochs: list[int], epoch: int) -> None:
        if logits is None:
            raise SpecError(
                "SAF: the state is of a bank on disk: give its path, and a memory_limit below nbytes."
            )
        if logits.shape != self.logits.shape or _DTYPES.get(logits.dtype) != self.logits.dtype:
            raise SpecError(
                f"SAF: the state's logits are {logits.dtype} {list(logits.shape)} (epochs, samples, classes), this "
                f"object's {self.logits.dtype} {list(self.logits.shape)}."
            )
        self.logits[...] = logits.cpu().numpy()

    def __str__(self) -> str:
        return "memory"


class _Folder:
    """One memory-mapped file per epoch, so that new rows never stand where an older state still has its own."""

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.back, self.shape, self.dtype = folder, shape[0] - 1, shape[1:], dtype
        self._open: dict[int, Array] = {}
        self._files: set[int] = set()
        self._pinned = range(0)  # the epochs of the last state

    def rows(self, epoch: int) -> Array:
        if epoch not in self._open:
            write_atomically(self._file(epoch), self._create)
            self._files.add(epoch)
            self._open[epoch] = self._map(epoch)
        return self._open[epoch]

    def forget(self, before: int) -> None:
        for epoch in [epoch for epoch in self._files if epoch < before]:
            self._open.pop(epoch, None)
            if epoch not in self._pinned:
                self._file(epoch).unlink(missing_ok=True)
                self._files.discard(epoch)

    def state(self, epoch: int) -> None:
        for array in self._open.values():
            array.flush()  # type: ignore[attr-defined]  # a np.memmap
        self._pinned = range(epoch - self.back, epoch + 1)

    def load(self, logits: Tensor | None, epochs: list[int], epoch: int) -> None:
        if logits is not None:
            raise SpecError("SAF: the state is of a bank in memory: leave out path or raise memory_limit.")
        self._open = {epoch: self._map(epoch) for epoch in epochs}
        self._files.update(epochs)
        self._pinned = range(epoch - self.back, epoch + 1)

    def _file(self, epoch: int) -> Path:
        return self.folder / f"logits-{epoch:06d}.npy"

    def _map(self, epoch: int) -> Array:
        file = self._file(epoch)
        try:
            array: Array = np.load(file, mmap_mode="r+", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"SAF: the logits of epoch {epoch} cannot be read: {error}. The folder keeps what its run's last "
                "state_dict refers to; go on from that one, or with a new SAF."
            ) from error
        if array.shape != self.shape or array.dtype != self.dtype:
            raise DataError(
                f"SAF: {file} holds {array.dtype} {list(array.shape)}, expected {self.dtype} {list(self.shape)}."
            )
        return array

    def _create(self, file: Path) -> None:
        np.lib.format.open_memmap(file, mode="w+", dtype=self.dtype, shape=self.shape)
        if not hasattr(os, "posix_fallocate"):
            return
        # without its blocks a full disk would end the process by a signal, later, in the middle of an epoch
        size = file.stat().st_size
        try:
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, size)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise DataError(
                    f"SAF: no room for the {size} bytes of an epoch in {self.folder}: {error}."
                ) from error

    def __str__(self) -> str:
        return str(self.folder)

"""Moving weights, and bringing them back."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Container, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from steppe.core.seeding import derive
from steppe.optim.sharpness.ascent import Perturbation
from steppe.optim.sharpness.rounding import HALF, add_rounding_randomly
from steppe.optim.sharpness.sharing import OneWithBase, local
from steppe.optim.sharpness.vectors import Bucket, Vector, duplicate

__all__ = ["Perturbs"]


class Perturbs(OneWithBase):
    """The half of `SharpnessAware` that touches weights.

    Attributes:
        seed: of what the algorithm draws.
        restore: how weights come back, see `SharpnessAware`.
        diagnose: whether the applied perturbation is measured.
    """

    seed: int
    restore: Literal["copy", "swap", "subtract"]
    diagnose: bool
    _buckets: list[Bucket]
    _moved: Sequence[Bucket]
    _saved: list[list[Tensor] | None]
    _taken_away: list[Perturbation]
    _swapped: set[int]
    _correction: Perturbation | None
    _length: float
    _stepped: bool
    _before: list[tuple[list[Tensor], list[Tensor]]]
    _shifts: int
    _rounding_checked: bool

    @property
    def buckets(self) -> Sequence[Bucket]:
        """The parameters of this step, known after the first ``yield``."""
        return self._buckets

    def stream(self, *names: str | int, device: torch.device | None = None) -> torch.Generator:
        """A generator for this step: a function of seed, names and `steps`, so it is the same on every rank."""
        seed = derive(self.seed, *names, self.steps)
        return torch.Generator(device or "cpu").manual_seed(seed)

    @contextmanager
    def perturbed(self, e: Perturbation) -> Iterator[None]:
        """Add e to the weights; on leaving, however that happens, they come back bit for bit (see `restore`).

        e may be over other buckets than `buckets`, for a rule that moves weights before it has a gradient.
        """
        self._moved, self._saved = e.direction.buckets, [None] * len(e.direction.buckets)
        try:
            self.shift(e)
            del e  # its memory is free for the pass
            yield
        finally:
            self._come_back()

    def shift(self, e: Perturbation) -> None:
        """Add e to the weights, inside a `perturbed` block that undoes it."""
        first = not self._is_perturbed
        swap, taken_away = set(), False
        for number, (bucket, length) in enumerate(zip(self._moved, e.lengths, strict=True)):
            if length and self._saved[number] is None:
                how = self._restored_by(bucket)
                if how == "copy":
                    self._saved[number] = bucket.copied()
                elif how == "swap":
                    swap.add(number)
                else:
                    taken_away = True
        if taken_away:
            self._taken_away.append(e)
        self._add(e, swap=swap)
        self._length = e.norm_if_known if first else math.nan
        half = any(bucket.params[0].dtype in HALF for bucket in self._moved)
        if self.diagnose or (half and not self._rounding_checked):
            self._measure(e, half)

    def correct(self, e: Perturbation) -> None:
        """Add e to the weights after the base's step, outside its momentum and scaling."""
        self._correction = e

    @contextmanager
    def provisional(self) -> Iterator[list[list[Tensor]]]:
        """Around an algorithm that calls `step_base`: what does not complete leaves weights and base as before.

        Gives copies of the weights as they were, one list per bucket, which must stay as they are.
        """
        weights = [duplicate(bucket.params) for bucket in self._buckets]
        self._before = [
            (bucket.params, values) for bucket, values in zip(self._buckets, weights, strict=True)
        ]
        groups = [dict(group) for group in self.param_groups]
        state, kinds = {}, dict[Hashable, list[Tensor]]()
        for param, values in self.state.items():
            state[param] = {
                key: value if _is_dense(value) else copy.deepcopy(value) for key, value in values.items()
            }
            for value in map(local, filter(_is_dense, values.values())):
                kinds.setdefault((value.device, value.dtype), []).append(value)
        self._before += [(tensors, duplicate(tensors)) for tensors in kinds.values()]
        try:
            yield weights
        except BaseException:
            for tensors, values in self._before:
                torch._foreach_copy_(tensors, values)
            for group, before in zip(self.param_groups, groups, strict=True):
                group.update(before)
            self.state.clear()
            self.state.update(state)
            raise
        finally:
            self._before = []

    def step_base(self) -> list[list[Tensor]]:
        """Step the base now, inside `provisional`; `step` will not step it again.

        Inside a `perturbed` block the base moves the weights that come back, and the perturbed ones stay.

        Returns:
            The weights that it moved, one list per bucket: not to be changed, and good until the next call.
        """
        known = {id(owner) for bucket in self._buckets for owner in bucket.owners}
        late = [
            local(param)
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None and id(param) not in known
        ]
        self._before[:0] = [([param], duplicate([param])) for param in late]
        moved, perturbed = self._moved, [duplicate(bucket.params) for bucket in self._moved]
        self._come_back()
        self.base.step()
        self._stepped = True
        if not moved:
            return [bucket.params for bucket in self._buckets]
        self._moved = moved
        self._saved = [
            b.copied() if self._restored_by(b) != "subtract" else duplicate(b.params) for b in moved
        ]
        for bucket, values in zip(moved, perturbed, strict=True):
            torch._foreach_copy_(bucket.params, values)
        return self._saved  # type: ignore[return-value]

    # -- within a step -------------------------------------------------------------------------------------------

    @property
    def _is_perturbed(self) -> bool:
        return bool(self._taken_away) or any(values is not None for values in self._saved)

    def _come_back(self) -> None:
        for e in reversed(self._taken_away):
            self._add(e, -1)
        for number, (bucket, values) in enumerate(zip(self._moved, self._saved, strict=True)):
            if values is not None and number in self._swapped:
                _place(bucket.params, values)
            elif values is not None:
                torch._foreach_copy_(bucket.params, values)
        self._moved, self._saved, self._taken_away, self._swapped = [], [], [], set()

    def _restored_by(self, bucket: Bucket) -> Literal["copy", "swap", "subtract"]:
        # random rounding can neither be taken away nor take place elsewhere, and shards belong to their parameter
        sharded = bucket.params[0] is not bucket.owners[0]
        if bucket.params[0].dtype in HALF or (sharded and self.restore == "swap"):
            return "copy"
        return self.restore

    def _add(self, e: Perturbation, sign: int = 1, swap: Container[int] = ()) -> None:
        for number, (bucket, direction, length) in enumerate(
            zip(e.direction.buckets, e.direction.tensors, e.lengths, strict=True)
        ):
            if not length:
                continue
            if number in swap:
                moved = bucket.plus(direction, length)
                self._saved[number] = [param.data for param in bucket.params]
                self._swapped.add(number)
                _place(bucket.params, moved)
            elif bucket.params[0].dtype in HALF:
                if sign > 0:
                    stream = self.stream("rounding", self._shifts, number, device=bucket.params[0].device)
                    add_rounding_randomly(bucket.params, direction, length, stream)
            else:
                torch._foreach_add_(bucket.params, direction, alpha=sign * length)
        self._shifts += 1

    def _measure(self, e: Perturbation, half: bool) -> None:
        """Measure the perturbation as applied; warn once if rounding makes it longer or shorter by a tenth."""
        if any(length and saved is None for length, saved in zip(e.lengths, self._saved, strict=True)):
            self._length = e.norm  # without a copy of the weights there is nothing to compare with
            return
        moved = []
        for bucket, saved in zip(self._moved, self._saved, strict=True):
            wide = torch.float32 if bucket.params[0].dtype in HALF else None
            now = duplicate(bucket.params, wide)
            torch._foreach_sub_(now, now if saved is None else duplicate(saved, wide))
            moved.append(now)
        self._length = Vector(self._moved, moved).norm
        if not half or self._rounding_checked:
            return
        self._rounding_checked = True
        if abs(self._length - e.norm) > 0.1 * e.norm:
            warnings.warn(
                f"the weights' precision makes the perturbation {self._length / e.norm:.0%} as long as "
                f"{type(self).__name__} asks for (its mean is right). Keep the weights in float32 and use "
                "torch.autocast.",
                RuntimeWarning,
                stacklevel=8,
            )

    def _step_base_once(self) -> None:
        if not self._stepped:
            self.base.step()
        if self._correction is not None:
            with torch.no_grad():
                self._add(self._correction)

    def _reset(self) -> None:
        self._buckets, self._moved, self._saved, self._taken_away, self._swapped = [], [], [], [], set()
        self._correction, self._length = None, math.nan
        self._stepped, self._before, self._shifts = False, [], 0


def _is_dense(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _place(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Let parameters hold these tensors themselves."""
    for param, value in zip(params, values, strict=True):
        param.data = value
    # so that a graph from before is refused: it would compute with the wrong ones
    torch.autograd.graph.increment_version(list(params))

"""Sparse sharpness-aware minimization."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from steppe.core.errors import SpecError
from steppe.optim.sharpness.ascent import Perturbation, steepest
from steppe.optim.sharpness.base import Base, Interval, Maybe
from steppe.optim.sharpness.composition import Ascent, Composition, Hyper, Parts
from steppe.optim.sharpness.gradients import bucketed, gradient_of
from steppe.optim.sharpness.sharing import local
from steppe.optim.sharpness.vectors import Vector, duplicate

__all__ = ["SSAM", "MaskedAscent", "largest", "regrown"]

Sample = TypeVar("Sample")


class MaskedAscent(Ascent):
    """e = M ⊙ rho · g / ‖g‖ with a mask M of zeros and ones; a parameter that has none yet stays."""

    hyper = {  # noqa: RUF012
        "mask": Hyper("fisher", ("fisher", "dynamic")),
        "sparsity": Hyper(0.2, Interval(0, 1)),
        "update_every": Hyper(500, Maybe(Interval(1, whole=True))),
        "drop_rate": Hyper(0.5, Interval(0, 1)),
        "total_steps": Hyper(None, Maybe(Interval(1, whole=True))),
    }
    remembers = ("mask",)

    def trait(self, index: int, name: str | None, param: Tensor) -> bool:
        """Whether the parameter has a mask yet."""
        return index in self.optimizer.memory["mask"]

    def check(self, group: Mapping[str, Any]) -> None:
        """The drop rate has an end."""
        kind, every, total = (self.of(group, name) for name in ("mask", "update_every", "total_steps"))
        if kind == "dynamic" and every is not None and total is None:
            raise SpecError(
                "mask='dynamic' needs total_steps: the steps of the training, over which the drop rate falls to 0."
            )

    def perturbation(self, g: Vector, rho: Sequence[float]) -> Perturbation:
        """See the class; ‖g‖ is that of the whole gradient."""
        masks = {**self.optimizer.memory["mask"], **self._drawn(g)}
        if not masks and self.one("update_every") is None:
            raise SpecError(
                "update_every=None leaves the masks to you: give them by set_masks() or fisher()."
            )
        buckets, directions, lengths = [], [], []
        for bucket, gs, length in zip(g.buckets, g.tensors, steepest(g, rho, eps=1e-7).lengths, strict=True):
            if bucket.indices[0] in masks:
                direction = duplicate([masks[i] for i in bucket.indices], gs[0].dtype)
                torch._foreach_mul_(direction, gs)
                buckets.append(bucket)
                directions.append(direction)
                lengths.append(length)
        return Perturbation(Vector(buckets, directions), lengths)

    def observe(self, p: Vector) -> None:
        """Keep masks that were drawn in this step, and choose new ones if it is time."""
        optimizer, every = self.optimizer, self.one("update_every")
        optimizer.memory["mask"].update(self._drawn(p))
        last = optimizer.numbers.get("masked")
        if every is not None and (last is None or optimizer.steps - last >= every):
            self._choose(_by_index(p), dynamic=self.one("mask") == "dynamic")

    # -- for the user ----------------------------------------------------------------------------------------------

    def set_masks(self, masks: Iterable[Tensor]) -> None:
        """Set the masks: one per parameter in the order of ``param_groups``, not zero where e may point.

        Raises:
            SpecError: another number of masks, or one that is not shaped like its parameter.
        """
        given = list(masks)
        params = [local(p) for group in self.optimizer.param_groups for p in group["params"]]
        if [mask.shape for mask in given] != [param.shape for param in params]:
            raise SpecError(
                f"set_masks() needs one mask per parameter, shaped like it: {[tuple(p.shape) for p in params]}, not "
                f"{[tuple(mask.shape) for mask in given]}."
            )
        kept = (m.to(p.device, torch.bool, copy=True) for m, p in zip(given, params, strict=True))
        self._remember(dict(enumerate(kept)))

    def fisher(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Set the masks by the Fisher information, the mean of squared gradients of single samples ::

            for x, y in optimizer.ascent.fisher(samples):  # the official code takes 1024, drawn at random
                loss_fn(model(x), y).backward()

        Gradients are zeroed before each sample, and normalisation layers keep their statistics if the optimizer knows
        the ``model``; masks change when the samples are used up. Over the ranks of a `DistributedDataParallel` model
        that the optimizer knows, each rank loops over as many samples of its own, and the mean counts.
        """
        optimizer, sums = self.optimizer, dict[int, Tensor]()
        module = optimizer.module
        for sample in samples:
            optimizer.zero_grad()
            with (
                module.during(statistics=False, average=True),
                module.ddp.no_sync() if module.ddp else nullcontext(),
            ):
                yield sample
            with torch.no_grad():
                g = gradient_of(bucketed(optimizer.param_groups, lambda *_: None))
                for bucket, gs in zip(g.buckets, g.tensors, strict=True):
                    sizes = torch._foreach_abs(gs)
                    held = [
                        sums.setdefault(i, torch.zeros_like(x))
                        for i, x in zip(bucket.indices, sizes, strict=True)
                    ]
                    torch._foreach_addcmul_(held, sizes, sizes)
        optimizer.zero_grad()
        self._choose(sums, dynamic=False)

    # -- choosing --------------------------------------------------------------------------------------------------

    def _choose(self, scores: Mapping[int, Tensor], *, dynamic: bool) -> None:
        """New masks for the parameters that have scores, all of them together."""
        if not scores:
            return
        optimizer, scores = self.optimizer, self._sorted(scores)
        flat = _flat(scores).abs()
        if optimizer.module.ddp is not None:
            optimizer.module.mean([flat])
        if dynamic:
            t = min(optimizer.steps / self.one("total_steps"), 1.0)
            rate = self.one("drop_rate") * (1 + math.cos(math.pi * t)) / 2
            masks = {i: optimizer.memory["mask"][i] for i in scores}
            chosen = regrown(_flat(masks), flat, rate, self._noise("growth", flat.device, len(flat)))
        else:
            chosen = largest(flat, self._kept(len(flat)))
        self._remember(_pieces(chosen, scores))

    def _remember(self, masks: Mapping[int, Tensor]) -> None:
        self.optimizer.memory["mask"].update(masks)
        self.optimizer.numbers["masked"] = self.optimizer.steps

    def _drawn(self, like: Vector) -> dict[int, Tensor]:
        """Random masks for those that have none; the same whenever they are drawn within a step."""
        if self.one("mask") != "dynamic" or all(map(self.trait_of, like.buckets)):
            return {}
        bare = self._sorted(
            {i: x for i, x in _by_index(like).items() if i not in self.optimizer.memory["mask"]}
        )
        noise = self._noise("masks", next(iter(bare.values())).device, sum(x.numel() for x in bare.values()))
        return _pieces(largest(noise, self._kept(len(noise))), bare)

    def _kept(self, number: int) -> int:
        """How many of a number of weights are perturbed, whatever rounding does to number · sparsity."""
        return number - math.ceil(number * self.one("sparsity") - 1e-6)

    def _noise(self, name: str, device: torch.device, number: int) -> Tensor:
        return torch.rand(number, generator=self.optimizer.stream(name, device=device), device=device)

    def _sorted(self, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """By name, where there are names, so that what is drawn does not depend on how groups are made up."""
        names = [name for group in self.optimizer.param_groups for name in group.get("param_names", ())]
        return {i: tensors[i] for i in sorted(tensors, key=lambda i: (names[i] if names else "", i))}


class SSAM(Composition):
    """SSAM: SAM that perturbs a part of the weights, the same for many steps.

    Mi, Shen, Ren, Zhou, Sun, Ji, Tao 2022, arXiv:2210.05177, with g = ∇L(w), p = ∇L(w + e) and a mask M of which a
    share 1 − sparsity is one ::

        e = M ⊙ rho · g / ‖g‖          ‖g‖ of the whole gradient, so ‖e‖ <= rho
        base step with p

    ``mask="fisher"`` (SSAM-F) has the ones where the Fisher information is largest, ``mask="dynamic"`` (SSAM-D) moves
    them about. In an ordinary loop masks change at the end of the first step and of every `update_every`-th after
    it, without further passes:

    * "fisher": the ones are where |p| of that step is largest. That is the squared gradient of one batch, not the
      mean over single samples. For the latter loop over ``optimizer.ascent.fisher(samples)`` when you want it
      refreshed, and set ``update_every=None``. As in the official code there are no masks at first and the first
      step is not perturbed.
    * "dynamic": the masks start at random; of the ones, the share drop_rate · (1 + cos(π t / total_steps)) / 2 with
      the smallest |p| is dropped in step t = 0, 1, ..., and as many of those that were zero are drawn in their place.

    Or give masks of your own with ``optimizer.ascent.set_masks(masks)`` and ``update_every=None``.

    Where this differs from the official code (Mi-Peng/Sparse-Sharpness-Aware-Minimization): that counts epochs; takes
    g instead of p for what is dropped, so needs it kept through the second pass; and rounds the number of ones down
    in each update, which here never changes: n − ceil(sparsity · n) of n weights, chosen over all parameters (over
    those of its own shard, where parameters are sharded over ranks).

    Masks are bool, belong to ``memory["mask"]`` and change only when the step completes. They save no time: what
    costs is the second pass.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default the official script's.
        mask: "fisher" or "dynamic", see above. This and all that follows is one for all groups.
        sparsity: share of the weights that are not perturbed, in [0, 1]; default the official script's. The paper
            goes from 0.5 up.
        update_every: steps from one update of the masks to the next; None for never. Default ours: the official
            script has 5 epochs.
        drop_rate: share of the ones that the first update of dynamic masks moves; default the official script's.
        total_steps: steps of the training, after which no more are moved; needed by dynamic masks.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=MaskedAscent)
    ascent: MaskedAscent

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        mask: str = "fisher",
        sparsity: float = 0.2,
        update_every: int | None = 500,
        drop_rate: float = 0.5,
        total_steps: int | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(
            params,
            base,
            rest,
            rho=rho,
            mask=mask,
            sparsity=sparsity,
            update_every=update_every,
            drop_rate=drop_rate,
            total_steps=total_steps,
        )


def largest(scores: Tensor, number: int) -> Tensor:
    """Where the `number` largest of the scores ``[n]`` are: bool ``[n]``."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[scores.topk(number, sorted=False).indices] = True
    return mask


def regrown(mask: Tensor, scores: Tensor, rate: float, noise: Tensor) -> Tensor:
    """The mask with a share of its ones moved from where scores are smallest to zeros where noise is largest.

    Args:
        mask: bool ``[n]``.
        scores: non-negative, ``[n]``.
        rate: the share, in [0, 1], rounded down to whole ones; fewer are moved if there are not as many zeros.
        noise: at least 0, ``[n]``.
    """
    ones = int(mask.sum())
    number = min(int(ones * rate), len(mask) - ones)
    dropped = scores.masked_fill(~mask, math.inf).topk(number, largest=False, sorted=False).indices
    grown = noise.masked_fill(mask, -1.0).topk(number, sorted=False).indices
    mask = mask.clone()
    mask[dropped] = False
    mask[grown] = True
    return mask


def _by_index(x: Vector) -> dict[int, Tensor]:
    return {
        i: each
        for bucket, xs in zip(x.buckets, x.tensors, strict=True)
        for i, each in zip(bucket.indices, xs, strict=True)
    }


def _flat(tensors: Mapping[int, Tensor]) -> Tensor:
    device = next(iter(tensors.values())).device
    return torch.cat([x.reshape(-1).to(device) for x in tensors.values()])


def _pieces(flat: Tensor, like: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The inverse of `_flat`, in memory of their own."""
    parts = flat.split([x.numel() for x in like.values()])
    masks = [torch.empty_like(x, dtype=torch.bool) for x in like.values()]
    torch._foreach_copy_(masks, [part.view(x.shape) for part, x in zip(parts, like.values(), strict=True)])
    return dict(zip(like, masks, strict=True))

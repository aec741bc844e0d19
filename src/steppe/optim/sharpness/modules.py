"""What needs the module itself: clean running statistics, and which gradients ranks average."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, distributed as dist, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel

from steppe.core.errors import SpecError

__all__ = ["Module", "Sync"]

Sync = Literal["every", "last"]


class Module:
    """The trained module as the optimizer sees it.

    Args:
        owner: name of the optimizer, for messages.
        model: the module, perhaps compiled or in `DistributedDataParallel`; None if it is not known.
        sync: see `SharpnessAware`.

    Raises:
        SpecError: ``sync="last"`` without a `DistributedDataParallel` model.
    """

    def __init__(self, owner: str, model: nn.Module | None, sync: Sync) -> None:
        if sync not in ("every", "last"):
            raise SpecError(f"{owner}: sync={sync!r}, but it must be one of 'every', 'last'.")
        self.model = model
        inner = getattr(model, "_orig_mod", model)  # of a compiled module
        self.ddp = inner if isinstance(inner, DistributedDataParallel) else None
        if sync == "last" and self.ddp is None:
            raise SpecError(
                f"{owner}: sync='last' perturbs each rank by its own gradient, which needs "
                "model=DistributedDataParallel(...). Ranks that share one model (FSDP) can only perturb it together."
            )
        self.by_rank = sync == "last"

    @property
    def is_compiled(self) -> bool:
        """Whether the module, or one in it, is known to be compiled."""
        modules = () if self.model is None else self.model.modules()
        return any(hasattr(each, "_orig_mod") or each._compiled_call_impl is not None for each in modules)

    def during(self, *, statistics: bool, average: bool) -> AbstractContextManager[Any]:
        """The setting of one pass.

        Args:
            statistics: whether normalisation layers update their running statistics.
            average: whether backward averages gradients over ranks, if ranks have perturbations of their own.
        """
        stack = ExitStack()
        if not statistics and self.model is not None:
            stack.enter_context(_frozen_statistics(self.model))
        if self.by_rank and not average and self.ddp is not None:
            stack.enter_context(self.ddp.no_sync())
        return stack

    def mean(self, values: Sequence[Tensor]) -> None:
        """Average tensors of one dtype over ranks, in place."""
        group: Any = self.ddp.process_group if self.ddp is not None else None
        flat = _flatten_dense_tensors(values)
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        torch._foreach_copy_(list(values), list(_unflatten_dense_tensors(flat, values)))

    def agreed(self, value: float, device: torch.device) -> float:
        """The mean of a number over ranks that would otherwise decide differently."""
        if not self.by_rank:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=device)
        self.mean([shared])
        return shared.item()


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats and m.training]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        if isinstance(layer, _InstanceNorm):
            layer.momentum = 0.0
        else:  # a layer that does not track uses the batch's statistics and updates nothing, its counter included
            layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.track_running_stats, layer.momentum = True, momentum

"""`GRU`: nn.GRU's parameters, the last state alone, computed by steppe-kernels where they are installed.

steppe-kernels (the folder `kernels/`) is an optional distribution of native code for CPUs. Where it is missing, or
for anything it does not cover, ``nn.GRU`` computes the same values to rounding. Which path serves is a fact of the
machine (`path`); the precision is the user's choice.
"""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from steppe.core.errors import DataError, SpecError, unknown

__all__ = ["GRU", "Precision", "path", "path_in_words", "resolved"]

Precision = Literal["auto", "fp32", "bf16", "torch"]

# limits of the kernels
FEATURES, HIDDEN, LAYERS = 32, range(16, 129, 16), 3
# a layer's parameters in the order the kernels take them
KINDS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _installed() -> ModuleType | None:
    try:
        return importlib.import_module("steppe_kernels")
    except ImportError:  # not built, or built for another Python
        return None


native = _installed()


def path(precision: Precision) -> str:
    """What computes a GRU here: a path of steppe-kernels, or ``"torch"``.

    ``"auto"`` is the fastest there is: bf16 where the CPU has AMX, else fp32. The environment variable
    ``STEPPE_GRU_PATHS`` (names separated by commas) restricts the choice, as if the CPU had only these.

    Raises:
        SpecError: an unknown precision, or bf16 on a machine without: other numbers would come out under its name.
    """
    if precision not in get_args(Precision):
        raise SpecError(unknown("precision", precision, get_args(Precision)))
    if precision == "torch":
        return precision
    allowed = os.environ.get("STEPPE_GRU_PATHS")
    for name in native.paths() if native else ():
        there = name in allowed.split(",") if allowed is not None else not name.endswith("-emulated")
        if there and precision in ("auto", _precision_of(name)):
            return str(name)
    if precision == "bf16":
        raise SpecError(
            "precision bf16 needs steppe-kernels (make kernels) and a CPU with AMX-BF16; take fp32, which runs anywhere"
        )
    return "torch"


def path_in_words(precision: Precision) -> str:
    """One line that says what computes the GRU here and, where that is nn.GRU, why."""
    chosen = path(precision)
    if chosen != "torch":
        return f"GRU: steppe-kernels, {_precision_of(chosen)} on {chosen}."
    if precision == "torch":
        return "GRU: torch's nn.GRU, as asked."
    why = "this CPU lacks what steppe-kernels need" if native else "steppe-kernels is not installed"
    return f"GRU: torch's nn.GRU, since {why}."


def resolved(precision: Precision) -> Precision:
    """``"auto"`` as what it stands for on this machine: ``"bf16"`` or ``"fp32"``."""
    return precision if precision != "auto" else _precision_of(path("auto"))


def _precision_of(name: str) -> Precision:
    return "bf16" if name.startswith("amx") else "fp32"


class GRU(nn.GRU):
    """``[window, stocks, fields] -> [stocks, hidden]``: an nn.GRU that returns the top layer's last state.

    Parameters, their names, initialisation and state_dict are nn.GRU's; checkpoints interchange. float32 on a CPU with
    up to 32 fields, 16 to 128 hidden units in steps of 16 and up to 3 layers goes to the kernels, anything else to
    nn.GRU.

    The kernels run in the calling thread: the same input gives the same bits whatever else runs, but not the bits of
    another path. They have no second derivative: for curvature set ``precision`` to ``"torch"`` (torch.func's
    transforms take nn.GRU by themselves).

    Args:
        fields, hidden, layers: as nn.GRU's ``input_size``, ``hidden_size``, ``num_layers``.
        precision: ``"fp32"``; ``"bf16"``: products of bfloat16 numbers summed in float32, weights and running states
            in float32; ``"auto"``: bf16 where AMX is there, else fp32; ``"torch"``: nn.GRU itself. May be changed
            at any time.
    """

    precision: Precision

    def __init__(self, fields: int, hidden: int, layers: int = 1, *, precision: Precision = "fp32") -> None:
        super().__init__(fields, hidden, layers)
        path(precision)
        if precision == "bf16" and not self._sized():
            raise SpecError(
                f"precision bf16 takes {FEATURES} fields, hidden 16 to 128 in steps of 16 and {LAYERS} layers at most, "
                f"not {fields}, {hidden} and {layers}: take fp32, where nn.GRU serves"
            )
        self.precision = precision
        self._spare = _Spare()

    def forward(self, windows: Tensor) -> Tensor:  # type: ignore[override]
        """The top layer's state ``[stocks, hidden]`` after the last row.

        Raises:
            DataError: windows of another shape, dtype or device than the weights ask for.
        """
        weight = self.weight_ih_l0
        if windows.dim() != 3 or windows.shape[2] != self.input_size or windows.shape[0] == 0:
            raise DataError(f"the GRU needs [window, stocks, {self.input_size}], got {list(windows.shape)}")
        if (windows.dtype, windows.device) != (weight.dtype, weight.device):
            raise DataError(
                f"windows are {windows.dtype} on {windows.device}, the GRU's weights {weight.dtype} on "
                f"{weight.device}: move one of them with .to()"
            )
        chosen = path(self.precision)
        parameters = [getattr(self, f"{kind}_l{layer}") for layer in range(self.num_layers) for kind in KINDS]
        if chosen == "torch" or not self._covered(windows, parameters):
            states, _ = super().forward(windows)
            return states[-1]
        last: Tensor = _LastState.apply(chosen, self._spare, windows, *parameters)
        return last

    def _sized(self) -> bool:
        return self.input_size <= FEATURES and self.hidden_size in HIDDEN and self.num_layers <= LAYERS

    def _covered(self, windows: Tensor, parameters: list[Tensor]) -> bool:
        return (
            windows.shape[1] > 0
            and windows.dtype == torch.float32
            and self._sized()
            and not torch._C._are_functorch_transforms_active()
            # subclasses (sharded, fake, dual) have no memory of their own to point to
            and all(
                type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype == torch.float32
                for t in (windows, *parameters)
            )
        )

    def extra_repr(self) -> str:
        """nn.GRU's, and the precision."""
        return f"{super().extra_repr()}, precision={self.precision}"


class _Spare:
    """Tapes that no graph needs any more, kept for the next forward: fresh memory costs a fifth of a step.

    A tape is lent as a view; when torch drops the last tensor over the view, its memory comes back by itself.
    """

    limit = 2

    def __init__(self) -> None:
        self.free: list[NDArray[np.float32]] = []

    def take(self, size: int) -> Tensor:
        """Uninitialised float32 ``[size]``."""
        try:
            memory = self.free.pop()
        except IndexError:
            memory = np.empty(0, dtype=np.float32)
        if memory.size < size:
            memory = np.empty(size, dtype=np.float32)
        view = memory[:size]
        weakref.finalize(view, _give_back, weakref.ref(self), memory).atexit = False
        return torch.from_numpy(view)

    def __reduce__(self) -> tuple[Callable[[], _Spare], tuple[()]]:
        return _Spare, ()  # copies of a module share no memory


def _give_back(owner: weakref.ref[_Spare], memory: NDArray[np.float32]) -> None:
    spare = owner()
    if spare is not None and len(spare.free) < spare.limit:
        spare.free.append(memory)


class _LastState(torch.autograd.Function):
    """The kernels' forward and, through `_Gradients`, backward."""

    @staticmethod
    def forward(ctx: Any, chosen: str, spare: _Spare, windows: Tensor, *parameters: Tensor) -> Tensor:
        assert native is not None
        windows = windows if windows.stride(2) == 1 else windows.contiguous()
        arrays = [p.detach().contiguous() for p in parameters]
        hidden, layers = arrays[1].shape[1], len(arrays) // 4
        out = windows.new_empty(windows.shape[1], hidden)
        tape = None
        if any(ctx.needs_input_grad):
            tape = spare.take(native.tape_size(chosen, *windows.shape, hidden, layers))
            ctx.chosen = chosen
            ctx.save_for_backward(windows, tape, *parameters)
        native.forward(chosen, windows.detach(), arrays, out, tape)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        windows, tape, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        grads = _Gradients.apply(ctx.chosen, wanted[0], tape, grad_out, windows, *parameters)
        return None, None, *(g if want else None for g, want in zip(grads, wanted, strict=True))


class _Gradients(torch.autograd.Function):
    """Apart from `_LastState`: a first derivative under ``create_graph=True`` works, only the second is an error."""

    @staticmethod
    def forward(
        ctx: Any,
        chosen: str,
        with_windows: bool,
        tape: Tensor,
        grad_out: Tensor,
        windows: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor | None, ...]:
        assert native is not None
        grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in parameters]
        of_windows = torch.empty(windows.shape) if with_windows else None
        arrays = [p.detach().contiguous() for p in parameters]
        native.backward(
            chosen, windows.detach(), arrays, tape, grad_out.detach().contiguous(), grads, of_windows
        )
        return of_windows, *grads

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            "steppe-kernels have no second derivative: set the GRU's precision to 'torch' (nn.GRU) before the forward "
            "pass"
        )

"""Memory-efficient sharpness-aware training: a loss towards the averaged model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steppe.core.errors import DataError, SpecError
from steppe.optim.sharpness.construction import Interval
from steppe.optim.sharpness.trajectory_loss import TrajectoryLoss, no_loss

__all__ = ["MESA"]

_HALF = (torch.float16, torch.bfloat16)


class MESA(TrajectoryLoss):
    """MESA: a loss that keeps predictions near those of the moving average of the weights.

    Du, Zhou, Feng, Tan, Zhou 2022, arXiv:2205.14083. With z the logits of sample i now, v those of the averaged
    model, T the temperature and B the batch, from epoch start_epoch + 1 on ::

        loss + lmbda · T² · 1/|B| · Σ_i KL( softmax(v_i / T) ‖ softmax(z_i / T) )
        average ← decay · average + (1 − decay) · w            after each step of the optimizer

    It is a loss and no optimizer. Each evaluation costs one more forward, without gradient (a third of a pass), and
    nothing before start_epoch + 1; one copy of the model is held. Under SAM that is one more forward per pass. ::

        mesa = MESA(model)                                  # the weights it has now are the first average
        for epoch in range(epochs):
            for x, y in loader:
                logits = model(x)
                loss = F.cross_entropy(logits, y) + mesa(logits, x)
                ...
                optimizer.step()
                mesa.update()
            mesa.next_epoch()

    It compares class probabilities, so it has no meaning for the outputs of a regression.

    As in the code (AngusDujw/SAF) the averaged model is in eval mode: no dropout, hence no random numbers, and batch
    normalisation with averaged statistics. Floating-point buffers are averaged like the weights; integer buffers are
    copied, where the code averages and truncates them. Parameters in half precision are averaged in float32, since
    steps of 1 − decay would round away.

    The average remembers about 1/(1 − decay) steps: 5,000 by default, four epochs of ImageNet at batch size 1,024.
    With few steps per epoch choose a smaller decay, or the loss pulls towards the initial weights.

    Paper and code differ: the factor T² is that of the code, and its loss ends at an epoch of its own (360 by
    default; here, set `lmbda` to 0). Its defaults disagree: lmbda is 0.8 in run.sh, 0.3 in the command line, "0.3/0.8"
    in the README; decay is 0.9998 in the command line, from 0.9992 to 0.99992 in its other scripts.

    Args:
        model: called as ``model(*inputs)``, returns class logits [batch, classes]. Give the bare module, on its
            device, before it is wrapped (DistributedDataParallel) or compiled.
        decay: of the average, in [0, 1].
        lmbda: weight of the loss, >= 0.
        temperature: T, > 0.
        start_epoch: the last epoch without the loss, >= 0, counted from 0.

    Attributes:
        average: the averaged model, in eval mode. The code evaluates it too, beside the model.

    Raises:
        SpecError: a value that is not allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float = 0.9998,
        lmbda: float = 0.8,
        temperature: float = 5.0,
        start_epoch: int = 5,
    ) -> None:
        super().__init__(lmbda, temperature, start_epoch)
        if decay not in Interval(0, 1):
            raise SpecError(f"MESA: decay={decay!r}, but it must be {Interval(0, 1)}.")
        self.decay = decay
        self.model = model
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        # the average's own tensors, but float32 ones where it has half precision
        self._exact = {
            name: tensor.float() if tensor.dtype in _HALF else tensor
            for name, tensor in _tensors(self.average).items()
        }

    def __call__(self, logits: Tensor, *inputs: Any, **named: Any) -> Tensor:
        """The loss of a batch.

        Args:
            logits: of the training forward, floating point [batch, classes].
            inputs: what the model was called with.
            named: what the model was called with by name.

        Returns:
            A scalar, in float32 at least; zero up to `start_epoch`.

        Raises:
            DataError: logits of wrong shape or type, or not those of these inputs.
        """
        self.check_logits(logits)
        if not self.active:
            return no_loss(logits)
        with torch.no_grad():
            reference = self.average(*inputs, **named)
        if not isinstance(reference, Tensor) or reference.shape != logits.shape:
            got = list(reference.shape) if isinstance(reference, Tensor) else type(reference).__name__
            raise DataError(
                f"MESA: the averaged model gives {got} for these inputs, the logits are {list(logits.shape)}: give "
                "the inputs of the training forward, and a model that returns class logits."
            )
        return self.weighted(logits, reference, len(logits))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model: call it after each step of the optimizer, from the first one on."""
        now = _tensors(self.model)
        averaged = [name for name, tensor in self._exact.items() if not _integer(tensor)]
        torch._foreach_lerp_(
            [self._exact[name] for name in averaged],
            [now[name].to(self._exact[name].dtype) for name in averaged],
            1 - self.decay,
        )
        for name, own in _tensors(self.average).items():
            own.copy_(now[name] if _integer(own) else self._exact[name])

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the average, by the names of the model's parameters and buffers: as in torch not copied."""
        return {"epoch": self.epoch, "average": dict(self._exact)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, to the same bits.

        Raises:
            SpecError: it is not of this model. Nothing has been changed then.
        """
        given = state_dict["average"]
        for name in sorted({*given, *self._exact}):
            there, here = (
                list(tensors[name].shape) if name in tensors else "absent" for tensors in (given, self._exact)
            )
            if there != here:
                raise SpecError(f"MESA: {name} is {there} in the state, {here} in the model.")
        for name, own in _tensors(self.average).items():
            self._exact[name].copy_(given[name])
            own.copy_(self._exact[name])
        self.epoch = int(state_dict["epoch"])

    def __repr__(self) -> str:
        return (
            f"MESA(decay={self.decay}, lmbda={self.lmbda}, temperature={self.temperature}, "
            f"start_epoch={self.start_epoch})"
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex())

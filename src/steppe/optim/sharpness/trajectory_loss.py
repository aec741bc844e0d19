"""What SAF and MESA share: the divergence from logits of the past, and the epoch from which it counts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from steppe.core.errors import DataError, SpecError
from steppe.optim.sharpness.construction import Interval

__all__ = ["TrajectoryLoss", "no_loss", "trajectory_kl"]


def trajectory_kl(logits: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """T² · KL( softmax(reference / T) ‖ softmax(logits / T) ) of each sample: [batch, classes] twice -> [batch].

    Computed in float32 at least. No gradient flows into `reference`. A class whose reference probability is zero,
    also by underflow, adds zero; NaN stays NaN.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_q = F.log_softmax(logits.to(wide) / temperature, dim=1)
    log_p = F.log_softmax(reference.detach().to(wide) / temperature, dim=1)
    p = log_p.exp()
    # a class masked with a logit of -inf: 0 · inf would be NaN
    return temperature**2 * torch.where(p == 0, 0, p * (log_p - log_q)).sum(1)


class TrajectoryLoss:
    """lmbda · T² · mean KL( past ‖ present ), for every epoch after `start_epoch`; epochs count from 0.

    Attributes:
        lmbda: weight of the loss; may be changed at any time.
        temperature: T; may be changed at any time.
        start_epoch: the last epoch without the loss.
        epoch: the present epoch.
    """

    def __init__(self, lmbda: float, temperature: float, start_epoch: int) -> None:
        name = type(self).__name__
        if lmbda not in Interval(0) or lmbda == math.inf:
            raise SpecError(f"{name}: lmbda={lmbda!r}, but it must be a finite number >= 0.")
        if temperature not in Interval(0) or temperature in (0, math.inf):
            raise SpecError(f"{name}: temperature={temperature!r}, but it must be a finite number > 0.")
        self.check_integer("start_epoch", start_epoch, 0)
        self.lmbda, self.temperature, self.start_epoch = lmbda, temperature, start_epoch
        self.epoch = 0

    @property
    def active(self) -> bool:
        """Whether the present epoch comes after `start_epoch`."""
        return self.epoch > self.start_epoch

    def next_epoch(self) -> None:
        """Say that the present epoch has ended: call it once after each pass through the loader."""
        self.epoch += 1

    def weighted(self, logits: Tensor, reference: Tensor, batch: int) -> Tensor:
        """The loss: the divergences of the rows given, summed, over a batch of `batch` samples."""
        return self.lmbda * trajectory_kl(logits, reference, self.temperature).sum() / batch

    def check_logits(self, logits: Tensor, classes: int | None = None) -> None:
        """Raise a `DataError` unless `logits` are floating-point [batch, classes >= 2]."""
        wrong = logits.ndim != 2 or not logits.is_floating_point() or logits.shape[1] < 2
        if wrong or classes not in (None, logits.shape[1]):
            raise DataError(
                f"{type(self).__name__}: logits are {logits.dtype} of shape {list(logits.shape)}, expected floating "
                f"point [batch, {classes or 'classes >= 2'}]; flatten further dimensions into the batch."
            )

    def check_integer(self, name: str, value: object, least: int) -> None:
        """Raise a `SpecError` unless `value` is an integer >= `least`."""
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise SpecError(f"{type(self).__name__}: {name}={value!r}, but it must be an integer >= {least}.")


def no_loss(logits: Tensor) -> Tensor:
    """The zero of a trajectory loss without a past: adding it changes no bit and no gradient."""
    return logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))

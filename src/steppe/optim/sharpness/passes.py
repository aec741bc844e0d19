"""What an algorithm asks of the training loop, and what it tells afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Diagnostics", "Pass"]


@dataclass(eq=False)
class Pass:
    """One evaluation of the model that an optimizer asks for; most ask for the gradient of the whole batch.

    Attributes:
        number: 1, 2, ... within the step.
        gradient: whether backward has to be called; False asks for the losses alone.
        samples: the samples of the batch that are meant: index with it, ``x[p.samples]``.
        loss: the loss of this pass. `step` sets it; a loop over `passes` may, for the diagnostics.
        perturbed: whether the weights are perturbed.
    """

    gradient: bool = True
    samples: slice | Tensor = field(default_factory=lambda: slice(None))
    factor: float = 1.0
    """On the mean loss of `samples`."""
    statistics: bool | None = None
    """Whether normalisation layers update running statistics; None for: in the first pass only."""
    final: bool = False
    """Whether the base gets this gradient as it is, so that ranks may average it in backward."""

    number: int = field(default=0, init=False)
    perturbed: bool = field(default=False, init=False)
    loss: Any = field(default=None, init=False)
    losses: Tensor | None = field(default=None, init=False)

    def mean(self, losses: Tensor, outputs: Tensor | None = None) -> Tensor:
        """The scalar to call backward on.

        Args:
            losses: one per sample of `samples`, ``[n]``.
            outputs: what the model gave for them, ``[n, ...]``, for an algorithm that differentiates the model alone.

        Raises:
            ValueError: `losses` has not one dimension: compute them with ``reduction="none"``; or there are none,
                because the batch is too small to be divided.
        """
        if losses.ndim != 1:
            raise ValueError(
                f"losses have shape {tuple(losses.shape)}, but one number per sample is needed: compute them with "
                'reduction="none" (and average over anything but the samples).'
            )
        self.losses = losses.detach()
        loss = self.scalar(losses, outputs)
        self.loss = loss.detach()
        return loss

    def scalar(self, losses: Tensor, outputs: Tensor | None) -> Tensor:
        """What `mean` returns, for algorithms that want another one."""
        if not len(losses):
            raise ValueError(f"pass {self.number} has no samples: the batch is too small to be divided.")
        return losses.mean() * self.factor if self.factor != 1 else losses.mean()


@dataclass(frozen=True)
class Diagnostics:
    """What the last step did.

    Attributes:
        passes: gradients that were taken.
        perturbed: whether one was taken at perturbed weights.
        gradient_norm: ‖g‖, g the gradient of the first pass.
        perturbation: ‖e‖ of the last perturbed pass: as applied, after rounding, if ``optimizer.diagnose`` is set,
            else as asked for where the rule knows it; nan where it does not, and for a step without perturbation.
        cosine: of g and the gradient of the last perturbed pass; nan unless ``optimizer.diagnose`` is set.
        surrogate_gap: L(w + e) − L(w), from the losses of the last perturbed pass and the first unperturbed one; nan
            where one of them is unknown.
    """

    passes: int
    perturbed: bool
    gradient_norm: float
    perturbation: float
    cosine: float
    clean_loss: Any = field(default=None, repr=False)
    perturbed_loss: Any = field(default=None, repr=False)

    @property
    def surrogate_gap(self) -> float:  # computed when asked for: reading a loss waits for the device
        """See the class."""
        if self.clean_loss is None or self.perturbed_loss is None:
            return math.nan
        return float(self.perturbed_loss) - float(self.clean_loss)

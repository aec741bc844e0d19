"""Sharpness-aware optimizers under a Hugging Face Trainer, which calls ``optimizer.step()`` after its own backward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.optim.sharpness.base import SharpnessAware

__all__ = ["SharpnessAwareMixin"]


class SharpnessAwareMixin:
    """Makes any Trainer run all passes of a sharpness-aware optimizer over the step's micro-batches::

        class SharpnessAwareTrainer(SharpnessAwareMixin, transformers.Trainer): ...

        optimizer = SAM(model.named_parameters(), base=torch.optim.AdamW, lr=1e-4, rho=0.05, model=model)
        SharpnessAwareTrainer(model, args, train_dataset=data, optimizers=(optimizer, None)).train()

    All else is the Trainer's own: accumulation, mixed precision, ``max_grad_norm`` (it clips what the base optimizer
    gets), schedulers, checkpoints, resuming. Its loss is that of the first pass, at the unperturbed weights; its
    counts of tokens and floating-point operations are those of one pass. A plain optimizer runs as ever, so one class
    trains both sides of a comparison.

    The Trainer prefetches the micro-batches of a step and asks for the gradient of one after the other. Here, all but
    the last wait, and the last runs every pass over all of them.
    """

    accelerator: Any
    args: Any
    optimizer: Any

    _micro_batches: list[Any]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Of the Trainer: the micro-batches of the next step and what to normalise their losses by."""
        trainer: Any = super()
        self._micro_batches, items = trainer.get_batch_samples(*args, **kwargs)
        return self._micro_batches, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Of the Trainer: leave a gradient and return the loss; with the last micro-batch of a step for all of them.

        Raises:
            SpecError: the optimizer looks at single samples or at outputs, which a Trainer's loss does not show.
        """
        trainer: Any = super()
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # out of Accelerate's wrapper
        if not isinstance(optimizer, SharpnessAware):
            return trainer.training_step(model, inputs, *args, **kwargs)
        if optimizer.closure_takes_pass:
            raise SpecError(
                f"{type(optimizer).__name__} needs the losses of single samples, and a Trainer computes one per "
                "batch: write a loop over optimizer.passes() with Accelerate."
            )
        state = self.accelerator.gradient_state
        if not state.sync_gradients:  # not the step's last micro-batch
            return torch.zeros((), device=self.args.device)
        each = state.plugin_kwargs.get("sync_each_batch", False)
        clean: Tensor | None = None
        for one in optimizer.passes(self.accelerator.scaler):
            one.loss = torch.zeros((), device=self.args.device)
            for number, micro_batch in enumerate(self._micro_batches, 1):
                averaged = each or number == len(self._micro_batches)
                with nullcontext() if averaged else self.accelerator.no_sync(model):
                    one.loss += trainer.training_step(model, micro_batch, *args, **kwargs)
            clean = one.loss if clean is None else clean
        assert clean is not None  # there is a first pass
        return clean

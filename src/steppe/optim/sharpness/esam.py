"""Efficient sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from steppe.core.seeding import derive
from steppe.optim.sharpness.ascent import Perturbation, elementwise, magnitudes, steepest
from steppe.optim.sharpness.base import Algorithm, Base, Interval, Pass, SharpnessAware
from steppe.optim.sharpness.gradients import numbered
from steppe.optim.sharpness.sharing import local
from steppe.optim.sharpness.vectors import Vector

__all__ = ["ESAM", "sharpest"]


class ESAM(SharpnessAware):
    """ESAM: SAM with fewer weights in the ascent and fewer samples in the descent.

    Du, Yan, Feng, Zhou, Zhen, Goh, Tan 2022, arXiv:2110.03141, with a random set A of tensors, each in it with
    probability beta, and l_i the loss of sample i ::

        e = (rho / beta) · g_A / ‖g_A‖          g_A = ∇L(w) on A, 0 elsewhere
        S = the share gamma of samples whose l_i(w + e) − l_i(w) is largest
        base step with the gradient of the mean of l_i(w + e), i in S, in all tensors

    Three passes: a gradient at w, losses without gradient at w + e, a gradient of S at w + e. With backward at twice
    the price of forward that is (3 + 1 + 3 · gamma)/3 of a plain step, 1.83 for gamma = 0.5, less what backward saves
    in tensors outside A. From gamma = 0.99 on, S is the batch, as in the code, and the second pass is left out.

    Paper and code (dydjw9/Efficient_SAM) differ. The paper draws single weights, the code whole tensors: so does
    this; the first step has all. With ``form="code"`` a sample is kept if its difference is *greater* than the k-th
    largest, k = int(gamma · n): k − 1 samples, fewer with ties; ``form="paper"`` keeps the k-th too. At least one
    sample is kept: see `sharpest`. The code adds 1e-7 to the norm, as here, and its factor is 1/beta, which its
    author says is right where the paper prints 1/(1 − beta).

    Tensors outside A do not require a gradient during the first pass, so that theirs are not computed. In a
    `DistributedDataParallel` or compiled module, which would wait for them or be compiled again (give `model`), they
    are computed and left out. Ranks draw the same A. For a set of your own override `active`.

    The closure takes the pass; `p.mean` gets the losses in passes without gradient too.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default the official script's for ResNet-18, as are beta and gamma. With both at 1, the
            official class's defaults, it is SAM.
        beta: probability that a tensor takes part in the ascent, in [0.01, 1]; one for all groups.
        gamma: share of samples that take part in the descent, in [0, 1]; one for all groups.
        adaptive: scale the perturbation by |w|, see `SAM`.
        form: "code" or "paper", see above; one for all groups.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.

    Raises:
        RuntimeError: in a step, if `p.mean` was not given the losses of all samples.
    """

    allowed = {  # noqa: RUF012
        "rho": Interval(0),
        "beta": Interval(0.01, 1),
        "gamma": Interval(0, 1),
        "adaptive": (False, True),
        "form": ("code", "paper"),
    }
    closure_takes_pass = True

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        beta: float = 0.6,
        gamma: float = 0.5,
        adaptive: bool = False,
        form: str = "code",
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, beta=beta, gamma=gamma, adaptive=adaptive, form=form)

    def algorithm(self) -> Algorithm:
        """∇L(w) in some tensors; the losses at w + e; their gradient for the sharpest samples."""
        clean, moved, last = Pass(), Pass(gradient=False), Pass(final=True)
        idle = self._idle(self.common("beta"))
        with self._frozen(idle):
            g = yield clean
        g = self._without(g, idle)
        with self.perturbed(self._ascent(g)):
            del g
            if self.buckets and self.common("gamma") < 0.99:
                yield moved
                last.samples = self._sharpest(clean, moved)
            yield last
        if moved.loss is not None:  # of the same samples as the clean one
            last.loss = moved.loss

    def active(self, index: int, name: str | None, beta: float) -> bool:
        """Whether a tensor takes part in this step's ascent.

        Args:
            index: its position over all groups.
            name: its name if there are names; what is drawn is then a function of the name.
            beta: the probability.
        """
        if beta == 1 or not self.steps:
            return True
        drawn = derive(self.seed, "active", index if name is None else name, self.steps)
        return drawn < beta * 2**63

    def _idle(self, beta: float) -> dict[int, Tensor]:
        """Index -> tensor outside A; none if that would leave nothing."""
        trained = [each for each in numbered(self.param_groups) if each[-1].requires_grad]
        idle = {index: param for _, index, name, param in trained if not self.active(index, name, beta)}
        return idle if len(idle) < len(trained) else {}

    @contextmanager
    def _frozen(self, idle: dict[int, Tensor]) -> Iterator[None]:
        # DDP's buckets, FSDP's shards and a graph that was compiled for them wait for all gradients
        waits = idle and (self.module.ddp is not None or self.module.is_compiled)
        frozen = [] if waits else [param for param in idle.values() if local(param) is param]
        try:
            for param in frozen:
                param.requires_grad_(False)
            yield
        finally:
            for param in frozen:
                param.requires_grad_(True)

    def _without(self, g: Vector, idle: dict[int, Tensor]) -> Vector:
        for bucket, gs in zip(g.buckets, g.tensors, strict=True):
            computed = [each for index, each in zip(bucket.indices, gs, strict=True) if index in idle]
            if computed:
                torch._foreach_zero_(computed)
                g = g.like(g.tensors)  # its norm is another one
        return g

    def _ascent(self, g: Vector) -> Perturbation:
        rho = [each / self.common("beta") for each in self.hyper("rho")]
        adaptive = self.hyper("adaptive")
        if not any(adaptive):
            return steepest(g, rho, eps=1e-7)
        g.disposable = True
        scales = [magnitudes(b) if yes else None for b, yes in zip(g.buckets, adaptive, strict=True)]
        return elementwise(g, rho, scales, eps=1e-7)

    def _sharpest(self, clean: Pass, moved: Pass) -> Tensor:
        before, after = clean.losses, moved.losses
        if before is None or after is None or before.shape != after.shape:
            raise RuntimeError(
                "ESAM chooses samples by their losses: call p.mean(losses) with the losses of the whole batch in the "
                "first two passes, in the one without gradient too."
            )
        return sharpest(before, after, self.common("gamma"), self.common("form"))


def sharpest(before: Tensor, after: Tensor, gamma: float, form: str = "code") -> Tensor:
    """The indices of the samples whose loss rose most, in ascending order.

    The cut is the k-th largest rise, k = int(gamma · n) but at least 1; kept is what lies above it, with
    ``form="paper"`` at it too. If nothing does, because k is 1 or rises are equal, what lies at the cut is kept: all,
    if no loss has changed. With a rise that is nan there is no cut and all are kept, so that the step is skipped.

    Args:
        before: losses at w, ``[n]``.
        after: losses at w + e, ``[n]``.
        gamma: share of samples.
        form: "code" or "paper".
    """
    rises = after - before
    cut = rises.topk(max(1, int(gamma * len(rises)))).values[-1]
    kept = rises > cut if form == "code" else rises >= cut
    if not bool(kept.any()):
        kept = ~(rises < cut)
    return kept.nonzero().squeeze(1)

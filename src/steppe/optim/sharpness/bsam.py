"""SAM as an optimal relaxation of Bayes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe.core.errors import SpecError
from steppe.optim.sharpness.ascent import Perturbation
from steppe.optim.sharpness.base import Algorithm, Interval, Pass, SharpnessAware
from steppe.optim.sharpness.gradients import bucketed, gradient_of
from steppe.optim.sharpness.noise import Remade, noise_stream, pieces, times_normal
from steppe.optim.sharpness.rounding import HALF
from steppe.optim.sharpness.sharing import local
from steppe.optim.sharpness.vectors import Bucket, Vector, duplicate

__all__ = ["BSAM", "PrecisionMomentum"]


class PrecisionMomentum(Optimizer):
    """What `BSAM` steps with: momentum divided by a precision s that is learned from gradients at noisy weights.

    ``state[p]`` holds m and s, in float32 for weights in half precision. Stepped by itself, it learns s from ``.grad``.

    Args:
        params: see `torch.optim.Optimizer`.
        lr, betas, weight_decay, damping, s_init: see `BSAM`.

    Attributes:
        slopes: parameter -> |g| that the next step learns s from, instead of |.grad|.
    """

    slopes: Mapping[Tensor, Tensor] = {}

    def __init__(
        self,
        params: Any,
        lr: float = 0.5,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        damping: float = 0.1,
        s_init: float = 1.0,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise SpecError(f"betas={betas!r}, but each must be a number in [0, 1).")
        own = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "damping": damping, "s_init": s_init}
        super().__init__(params, own)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See `BSAM`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = bucketed(self.param_groups, lambda index, name, param: None)
        for bucket, grads in zip(buckets, gradient_of(buckets).tensors, strict=True):
            self._step(bucket, grads)
        self.slopes = {}
        return loss

    def _step(self, bucket: Bucket, grads: list[Tensor]) -> None:
        group, half = bucket.group, bucket.params[0].dtype in HALF
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        for owner, grad in zip(bucket.owners, grads, strict=True):
            if not self.state[owner]:
                self.state[owner]["m"] = torch.zeros_like(owner, dtype=grad.dtype)
                self.state[owner]["s"] = torch.full_like(owner, group["s_init"], dtype=grad.real.dtype)
        ms = [local(self.state[owner]["m"]) for owner in bucket.owners]
        ss = [local(self.state[owner]["s"]) for owner in bucket.owners]
        ws = duplicate(bucket.params, grads[0].dtype) if half else bucket.params
        torch._foreach_mul_(ms, beta1)
        torch._foreach_add_(ms, grads, alpha=1 - beta1)
        torch._foreach_add_(ms, ws, alpha=(1 - beta1) * decay)
        torch._foreach_addcdiv_(ws, ms, ss, value=-float(group["lr"]))
        if half:
            torch._foreach_copy_(bucket.params, ws)
        roots = torch._foreach_sqrt(ss)
        torch._foreach_mul_(
            roots,
            [
                self.slopes[owner] if owner in self.slopes else grad.abs()
                for owner, grad in zip(bucket.owners, grads, strict=True)
            ],
        )
        torch._foreach_mul_(ss, beta2)
        torch._foreach_add_(ss, roots, alpha=1 - beta2)
        torch._foreach_add_(ss, (1 - beta2) * (group["damping"] + decay))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer`; m and s keep their type, which torch would make that of the weights."""
        super().load_state_dict(state_dict)
        params = [param for group in self.param_groups for param in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[param][name] = value.to(param.device, copy=True)


class BSAM(SharpnessAware):
    """bSAM: SAM as an optimal relaxation of Bayes, which learns how precisely each weight is known.

    Moellenhoff, Khan 2023, arXiv:2210.01620, Algorithm 1, with N = data_size, z standard normal, elementwise ::

        g = ∇L(w + z / √(N s))
        p = ∇L(w + rho · g / s)                     around the clean w, not divided by a norm
        m ← beta1 · m + (1 − beta1)(p + weight_decay · w)
        w ← w − lr · m / s                          with s as it was
        s ← beta2 · s + (1 − beta2)(√s · |g| + damping + weight_decay)

    w with variance 1/(N s) is the posterior: draw from it to average predictions. Paper and official code
    (team-approx-bayes/bayesian-sam) agree but for `damping` and `s_init`, which are the code's. There is no base to
    choose: lr, betas and the like are those of the method's own `PrecisionMomentum`, and m and s stand in ``state``.

    With `batch_split` the batch is taken in parts (``x[i::batch_split]``, so the closure takes the pass), each with its
    own noise and perturbation, and |g| and p are averaged: m-sharpness, as in the official runs, which have 8. It costs
    the same two passes over each sample. With ``sync="last"`` each rank is such a part.

    Args:
        params: see `SharpnessAware`.
        data_size: number of training samples N, >= 1. The official runs multiply it by 4 under data augmentation.
        lr: learning rate. This and the defaults below are those of the official CIFAR runs.
        betas: decay of m and of s, each in [0, 1).
        rho: size of the perturbation, >= 0.
        weight_decay: of the prior, >= 0; default 10 / data_size, the prior precision of the official runs.
        damping: keeps s from vanishing, >= 0.
        s_init: s before the first step, > 0.
        batch_split: number of parts, >= 1, see above; one for all groups. Default 1, for plain closures.
        rest: what `SharpnessAware` takes.
    """

    allowed = {  # noqa: RUF012
        "data_size": Interval(1),
        "rho": Interval(0),
        "weight_decay": Interval(0),
        "damping": Interval(0),
        "s_init": Interval(1e-12),
        "batch_split": Interval(1, whole=True),
    }

    def __init__(
        self,
        params: Any,
        *,
        data_size: float,
        lr: float = 0.5,
        betas: tuple[float, float] = (0.9, 0.999),
        rho: float = 0.01,
        weight_decay: float | None = None,
        damping: float = 0.1,
        s_init: float = 1.0,
        batch_split: int = 1,
        **rest: Any,
    ) -> None:
        if data_size not in Interval(1):
            raise SpecError(f"BSAM: data_size={data_size!r}, but it must be {Interval(1)}.")
        decay = 10 / data_size if weight_decay is None else weight_decay
        stepped = {"lr": lr, "betas": betas, "weight_decay": decay, "damping": damping, "s_init": s_init}
        own = {"rho": rho, "data_size": data_size, "batch_split": batch_split}
        super().__init__(params, PrecisionMomentum, {**rest, **stepped}, **own)

    @property
    def closure_takes_pass(self) -> bool:  # type: ignore[override]
        """To tell which part of the batch."""
        return bool(self.common("batch_split") > 1)

    def algorithm(self) -> Algorithm:
        """For each part ∇L at noisy weights, then where that leads."""
        parts, slopes, total = int(self.common("batch_split")), None, None
        for part in range(parts):
            samples = slice(part, None, parts)
            with self.perturbed(self.noise(part)):
                g = yield Pass(samples=samples)
            with self.perturbed(self._ascent(g)):
                p = yield Pass(samples=samples, final=parts == 1)
            size = g.like([_abs_(gs) for gs in g.tensors])
            slopes, total = _sum(slopes, size), _sum(total, p)
        assert slopes is not None
        assert total is not None
        if parts > 1:
            for sums in (*slopes.tensors, *total.tensors):
                torch._foreach_mul_(sums, 1 / parts)
            self.descend(total)
        if self.module.by_rank:
            for tensors in slopes.tensors:
                self.module.mean(tensors)
        assert isinstance(self.base, PrecisionMomentum)
        self.base.slopes = {
            owner: slope
            for bucket, each in zip(self.buckets, slopes.tensors, strict=True)
            for owner, slope in zip(bucket.owners, each, strict=True)
        }

    def noise(self, part: int = 0) -> Perturbation:
        """z / √(N s), drawn again to be taken away."""

        def made(bucket: Bucket) -> list[Tensor]:
            scales = torch.cat([s.reshape(-1) for s in self._precisions(bucket)])
            scales = scales.mul_(bucket.group["data_size"]).rsqrt_()
            wide = scales.to(bucket.params[0].dtype) if bucket.params[0].is_complex() else scales
            return pieces(self.spread(wide, bucket, part), bucket)

        buckets = self.bucketed(lambda index, param: param.requires_grad)
        return Perturbation(Remade(buckets, made), [1.0] * len(buckets))

    def spread(self, scales: Tensor, bucket: Bucket, part: int) -> Tensor:
        """scales ⊙ z, written over scales: the same z whenever it is asked for in a step."""
        return times_normal(scales, noise_stream(self, bucket, part))

    def _ascent(self, g: Vector) -> Perturbation:
        """rho · g / s, divided again to be taken away."""
        of = {bucket.indices[0]: gs for bucket, gs in zip(g.buckets, g.tensors, strict=True)}

        def made(bucket: Bucket) -> list[Tensor]:
            return list(torch._foreach_div(of[bucket.indices[0]], self._precisions(bucket)))

        return Perturbation(Remade(g.buckets, made), self.hyper("rho"))

    def _precisions(self, bucket: Bucket) -> list[Tensor]:
        """s of each parameter."""
        first = bucket.params[0]
        dtype = torch.float32 if first.dtype in HALF else first.real.dtype
        start = torch.full((), bucket.group["s_init"], dtype=dtype, device=first.device)
        held = [self.state.get(owner, {}) for owner in bucket.owners]
        return [
            local(state["s"]) if "s" in state else start.expand(param.shape)
            for state, param in zip(held, bucket.params, strict=True)
        ]


def _abs_(tensors: list[Tensor]) -> list[Tensor]:
    if tensors[0].is_complex():
        return list(torch._foreach_abs(tensors))
    torch._foreach_abs_(tensors)
    return tensors


def _sum(x: Vector | None, y: Vector) -> Vector:
    if x is None:
        return y
    for xs, ys in zip(x.tensors, y.tensors, strict=True):
        torch._foreach_add_(xs, ys)
    return x

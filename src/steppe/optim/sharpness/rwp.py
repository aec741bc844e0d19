"""Random weight perturbation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steppe.core.errors import SpecError
from steppe.optim.sharpness.ascent import Perturbation
from steppe.optim.sharpness.base import Algorithm, Base, Interval, Pass
from steppe.optim.sharpness.composition import Ascent, Cadence, Composition, Descent, Hyper, Parts, Radius
from steppe.optim.sharpness.noise import Remade, noise_stream, pieces, times_normal
from steppe.optim.sharpness.rounding import HALF
from steppe.optim.sharpness.vectors import Bucket, Vector, combine

__all__ = ["RWP", "FilterNoise", "MixedDescent", "NoiseScale"]


class FilterNoise(Ascent):
    """e = rho · ‖row‖ · z, z standard normal: a row is a slice along the first dimension, or all of a vector.

    Only a norm per row is held; the numbers are drawn again to be taken away.
    """

    def trait(self, index: int, name: str | None, param: Tensor) -> tuple[bool, int]:
        """Whether it has rows, and their length: rows of one length are handled together."""
        return param.ndim > 1, param.shape[1:].numel() if param.ndim > 1 else param.numel()

    def perturbation(self, g: Vector, rho: Sequence[float]) -> Perturbation:
        """See the class; g only tells the parameters."""
        norms = {bucket.indices[0]: _row_norms(bucket) for bucket in g.buckets}

        def made(bucket: Bucket) -> list[Tensor]:
            _, width = _rows(bucket)
            scales = norms[bucket.indices[0]].expand(-1, width).clone(memory_format=torch.contiguous_format)
            return pieces(self.spread(scales.view(-1), bucket), bucket)

        return Perturbation(Remade(g.buckets, made), list(rho))

    def spread(self, scales: Tensor, bucket: Bucket) -> Tensor:
        """scales ⊙ z, written over scales: the same z whenever it is asked for in a step."""
        return times_normal(scales, noise_stream(self.optimizer, bucket))


class NoiseScale(Radius):
    """The standard deviation of the noise relative to the row's norm."""

    hyper = {"gamma": Hyper(0.01, Interval(0))}  # noqa: RUF012

    @classmethod
    def objection(cls, parts: Parts) -> str | None:
        """There is noise."""
        if issubclass(parts.ascent, FilterNoise):
            return None
        return (
            "gamma is the deviation of noise, and this ascent draws none: take ascent='rwp', or radius='sam'."
        )

    def rho(self) -> list[float]:
        """See the class."""
        return self.each("gamma")


class MixedDescent(Descent):
    """(1 − alpha) · g + alpha · p; where `halves`, g is of every other sample and p of the rest."""

    hyper = {"alpha": Hyper(0.5, Interval(0, 1)), "halves": Hyper(False, (False, True))}  # noqa: RUF012
    keeps_gradient = True

    def check(self, group: Mapping[str, Any]) -> None:
        """No step is left with half a batch."""
        if self.of(group, "halves") and self.optimizer.parts.cadence.perturbs is not Cadence.perturbs:
            raise SpecError(
                "halves=True gives each pass half of the batch, so the steps that this cadence does not perturb would "
                "see half only: set halves=False."
            )

    @property
    def takes_pass(self) -> bool:
        """To tell which half."""
        return bool(self.one("halves"))

    def passes(self) -> tuple[Pass, Pass]:
        """See the class."""
        if not self.one("halves"):
            return super().passes()
        return Pass(samples=slice(0, None, 2)), Pass(samples=slice(1, None, 2))

    def combined(self, g: Vector, p: Vector) -> Vector:
        """See the class."""
        alpha = self.each("alpha")
        return combine(p, alpha, g, [1 - a for a in alpha])


class RWP(Composition):
    """RWP: the gradient at randomly perturbed weights, mixed with the clean one.

    Li, Yan, Lei, Wu, Fang, Yang, Huang 2022, arXiv:2211.11489, and again 2024, arXiv:2404.00357, where it is called
    m-RWP; with z standard normal ::

        r_ij = gamma · ‖row i of W‖ · z_ij       r = gamma · ‖p‖ · z for biases and all else that has one dimension
        base step with (1 − alpha) · ∇L_1(w) + alpha · ∇L_2(w + r)

    with L_1 and L_2 the losses of disjoint halves of the batch if `halves` (it is then asked for ``x[0::2]`` and
    ``x[1::2]``, so the closure takes the pass, and a step costs one pass), else both of the whole batch. For alpha = 1
    the clean gradient counts nothing and is not taken: plain RWP, one pass over the whole batch.

    Paper and official code (nblt/RWP) agree; the code adds 1e-16 to ‖p‖, and so does this to all norms. The code
    exists for two ranks only: odd ones perturb and weigh their loss by 2 · alpha, even ones do not and weigh by
    2 · (1 − alpha), and `DistributedDataParallel` averages. That is ``halves=True`` on one rank with both batches. Here
    all ranks do the same; with ``sync="last"`` each draws noise of its own.

    Noise is a function of seed and step. With ``restore="subtract"`` it is drawn again to be taken away, so that
    beside the clean gradient nothing is held during the perturbed pass, and nothing at all with alpha = 1. Rows are
    those that a rank holds whole: all, unless weights are sharded along another dimension than the first.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        gamma: standard deviation relative to the norm, >= 0; default the official script's for CIFAR (ImageNet 0.005).
        alpha: weight of the perturbed gradient, in [0, 1]; default the official script's.
        halves: whether each pass gets half of the batch, which needs two samples; one for all groups.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=FilterNoise, radius=NoiseScale, descent=MixedDescent)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        gamma: float = 0.01,
        alpha: float = 0.5,
        halves: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, gamma=gamma, alpha=alpha, halves=halves)

    def algorithm(self) -> Algorithm:
        """Both passes, or the perturbed one alone where the other counts nothing."""
        if any(group[self.key("alpha")] != 1 for group in self.param_groups):
            yield from super().algorithm()
            return
        buckets = self.bucketed(lambda index, param: param.requires_grad)
        gamma = [bucket.group[self.key("gamma")] for bucket in buckets]
        with self.perturbed(self.ascent.perturbation(Vector(buckets, []), gamma)):
            yield Pass(final=True)


def _rows(bucket: Bucket) -> tuple[int, int]:
    """Number and length of the rows in a bucket."""
    first = bucket.params[0]
    if first.ndim > 1:
        return sum(len(param) for param in bucket.params), first.shape[1:].numel()
    return len(bucket.params), first.numel()


def _row_norms(bucket: Bucket) -> Tensor:
    """‖row‖ ``[rows, 1]`` in the type that noise is computed in: float32 for half precision."""
    dtype = torch.float32 if bucket.params[0].dtype in HALF else bucket.params[0].dtype
    flat = torch.cat([param.reshape(-1) for param in bucket.params]).to(dtype)
    norms = torch.linalg.vector_norm(flat.view(_rows(bucket)), dim=1, keepdim=True)
    if bucket.params[0].ndim <= 1:
        norms = bucket.total(norms)
    return (norms + 1e-16).to(dtype)

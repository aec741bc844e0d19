"""LookSAM: sharpness-aware steps now and then, and in between what they found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steppe.optim.sharpness.ascent import EPS
from steppe.optim.sharpness.base import Base, Interval
from steppe.optim.sharpness.composition import Cadence, Composition, Hyper, Parts
from steppe.optim.sharpness.sam import SteepestAscent
from steppe.optim.sharpness.vectors import TINY, Vector

__all__ = ["Look", "LookSAM"]


class Look(Cadence):
    """Every k-th step is perturbed; the others get g + alpha · ‖g‖ · v/‖v‖.

    v is the part of what the base got in the last perturbed step that is orthogonal to that step's g. It is kept as
    a unit vector, so that a step that uses it reads it once, in the memory that held g.
    """

    hyper = {  # noqa: RUF012
        "k": Hyper(5, Interval(1, whole=True)),
        "alpha": Hyper(0.7, Interval(0)),
        "norms": Hyper("global", ("global", "tensor")),
    }
    remembers = ("v",)
    keeps_gradient = True

    def trait(self, index: int, name: str | None, param: Tensor) -> bool:
        """Whether the parameter has a v: one without a gradient in the last perturbed step has none."""
        return index in self.optimizer.memory["v"]

    def perturbs(self, g: Vector) -> bool:
        """In steps 0, k, 2k, ..."""
        if self.optimizer.steps % self.one("k"):
            return False
        self.optimizer.memory["v"].clear()  # dead, whatever becomes of this step: free for its passes
        return True

    def otherwise(self, g: Vector) -> Vector:
        """See the class."""
        memory, by_tensor = self.optimizer.memory["v"], self._by_tensor
        for bucket, gs, ns, alpha in zip(
            g.buckets, g.tensors, self._norms(g), self.each("alpha"), strict=True
        ):
            if self.trait_of(bucket):
                vs = [memory[i] for i in bucket.indices]
                added = torch._foreach_mul(vs, ns) if by_tensor else vs
                torch._foreach_add_(gs, added, alpha=alpha if by_tensor else alpha * g.norm)
        return g.like(g.tensors)

    def update(self, g: Vector, combined: Vector | None) -> None:
        """v ← p − (⟨g, p⟩ / ‖g‖²) g with p = `combined`, written over g, then divided by its norm."""
        if combined is None:
            return
        eps, eps_v = (0.0, 1e-8) if self._by_tensor else (EPS, 0.0)  # as in the codes, see `LookSAM`
        of_g, of_p = self._norms(g), self._norms(combined)
        # with no room for an inner product: s = (‖p‖/‖g‖) g + p has ‖s‖² = 2 ‖p‖² (1 + cos) and v = (1 + k) p − k s
        for gs, ps, ns, ms in zip(g.tensors, combined.tensors, of_g, of_p, strict=True):
            torch._foreach_mul_(gs, [m / n if n > TINY else 0.0 for n, m in zip(ns, ms, strict=True)])
            torch._foreach_add_(gs, ps)
        v = g.like(g.tensors)
        for gs, ps, ns, ms, ls in zip(v.tensors, combined.tensors, of_g, of_p, self._norms(v), strict=True):
            cosines = [(size / m) ** 2 / 2 - 1 if m else 0.0 for size, m in zip(ls, ms, strict=True)]
            k = [c * n * n / (n * n + eps) if n > TINY else 0.0 for c, n in zip(cosines, ns, strict=True)]
            torch._foreach_lerp_(gs, ps, [1 + each for each in k])
        v = g.like(g.tensors)
        rounding = max((16 * torch.finfo(vs[0].dtype).eps for vs in v.tensors), default=0.0)
        for bucket, vs, ls, ns, ms in zip(v.buckets, v.tensors, self._norms(v), of_g, of_p, strict=True):
            # what rounding and eps leave of a p that is parallel to g is no direction
            least = [m * (rounding + 2 * eps / (n * n + EPS)) for n, m in zip(ns, ms, strict=True)]
            scales = [1 / (size + eps_v) if size > low else 0.0 for size, low in zip(ls, least, strict=True)]
            torch._foreach_mul_(vs, scales)
            self.optimizer.memory["v"].update(zip(bucket.indices, vs, strict=True))

    @property
    def _by_tensor(self) -> bool:
        return bool(self.one("norms") == "tensor")

    def _norms(self, x: Vector) -> list[list[float]]:
        """For each tensor its norm, or the norm of the whole."""
        return x.norms_by_tensor if self._by_tensor else [[x.norm] * len(xs) for xs in x.tensors]


class LookSAM(Composition):
    """LookSAM: SAM every k steps; between them the part of its gradient that makes it flat is used again.

    Liu, Mai, Chen, Hsieh, You 2022, arXiv:2203.02714, Algorithm 1, with g = ∇L(w) and t = 0, 1, ... ::

        t mod k = 0:   p = ∇L(w + rho · g / ‖g‖)        v = p − (⟨g, p⟩ / ‖g‖²) g
                       base step with p
        else:          base step with g + alpha · (‖g‖ / ‖v‖) · v

    (k + 1)/k passes per step. There is no official code; what there is disagrees. ``norms="global"`` is the paper and
    MarlonBecker/MSAM: norms and the inner product run over all parameters, with 1e-12 added to ‖g‖² and nothing to
    ‖v‖. ``norms="tensor"`` is rollovd/LookSAM and pytorch_optimizer: each tensor has its own v, scaled to its own ‖g‖,
    with 1e-8 added to ‖v‖; rho · g / ‖g‖ is global there too. A v that is mere rounding counts as zero: with rho = 0,
    or for a tensor of one number, nothing is added.

    v is kept in float32 for half-precision weights, and belongs to ``memory["v"]``.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default pytorch_optimizer's.
        alpha: weight of v, >= 0; default the paper's.
        k: steps from one perturbed step to the next, a whole number >= 1, one for all groups; default the paper's for
            ViT. With 1 it is SAM.
        norms: "global" or "tensor", see above; one for all groups.
        adaptive: scale the perturbation by |w|, see `SAM`.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=SteepestAscent, cadence=Look)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.1,
        alpha: float = 0.7,
        k: int = 5,
        norms: str = "global",
        adaptive: bool = False,
        **rest: Any,
    ) -> None:
        super().__init__(params, base, rest, rho=rho, alpha=alpha, k=k, norms=norms, adaptive=adaptive)

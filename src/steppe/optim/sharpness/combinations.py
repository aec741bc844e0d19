"""Three combinations that nobody has published, as far as we know: parts of known optimizers, put together anew.

They are examples of what `Composed` makes in one line, with names and defaults of their own so that studies and
checkpoints can speak of them. ``studies/combinations.toml`` compares them with their parents. No claim is made
beyond what such a study finds.
"""

from __future__ import annotations

from typing import Any

import torch

from steppe.optim.sharpness.ae_sam import WhenSteep
from steppe.optim.sharpness.asam import AdaptiveAscent
from steppe.optim.sharpness.base import Base
from steppe.optim.sharpness.composition import Composition, Parts
from steppe.optim.sharpness.friendly import FriendlyAscent
from steppe.optim.sharpness.gsam import SurrogateGapDescent
from steppe.optim.sharpness.looksam import Look
from steppe.optim.sharpness.vasso import AveragedAscent

__all__ = ["AEVaSSO", "FriendlyGSAM", "LookAGSAM"]


class LookAGSAM(Composition):
    """ASAM's ascent and GSAM's descent in every k-th step, LookSAM's reuse in the others. Unpublished.

    With g = ∇L(w), T as in `ASAM`, a⊥b the part of a that is orthogonal to b, and t = 0, 1, ... ::

        t mod k = 0:   p = ∇L(w + rho · T² ⊙ g / ‖T ⊙ g‖)        G = p − descent_alpha · g⊥p        v = G⊥g
                       base step with G
        else:          base step with g + cadence_alpha · (‖g‖ / ‖v‖) · v

    The hope: a neighbourhood that does not change when layers are rescaled, as for ASAM, with GSAM's control of the
    gap L(w + e) − L(w) that a radius as large as ASAM's opens, for (k + 1)/k gradients per step instead of two. The
    gap's term is in G only: v has the direction that it would have without.

    Args:
        params: see `SharpnessAware`; with names, see `ASAM`.
        base: see `SharpnessAware`.
        rho: radius relative to the weights, >= 0; default ASAM's.
        eta: floor of T, >= 0; default ASAM's.
        descent_alpha: weight of the gap, >= 0; default GSAM's.
        minimize: "perturbed" or "clean", see `GSAM`.
        cadence_alpha: weight of v, >= 0; default LookSAM's.
        k: steps from one perturbed step to the next; default LookSAM's.
        norms: "global" or "tensor", see `LookSAM`.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=AdaptiveAscent, descent=SurrogateGapDescent, cadence=Look)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.5,
        eta: float = 0.01,
        descent_alpha: float = 0.4,
        minimize: str = "perturbed",
        cadence_alpha: float = 0.7,
        k: int = 5,
        norms: str = "global",
        **rest: Any,
    ) -> None:
        super().__init__(
            params,
            base,
            rest,
            rho=rho,
            eta=eta,
            descent_alpha=descent_alpha,
            minimize=minimize,
            cadence_alpha=cadence_alpha,
            k=k,
            norms=norms,
        )


class FriendlyGSAM(Composition):
    """Friendly-SAM's ascent with GSAM's descent. Unpublished.

    With g = ∇L(w), m its moving average as in `FriendlySAM`, and a⊥b the part of a that is orthogonal to b ::

        d = g − sigma · m              p = ∇L(w + rho · d/‖d‖)
        base step with p − alpha · g⊥p

    The hope: Friendly-SAM perturbs along the batch's noise only, so p says little of how the loss rises along the
    full gradient; the gap's term brings g back in where it does not disturb the descent on p.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        rho: radius, >= 0; default Friendly-SAM's.
        sigma: share of the average that is taken away, >= 0; default Friendly-SAM's.
        lmbda: decay of the average, in [0, 1]; default Friendly-SAM's.
        form: "code" or "paper", see `FriendlySAM`.
        alpha: weight of the gap, >= 0; default GSAM's.
        minimize: "perturbed" or "clean", see `GSAM`.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=FriendlyAscent, descent=SurrogateGapDescent)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        rho: float = 0.05,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        form: str = "code",
        alpha: float = 0.4,
        minimize: str = "perturbed",
        **rest: Any,
    ) -> None:
        super().__init__(
            params,
            base,
            rest,
            rho=rho,
            sigma=sigma,
            lmbda=lmbda,
            form=form,
            alpha=alpha,
            minimize=minimize,
        )


class AEVaSSO(Composition):
    """VaSSO's ascent in the steps that AE-SAM chooses. Unpublished.

    With g = ∇L(w), d its moving average as in `VaSSO`, and mu, sigma, c as in `AESAM` ::

        d ← (1 − theta) · d + theta · g
        ‖g‖² >= mu + c · sigma:  base step with ∇L(w + rho · d / ‖d‖)        else:  base step with g

    The hope: the steps worth a second gradient are those with an unusually large g, and these are also the noisiest,
    where a direction averaged over the steps between, which costs nothing there, steadies the perturbation most.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        total_steps: steps of the whole training, see `AESAM`. Required.
        rho: radius, >= 0; default that of both.
        theta: weight of the new gradient, in [0, 1]; default VaSSO's.
        delta: decay of the moments of ‖g‖², in [0, 1]; default AE-SAM's.
        lambda1: c at the end; default AE-SAM's.
        lambda2: c at the beginning; default AE-SAM's.
        rest: hyper-parameters of the base, and what `SharpnessAware` takes.
    """

    parts = Parts(ascent=AveragedAscent, cadence=WhenSteep)

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        total_steps: int,
        rho: float = 0.05,
        theta: float = 0.9,
        delta: float = 0.9,
        lambda1: float = -1.0,
        lambda2: float = 1.0,
        **rest: Any,
    ) -> None:
        super().__init__(
            params,
            base,
            rest,
            total_steps=total_steps,
            rho=rho,
            theta=theta,
            delta=delta,
            lambda1=lambda1,
            lambda2=lambda2,
        )

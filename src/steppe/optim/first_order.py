"""First-order optimizers by their textbook names, and Adam with every option of its paper."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from steppe.core.errors import SpecError

__all__ = ["GD", "NAG", "ClassicAdam", "Momentum", "betas_at"]


class GD(SGD):
    """Gradient descent: w ← w − lr·g. With the gradient of all data it is full-batch, else SGD without momentum.

    Args:
        params: tensors, named tensors or groups.
        lr: learning rate.
    """

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)


class Momentum(SGD):
    """Heavy-ball momentum: v ← momentum·v + (1 − dampening)·g, w ← w − lr·v (Polyak 1964).

    Texts that put the learning rate into the velocity (v ← momentum·v + lr·g, w ← w − v) take the same steps while lr
    is constant; under a schedule they differ.

    Args:
        params: tensors, named tensors or groups.
        lr: learning rate.
        momentum: share of the velocity that is kept.
        dampening: share of the gradient that is left out, in all but the first step.
        weight_decay: added to the gradient as weight_decay·w.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay)


class NAG(SGD):
    """Nesterov's accelerated gradient: v ← momentum·v + g, w ← w − lr·(g + momentum·v).

    The weights w here are the *look-ahead* points of the textbook form, g at x − momentum·u, u ← momentum·u + lr·g,
    x ← x − u: its losses are the same, and its own weights are x = w + lr·momentum·v. The first step starts at x = w.

    Args:
        params: tensors, named tensors or groups.
        lr: learning rate.
        momentum: share of the velocity that is kept; above 0.
        weight_decay: added to the gradient as weight_decay·w.
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=True)


class ClassicAdam(Optimizer):
    """Adam as its paper has it, with the options that libraries leave out (Kingma & Ba 2015, arXiv:1412.6980).

    m ← β1·m + (1 − β1)·g, v ← β2·v + (1 − β2)·g², and with c1 = 1 − β1^t, c2 = 1 − β2^t:

    - ``form="algorithm"`` (Algorithm 1): w ← w − lr·(m/c1) / (√(v/c2) + eps). The same as ``torch.optim.Adam``.
    - ``form="efficient"`` (end of section 2): w ← w − lr·√c2/c1·m / (√v + eps). Here `eps` is the paper's ε̂: it is
      added before v is corrected, so in early steps it weighs 1/√c2 as much as in Algorithm 1.

    Args:
        params: tensors, named tensors or groups.
        lr: step size α.
        betas: decay rates (β1, β2), each in [0, 1).
        eps: added to the denominator; 0 makes steps independent of the objective's scale, and NaN of a zero gradient.
        form: ``"algorithm"`` or ``"efficient"``.
        beta_decay: λ in (0, 1]; 1 leaves the betas as they are.
        beta_decay_form: what λ decays. ``"paper"`` (Theorem 4.1): β1 alone, and the correction keeps the β1 of the
            first step. ``"note"``, as published code does it: both betas, and the correction takes the decayed
            ones to the power t, which is not the bias that m and v then have. See `betas_at`.
        sqrt_decay: α/√t in place of α, as Theorem 4.1 asks and the experiments of section 6.1 do.

    Raises:
        SpecError: a value out of its range, or a sparse gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        form: str = "algorithm",
        beta_decay: float = 1.0,
        beta_decay_form: str = "paper",
        sqrt_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "form": form,
            "beta_decay": beta_decay,
            "beta_decay_form": beta_decay_form,
            "sqrt_decay": sqrt_decay,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch.

        Raises:
            SpecError: a value out of its range; nothing has been added then.
        """
        group = {**self.defaults, **param_group}
        for name, holds, allowed in (
            ("lr", group["lr"] >= 0, "a number >= 0"),
            ("betas", all(0 <= beta < 1 for beta in group["betas"]), "two numbers in [0, 1)"),
            ("eps", group["eps"] >= 0, "a number >= 0"),
            ("form", group["form"] in ("algorithm", "efficient"), "'algorithm' or 'efficient'"),
            ("beta_decay", 0 < group["beta_decay"] <= 1, "a number in (0, 1]"),
            ("beta_decay_form", group["beta_decay_form"] in ("paper", "note"), "'paper' or 'note'"),
        ):
            if not holds:
                raise SpecError(f"ClassicAdam: {name}={group[name]!r}, but it must be {allowed}.")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss, or None without a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad, group)
        return loss

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if grad.is_sparse:
            raise SpecError(
                "ClassicAdam takes no sparse gradients: use torch.optim.SparseAdam for embeddings."
            )
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        state["step"] += 1
        # a complex weight is two real ones
        w, g, m, v = (
            torch.view_as_real(x) if x.is_complex() else x
            for x in (param, grad, state["exp_avg"], state["exp_avg_sq"])
        )
        t = state["step"]
        (b1, b2), (c1, c2) = betas_at(t, group["betas"], group["beta_decay"], group["beta_decay_form"])
        m.lerp_(g, 1 - b1)
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
        alpha = float(group["lr"]) / (math.sqrt(t) if group["sqrt_decay"] else 1.0)
        if group["form"] == "efficient":
            w.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-alpha * math.sqrt(c2) / c1)
        else:
            w.addcdiv_(m, v.sqrt().div_(math.sqrt(c2)).add_(group["eps"]), value=-alpha / c1)


def betas_at(
    t: int, betas: tuple[float, float], decay: float = 1.0, form: str = "paper"
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Adam's averaging rates in step t >= 1 and the corrections by which its averages are divided: (β1, β2), (c1, c2).

    ``form="paper"``: (β1·λ^(t−1), β2) with c = 1 − β^t of the given betas. ``form="note"``: both betas times
    λ^(t−1), and c = 1 − β^t of the decayed ones.
    """
    b1, b2 = betas
    by = decay ** (t - 1)
    if form == "note":
        b1, b2 = b1 * by, b2 * by
        return (b1, b2), (1 - b1**t, 1 - b2**t)
    return (b1 * by, b2), (1 - b1**t, 1 - b2**t)

"""Muon for matrices, AdamW for everything else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, muon
from torch.optim.adamw import adamw

from steppe.core.errors import SpecError

__all__ = ["Muon"]

_ADJUST = ("match_rms_adamw", "original")


class Muon(Optimizer):
    """Momentum whose matrices are orthogonalised (Jordan et al. 2024); what is no real matrix gets AdamW.

    ``torch.optim.Muon`` takes matrices only and so no whole network; the usual remedy is a second optimizer for biases,
    norms and the like. Here both are one, so that one schedule, one ``state_dict`` and a sharpness-aware wrapper serve
    all. A matrix W of shape [n, m] (computed by torch's own functions, the Newton–Schulz iteration in bfloat16):

        B ← momentum·B + (1 − momentum)·G,  W ← W − lr·weight_decay·W − lr·s·orthogonal(B)

    with (1 − momentum)·G + momentum·B in place of B if `nesterov`.

    torch's default is s = √max(1, n/m), and there lr wants to be some ten times AdamW's. The default here is
    s = 0.2·√max(n, m), which makes a matrix's step as large as AdamW's usually is (Liu et al. 2025,
    arXiv:2502.16982, eq. 4), so that one lr serves both.

    Embeddings and output layers are matrices too, though Muon's authors leave them to AdamW: give those to an AdamW of
    their own if that matters.

    Args:
        params: tensors, named tensors or groups.
        lr: learning rate of both.
        weight_decay: decoupled, of both.
        momentum: of matrices.
        nesterov: of matrices.
        ns_steps: Newton–Schulz iterations.
        adjust_lr_fn: s: ``"match_rms_adamw"`` or ``"original"``, torch's default.
        betas: AdamW's decay rates.
        eps: AdamW's.

    Raises:
        SpecError: a value out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "betas": betas,
            "eps": eps,
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
            ("weight_decay", group["weight_decay"] >= 0, "a number >= 0"),
            ("momentum", 0 <= group["momentum"] < 1, "a number in [0, 1)"),
            ("ns_steps", 1 <= group["ns_steps"] < 100, "a whole number in [1, 99]"),
            ("adjust_lr_fn", group["adjust_lr_fn"] in _ADJUST, f"one of {', '.join(map(repr, _ADJUST))}"),
            ("betas", all(0 <= beta < 1 for beta in group["betas"]), "two numbers in [0, 1)"),
            ("eps", group["eps"] >= 0, "a number >= 0"),
        ):
            if not holds:
                raise SpecError(f"Muon: {name}={group[name]!r}, but it must be {allowed}.")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss, or None without a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [param for param in group["params"] if param.grad is not None]
            self._matrices([param for param in trained if _is_matrix(param)], group)
            self._others([param for param in trained if not _is_matrix(param)], group)
        return loss

    def _matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        muon(
            params,
            [param.grad for param in params if param.grad is not None],
            self._states(params, "momentum_buffer"),
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            ns_coefficients=(DEFAULT_A, DEFAULT_B, DEFAULT_C),
            ns_steps=group["ns_steps"],
            eps=1e-7,
            adjust_lr_fn=group["adjust_lr_fn"],
            has_complex=False,
        )

    def _others(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for param in params:
            self.state[param].setdefault("step", torch.zeros(()))
        adamw(
            params,
            [param.grad for param in params if param.grad is not None],
            self._states(params, "exp_avg"),
            self._states(params, "exp_avg_sq"),
            [],
            [self.state[param]["step"] for param in params],
            has_complex=any(param.is_complex() for param in params),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _states(self, params: list[Tensor], name: str) -> list[Tensor]:
        for param in params:
            if name not in self.state[param]:
                self.state[param][name] = torch.zeros_like(param)
        return [self.state[param][name] for param in params]


def _is_matrix(param: Tensor) -> bool:
    return param.ndim == 2 and not param.is_complex()

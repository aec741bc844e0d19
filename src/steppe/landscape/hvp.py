"""Products with the Hessian and with the generalised Gauss-Newton matrix (GGN), never the matrices themselves."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from steppe.core.errors import SpecError, unknown
from steppe.core.flat import flatten, unflatten
from steppe.landscape.point import Point

__all__ = ["Method", "Operator", "default_step", "ggn", "hessian", "hvp"]

Method = Literal["central", "autograd", "forward_over_reverse"]
Operator = Callable[[Tensor], Tensor]
Tensors = dict[str, Tensor]


def hvp(point: Point, v: Tensor, method: Method | None = None, eps: float | None = None) -> Tensor:
    """The Hessian of the point's loss times ``v [dim]``; costs two gradients.

    Args:
        point: where.
        v: direction, of any length.
        method: ``"central"``, ``(g(w + h u) - g(w - h u)) |v| / 2h`` with ``u = v / |v|``: needs nothing of the model
            but its gradient, and is the fastest for recurrent nets. ``"autograd"`` (reverse over reverse) and
            ``"forward_over_reverse"`` are exact to rounding; the latter does not take ``F.mse_loss`` in torch 2.13
            (write the squares out). Default: central for recurrent nets, else autograd.
        eps: the length h of the central difference's step in weight space; default `default_step`.

    Raises:
        SpecError: an unknown method, or `eps` for another method than central.
    """
    method = method or ("central" if point.recurrent else "autograd")
    if method not in get_args(Method):
        raise SpecError(unknown("method", method, get_args(Method)))
    if method == "central":
        return _central(point, v, eps)
    if eps is not None:
        raise SpecError(f"eps is the step of method 'central'; {method!r} has none.")
    product = _reverse_over_reverse if method == "autograd" else _forward_over_reverse
    total = torch.zeros_like(v)
    with _differentiating(point):
        params, direction = _named(point, point.theta), _named(point, v)
        for share, batch in point.chosen(None):
            loss = functools.partial(functional_call, _Call(point.model, point.loss), args=(batch,))
            total.add_(flatten(product(loss, params, direction).values()), alpha=share)
    point.charge(gradient=2.0)
    return total


def hessian(point: Point, method: Method | None = None, eps: float | None = None) -> Operator:
    """`hvp` as an operator, for `steppe.landscape.spectrum`."""
    return functools.partial(hvp, point, method=method, eps=eps)


def ggn(
    point: Point,
    outputs: Callable[[nn.Module, Any], Tensor],
    criterion: Callable[[Tensor, Any], Tensor],
) -> Operator:
    """The GGN ``Σ_b share_b J_bᵀ (∂²criterion / ∂outputs²) J_b`` as an operator; a product costs two gradients.

    It is the Hessian without the curvature of the model, and, where the criterion is a mean negative log-likelihood
    with the outputs as natural parameters (squares, cross-entropy), the Fisher information (Martens 2020, section 9.2).

    Args:
        point: where; its loss must be ``criterion(outputs(model, batch), batch)``.
        outputs: the model's outputs on a batch, any shape.
        criterion: the batch's loss as a function of them; it may couple samples, as the IC does.
    """

    def product(v: Tensor) -> Tensor:
        total = torch.zeros_like(v)
        with _differentiating(point):
            params, direction = _named(point, point.theta), _named(point, v)
            for share, batch in point.chosen(None):
                f = functools.partial(functional_call, _Call(point.model, outputs), args=(batch,))
                moved = jvp(f, (params,), (direction,))[1]
                out, pull = vjp(f, params)[:2]
                of_criterion = grad(functools.partial(_swapped, criterion, batch))
                curved = vjp(of_criterion, out)[1](moved)[0]  # symmetric
                total.add_(flatten(pull(curved)[0].values()), alpha=share)
        point.charge(gradient=2.0)
        return total

    return product


def default_step(theta: Tensor) -> float:
    """Length of the central difference's step, ``0.05 eps^(1/3) |w|`` with the machine epsilon of the weights' dtype.

    The cube root balances truncation against rounding; the length is relative to the weights because these set the
    scale on which a net bends. Random directions alone would bear a step six times longer (of 2e-2 on a GRU with
    ``|w|`` = 14), but along the sharpest eigenvectors its truncation error is 1 %; with this one, either error is below
    0.1 % in float32.
    """
    return 0.05 * torch.finfo(theta.dtype).eps ** (1 / 3) * (float(theta.norm()) or 1.0)


def _central(point: Point, v: Tensor, eps: float | None) -> Tensor:
    theta, length = point.theta, float(v.norm())
    if length == 0:
        return torch.zeros_like(v)
    step = default_step(theta) if eps is None else eps
    _, ahead = point.gradient(theta.add(v, alpha=step / length))
    _, behind = point.gradient(theta.sub(v, alpha=step / length))
    return ahead.sub_(behind).mul_(length / (2 * step))


def _reverse_over_reverse(loss: Callable[[Tensors], Tensor], params: Tensors, direction: Tensors) -> Tensors:
    def slope(params: Tensors) -> Tensor:
        gradient = grad(loss)(params)
        return torch.stack([(gradient[name] * v).sum() for name, v in direction.items()]).sum()

    return grad(slope)(params)


def _forward_over_reverse(loss: Callable[[Tensors], Tensor], params: Tensors, direction: Tensors) -> Tensors:
    return jvp(grad(loss), (params,), (direction,))[1]


class _Call(nn.Module):
    """``function(model, batch)`` as a module, so that torch.func can put other weights into the model."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Any) -> Tensor:
        return self.function(self.model, batch)


def _named(point: Point, vector: Tensor) -> Tensors:
    """Views of the vector under the names that the parameters have inside `_Call`."""
    parts = unflatten(vector, point.params)
    return {f"model.{name}": part for name, part in zip(point.names, parts, strict=True)}


def _swapped(criterion: Callable[[Tensor, Any], Tensor], batch: Any, out: Tensor) -> Tensor:
    return criterion(out, batch)


@contextmanager
def _differentiating(point: Point) -> Iterator[None]:
    # fused attention has no second derivative; torch's forward mode loads TorchScript, which torch calls deprecated
    with point.evaluating(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is", DeprecationWarning)
        yield

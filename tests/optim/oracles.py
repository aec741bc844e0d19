"""The five algorithms and two bases once more: slowly, in numpy, on one flat vector.

An oracle maps (memory, w, gradient) to the gradient that the base gets; `gradient(w)` evaluates the loss at w.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Gradient = Callable[[Array], Array]


def length(x: Array) -> float:
    return float(np.sqrt(np.sum(np.abs(x) ** 2)))


def orthogonal(x: Array, to: Array) -> Array:
    unit = to / length(to)
    return x - float(x @ unit) * unit


def sam(memory: dict, w: Array, gradient: Gradient, *, rho, adaptive=False) -> Array:
    g = gradient(w)
    t = np.abs(w) if adaptive else np.ones_like(w)
    return gradient(w + rho * t**2 * g / length(t * g))


def asam(memory: dict, w: Array, gradient: Gradient, *, rho, eta, is_weight) -> Array:
    g = gradient(w)
    t = np.where(is_weight, np.abs(w) + eta, 1.0)
    return gradient(w + rho * t**2 * g / length(t * g))


def gsam(
    memory: dict,
    w: Array,
    gradient: Gradient,
    *,
    rho,
    alpha,
    adaptive=False,
    form="code",
    minimize="perturbed",
) -> Array:
    g = gradient(w)
    e = rho * g / length(g)
    if adaptive:
        e = rho * np.abs(w) * g / length(g) if form == "paper" else rho * w**2 * g / length(w * g)
    p = gradient(w + e)
    return p - alpha * orthogonal(g, p) if minimize == "perturbed" else g + alpha * orthogonal(p, g)


def gam(
    memory: dict, w: Array, gradient: Gradient, *, rho, rho_prime, alpha, beta, gamma, form="code"
) -> Array:
    g0 = gradient(w)
    g1 = gradient(w + rho_prime * g0 / length(g0))
    b = w + rho * (g1 - g0) / length(g1 - g0)
    g2 = gradient(b)
    g3 = gradient(b + rho_prime * g2 / length(g2))
    plus = alpha * g1 + (1 - alpha) * g3
    minus = (beta if form == "paper" else 1.0) * g0 + (1 - beta) * g2
    return plus - gamma * orthogonal(minus, plus)


def friendly_sam(memory: dict, w: Array, gradient: Gradient, *, rho, sigma, lmbda, form="code") -> Array:
    g = gradient(w)
    old = memory.get("m")
    new = g if old is None else lmbda * old + (1 - lmbda) * g
    seen = new if form == "paper" else old
    d = g if seen is None else g - sigma * seen
    memory["m"] = new
    return gradient(w + rho * d / length(d)) if length(d) else gradient(w)


def sgd(memory: dict, w: Array, g: Array, *, lr, momentum, weight_decay=0.0) -> Array:
    g = g + weight_decay * w
    memory["b"] = momentum * memory["b"] + g if "b" in memory else g
    return w - lr * memory["b"]


def adamw(memory: dict, w: Array, g: Array, *, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8) -> Array:
    t = memory["t"] = memory.get("t", 0) + 1
    memory["u"] = betas[0] * memory.get("u", 0.0) + (1 - betas[0]) * g
    memory["v"] = betas[1] * memory.get("v", 0.0) + (1 - betas[1]) * g**2
    w = w - lr * weight_decay * w
    u, v = memory["u"] / (1 - betas[0] ** t), memory["v"] / (1 - betas[1] ** t)
    return w - lr * u / (np.sqrt(v) + eps)

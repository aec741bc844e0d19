"""Members that take two passes in every step once more, as in `oracles`: slowly, in numpy, on one flat vector.

What is added to the weights after the base's step, if anything, stands under "after" in the memory.
"""

from __future__ import annotations

import numpy as np

from .oracles import Array, Gradient, length


def ascent(w: Array, g: Array, rho, adaptive=False) -> Array:
    t = np.abs(w) if adaptive else np.ones_like(w)
    return rho * t**2 * g / length(t * g)


def vasso(memory: dict, w: Array, gradient: Gradient, *, rho, theta) -> Array:
    g = gradient(w)
    memory["d"] = (1 - theta) * memory["d"] + theta * g if "d" in memory else g
    return gradient(w + rho * memory["d"] / (length(memory["d"]) + 1e-7))


def wsam(memory: dict, w: Array, gradient: Gradient, *, rho, gamma, decouple, lr, adaptive=False) -> Array:
    alpha = gamma / (1 - gamma)
    g = gradient(w)
    p = gradient(w + ascent(w, g, rho, adaptive))
    if not decouple:
        return alpha * p + (1 - alpha) * g
    memory["after"] = -lr * alpha * (p - g)
    return g


def sagm(memory: dict, w: Array, gradient: Gradient, *, rho, alpha, adaptive=False) -> Array:
    g = gradient(w)
    leaning = alpha * (w**2 if adaptive else 1.0) * g
    return (g + gradient(w + ascent(w, g, rho, adaptive) - leaning)) / 2


def gnp(memory: dict, w: Array, gradient: Gradient, *, rho, alpha, normalise, adaptive=False) -> Array:
    g = gradient(w)
    p = gradient(w + ascent(w, g, rho, adaptive))
    return (1 - alpha) * (g / length(g) if normalise else g) + alpha * p


def usam(memory: dict, w: Array, gradient: Gradient, *, rho, lmbda) -> Array:
    t = memory["t"] = memory.get("t", 0) + 1
    lmbda = {"1/t": 1 / t, "1-1/t": 1 - 1 / t}.get(lmbda, lmbda)
    g = gradient(w)
    return gradient(w + rho * (1 - lmbda) * g + rho * lmbda * g / length(g))


def sam_on(
    memory: dict, w: Array, gradient: Gradient, *, rho, chosen, is_weight, adaptive=False, eta=0.01
) -> Array:
    g = np.where(chosen, gradient(w), 0.0)
    t = np.where(is_weight, np.abs(w) + eta, 1.0) if adaptive else 1.0
    return gradient(w + rho * t**2 * g / length(t * g))


def ssam(memory: dict, w: Array, gradient: Gradient, *, rho, sparsity, update_every, mask=None) -> Array:
    """`mask`: one that stays; None for the masks of largest |p|."""
    t = memory["t"] = memory.get("t", -1) + 1
    g = gradient(w)
    held = memory.get("mask", np.zeros_like(w)) if mask is None else mask
    p = gradient(w + held * rho * g / (length(g) + 1e-7))
    if mask is None and t % update_every == 0:
        kept = np.argsort(-np.abs(p))[: len(w) - int(np.ceil(len(w) * sparsity))]
        memory["mask"] = np.zeros_like(w)
        memory["mask"][kept] = 1.0
    return p

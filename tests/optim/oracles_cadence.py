"""The members that do not perturb every step once more, as in `oracles`: slowly, in numpy, on one flat vector."""

from __future__ import annotations

import numpy as np

from .oracles import Array, Gradient, length


def ascent(w: Array, g: Array, rho: float) -> Array:
    return w + rho * g / length(g)


def looksam(memory: dict, w: Array, gradient: Gradient, *, rho, k, alpha, parts=None) -> Array:
    """`parts`: the slices that have norms of their own; None for one norm over all."""
    t = memory["t"] = memory.get("t", -1) + 1
    g = gradient(w)
    slices, eps = ([slice(None)], 1e-12) if parts is None else (parts, 0.0)
    if t % k == 0:
        p = gradient(ascent(w, g, rho))
        memory["v"] = np.zeros_like(w)
        for s in slices:
            if g[s].size > 1:
                memory["v"][s] = p[s] - (g[s] @ p[s]) / (g[s] @ g[s] + eps) * g[s]
        return p
    out = g.copy()
    for s in slices:
        if g[s].size > 1:
            size = length(memory["v"][s]) + (0.0 if parts is None else 1e-8)
            out[s] += alpha * length(g[s]) / size * memory["v"][s]
    return out


def rst(memory: dict, w: Array, gradient: Gradient, *, rho, coins, gamma=1.0) -> Array:
    """`coins`: whether each step is perturbed."""
    t = memory["t"] = memory.get("t", -1) + 1
    g = gradient(w)
    return (1 - gamma) * g + gamma * gradient(ascent(w, g, rho)) if coins[t] else g


def ae_sam(memory: dict, w: Array, gradient: Gradient, *, rho, delta, lambda1, lambda2, total_steps) -> Array:
    t = memory["t"] = memory.get("t", -1) + 1
    g = gradient(w)
    size = float(np.sum(g * g))
    memory["mu"] = delta * memory.get("mu", 0.0) + (1 - delta) * size
    memory["var"] = delta * memory.get("var", 0.0) + (1 - delta) * (size - memory["mu"]) ** 2
    c = t / total_steps * lambda1 + (1 - t / total_steps) * lambda2
    fires = size >= memory["mu"] + c * memory["var"] ** 0.5
    memory.setdefault("fired", []).append(fires)
    return gradient(ascent(w, g, rho)) if fires else g


def late_sam(memory: dict, w: Array, gradient: Gradient, *, rho, total_steps, tail_frac, ramp) -> Array:
    t = memory["t"] = memory.get("t", -1) + 1
    start = round((1 - tail_frac) * total_steps)
    g = gradient(w)
    if t < start:
        return g
    return gradient(ascent(w, g, rho * min(1.0, (t - start + 1) / ramp) if ramp else rho))

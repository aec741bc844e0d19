"""The rules whose passes are their own once more: slowly, in numpy, on one flat vector, from the official codes.

A rule maps (memory, base, w, gradient) to the new w; `base` is the state of the base and its step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .oracles import Array, Gradient, length


@dataclass
class SGD:
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    v: Array | None = None

    def step(self, w: Array, g: Array) -> Array:
        g = g + self.weight_decay * w
        if self.momentum:
            self.v = g if self.v is None else self.momentum * self.v + (1 - self.dampening) * g
            g = g + self.momentum * self.v if self.nesterov else self.v
        return w - self.lr * g


@dataclass
class AdamW:
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay_last: bool = False
    v: Array | None = None
    memory: dict = field(default_factory=lambda: {"t": 0, "s": 0.0})

    def step(self, w: Array, g: Array) -> Array:
        one, two = self.betas
        t = self.memory["t"] = self.memory["t"] + 1
        self.v = (0.0 if self.v is None else one * self.v) + (1 - one) * g
        s = self.memory["s"] = two * self.memory["s"] + (1 - two) * g**2
        update = self.lr * self.v / (1 - one**t) / (np.sqrt(s / (1 - two**t)) + self.eps)
        kept = 1 - self.lr * self.weight_decay
        return (w - update) * kept if self.decay_last else w * kept - update


Base = SGD | AdamW


def cr_sam(memory: dict, base: Base, w: Array, gradient: Gradient, *, rho, gamma, beta) -> Array:
    g = gradient(w)
    e = rho * g / length(g)
    worst, best = gradient(w + e), gradient(w - e)
    return base.step(w, worst + gamma * (worst + best - 2 * g) + beta * (worst - best))


def lookbehind(
    memory: dict, base: Base, w: Array, gradient: Gradient, *, rho, k, alpha, sizes: list[int]
) -> Array:
    fast = perturbed = w
    for number in range(k):
        g = gradient(perturbed)
        perturbed = perturbed + rho * g / length(g)
        fast = base.step(fast, gradient(perturbed))
        if number == 0:
            first = fast
    if alpha != -1:
        return alpha * fast + (1 - alpha) * w
    ends = np.cumsum(sizes)
    pieces = []
    for a, b in zip(ends - sizes, ends, strict=True):
        x, y = (first - w)[a:b], (fast - w)[a:b]
        share = (x @ y / (length(x) * length(y)) + 1) / 2
        pieces.append(share * fast[a:b] + (1 - share) * w[a:b])
    return np.concatenate(pieces)


def sampa(memory: dict, base: Base, w: Array, gradient: Gradient, *, rho, lmbda) -> Array:
    """As the official script has it, with the previous batch's gradient function in the memory."""
    d, earlier = memory.get("d", np.zeros_like(w)), memory.get("gradient", gradient)
    ahead = earlier(w + rho * d / (length(d) + 1e-12))
    y = w - base.lr * d
    if isinstance(base, SGD) and base.v is not None:
        y = w - base.lr * (d + base.weight_decay * w + base.momentum * base.v)
    memory["d"], memory["gradient"] = gradient(y), gradient
    return base.step(w, (1 - lmbda) * ahead + lmbda * memory["d"])


def msam(memory: dict, base: Base, w: Array, gradient: Gradient, *, rho, form="code") -> Array:
    """As the official optimizers have it: the stored weights are the perturbed ones, here in the memory."""
    decay = base.weight_decay
    stored = memory.get("stored", w)
    g = gradient(stored)
    if form == "code" and isinstance(base, SGD):
        g, base.weight_decay = g + decay * stored, 0.0
    base.decay_last = form == "code"
    clean = stored if base.v is None else stored + rho * base.v / length(base.v)
    clean = base.step(clean, g)
    base.weight_decay = decay
    memory["stored"] = clean - rho * base.v / length(base.v)
    return clean

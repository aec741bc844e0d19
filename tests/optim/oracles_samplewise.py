"""The rules that look at single samples or outputs, once more: slowly, in numpy, with a network of their own.

An oracle maps (net, w, x, y) to the gradient that the base gets.
"""

from __future__ import annotations

import numpy as np

from .oracles import Array, length


class Net:
    """y = W2 · tanh(W1 · x + b1) + b2 on one flat vector, by hand; torch's order and layout of weights."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        self.shapes = [(hidden, inputs), (hidden,), (outputs, hidden), (outputs,)]
        self.sizes = [int(np.prod(shape)) for shape in self.shapes]

    def split(self, w: Array) -> list[Array]:
        ends = np.cumsum(self.sizes)[:-1]
        return [piece.reshape(shape) for piece, shape in zip(np.split(w, ends), self.shapes, strict=True)]

    def outputs(self, w: Array, x: Array) -> Array:
        w1, b1, w2, b2 = self.split(w)
        return np.tanh(x @ w1.T + b1) @ w2.T + b2

    def losses(self, w: Array, x: Array, y: Array) -> Array:
        return ((self.outputs(w, x) - y) ** 2).sum(axis=1)

    def pull(self, w: Array, x: Array, slopes: Array) -> Array:
        """J(w)ᵀ · slopes, for slopes [samples, outputs]."""
        w1, b1, w2, _ = self.split(w)
        h = np.tanh(x @ w1.T + b1)
        back = (slopes @ w2) * (1 - h**2)
        pieces = [back.T @ x, back.sum(axis=0), slopes.T @ h, slopes.sum(axis=0)]
        return np.concatenate([piece.reshape(-1) for piece in pieces])

    def slopes(self, w: Array, x: Array, y: Array, weights: Array) -> Array:
        return 2 * (self.outputs(w, x) - y) * weights[:, None]

    def gradient(self, w: Array, x: Array, y: Array, weights: Array) -> Array:
        """Of Σ weights_i · losses_i."""
        return self.pull(w, x, self.slopes(w, x, y, weights))

    def of_tensors(self, values) -> Array:
        """One number per tensor -> one per weight."""
        return np.repeat(np.asarray(values, dtype=float), self.sizes)


def kept_by_esam(rise: Array, gamma: float, form: str) -> Array:
    """By sorting: the k − 1 (code) or k (paper) largest, ties at the cut out or in; never none."""
    ordered = sorted(rise, reverse=True)
    cut = ordered[max(1, int(gamma * len(rise))) - 1]
    above = np.array([each > cut for each in rise])
    at = np.array([each >= cut for each in rise])
    return above if form == "code" and above.any() else at


def esam(net: Net, w, x, y, *, rho, beta, gamma, active, adaptive=False, form="code") -> Array:
    n = len(x)
    even = np.full(n, 1 / n)
    g = net.gradient(w, x, y, even) * net.of_tensors(active)
    t = np.abs(w) if adaptive else np.ones_like(w)
    moved = w + rho / beta * t**2 * g / (length(t * g) + 1e-7)
    kept = np.ones(n, dtype=bool)
    if gamma < 0.99:
        kept = kept_by_esam(net.losses(moved, x, y) - net.losses(w, x, y), gamma, form)
    return net.gradient(moved, x, y, kept / kept.sum())


def imbsam(net: Net, w, x, y, *, tail, rho, tail_weight) -> Array:
    n = len(x)
    of_tail, of_head = tail_weight * tail / n, (~tail) / n
    g = net.gradient(w, x, y, of_tail)
    moved = w + rho * g / (length(g) + 1e-16)
    return net.gradient(w, x, y, of_head) + net.gradient(moved, x, y, of_tail)


def functional_sam(net: Net, w, x, y, *, rho, adaptive=False) -> Array:
    slopes = net.slopes(w, x, y, np.full(len(x), 1 / len(x)))
    g = net.pull(w, x, slopes)
    t = np.abs(w) if adaptive else np.ones_like(w)
    return net.pull(w + rho * t**2 * g / length(t * g), x, slopes)

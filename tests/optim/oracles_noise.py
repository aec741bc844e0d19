"""RWP and bSAM once more: slowly, in numpy, one tensor and one row after the other, with given random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .oracles import Array, Gradient, length


def filter_noise(w: Array, z: Array, shapes: Sequence[tuple[int, ...]], gamma: float) -> Array:
    r, start = np.zeros_like(w), 0
    for shape in shapes:
        size = int(np.prod(shape))
        values, numbers = (x[start : start + size].reshape(shape) for x in (w, z))
        noise = np.zeros(shape)
        if len(shape) > 1:
            for i in range(shape[0]):
                noise[i] = gamma * length(values[i].reshape(-1)) * numbers[i]
        else:
            noise[...] = gamma * (length(values.reshape(-1)) + 1e-16) * numbers
        r[start : start + size] = noise.reshape(-1)
        start += size
    return r


def rwp(w: Array, z: Array, first: Gradient, second: Gradient, *, shapes, gamma, alpha) -> Array:
    """`first` and `second` are the gradients on the two batches."""
    return (1 - alpha) * first(w) + alpha * second(w + filter_noise(w, z, shapes, gamma))


def bsam(
    memory: dict, w: Array, gradients: Sequence[Gradient], zs: Sequence[Array], *, lr, betas, rho, weight_decay,
    damping, s_init, data_size,
) -> Array:  # fmt: skip
    """The new weights; one gradient and one z for each part of the batch."""
    m, s = memory.get("m", np.zeros_like(w)), memory.get("s", np.full_like(w, s_init))
    h, p = np.zeros_like(w), np.zeros_like(w)
    for gradient, z in zip(gradients, zs, strict=True):
        g = gradient(w + z / np.sqrt(data_size * s))
        h += np.sqrt(s * g**2) / len(gradients)
        p += gradient(w + rho * g / s) / len(gradients)
    memory["m"] = betas[0] * m + (1 - betas[0]) * (p + weight_decay * w)
    memory["s"] = betas[1] * s + (1 - betas[1]) * (h + damping + weight_decay)
    return w - lr * memory["m"] / s

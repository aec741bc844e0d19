"""What the base optimizer is given: combinations of the gradients that the passes found."""

from __future__ import annotations

from collections.abc import Sequence

from steppe.optim.sharpness.ascent import EPS
from steppe.optim.sharpness.vectors import TINY, Vector, combine, cosine, sum_of_directions

__all__ = ["minus_orthogonal", "projection", "surrogate_gap"]


def projection(x: Vector, onto: Vector) -> float:
    """The k for which k · onto is the projection of x on `onto`: cos · ‖x‖ / ‖onto‖."""
    return _projection(x.norm, onto.norm, cosine(x, onto))


def _projection(x: float, onto: float, cos: float) -> float:
    product = x * onto
    return cos * product / (product + EPS) * x / (onto + EPS)


def minus_orthogonal(main: Vector, other: Vector, gamma: Sequence[float]) -> Vector:
    """main − gamma · (the part of other orthogonal to main), one gamma per bucket, written over main.

    A combination of the two, (1 + gamma k) main − gamma other with k main the projection of other: no third vector,
    not even for the inner product if `other` is disposable.
    """
    if not other.disposable or min(main.norm, other.norm) < TINY:
        k = projection(other, main)
        return combine(main, [1 + each * k for each in gamma], other, [-each for each in gamma])
    total, size, cos = sum_of_directions(other, main)  # other = ‖other‖ (total / size − main / ‖main‖)
    k = _projection(other.norm, main.norm, cos) + other.norm / main.norm
    return combine(
        main, [1 + each * k for each in gamma], total, [-each * other.norm / size for each in gamma]
    )


def surrogate_gap(g: Vector, p: Vector, alpha: Sequence[float], clean: Sequence[bool]) -> Vector:
    """p − alpha · g⊥p, or where `clean` g + alpha · p⊥g, written over p; a⊥b is the part of a orthogonal to b.

    Args:
        g: gradient at the weights.
        p: gradient at the perturbed weights.
        alpha: weight of the surrogate gap, one per bucket.
        clean: which of the two forms, one per bucket.
    """
    if not any(clean):
        return minus_orthogonal(p, g, alpha)
    g.disposable = False  # both projections need it
    along_p, along_g = projection(g, p), projection(p, g)
    of_p = [a if c else 1 + a * along_p for a, c in zip(alpha, clean, strict=True)]
    of_g = [1 - a * along_g if c else -a for a, c in zip(alpha, clean, strict=True)]
    return combine(p, of_p, g, of_g)

"""Ranks and correlations by counting, one date at a time."""

import numpy as np

NAN = float("nan")


def slow_ranks(values):
    """Average ranks by counting."""
    return [sum(b < a for b in values) + (1 + sum(b == a for b in values)) / 2 for a in values]


def slow_pearson(x, y):
    if len(x) < 2 or len(set(x)) == 1 or len(set(y)) == 1:
        return NAN
    mx, my = sum(x) / len(x), sum(y) / len(y)
    sxy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return sxy / (sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y)) ** 0.5


def slow_rank_ic(x, y):
    return slow_pearson(slow_ranks(x), slow_ranks(y))


def in_both(x, y):
    pairs = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if np.isfinite(a) and np.isfinite(b)]
    return [a for a, _ in pairs], [b for _, b in pairs]

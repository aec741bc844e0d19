"""Is one optimizer better than another, or is it chance? Intervals, corrected p-values and plain sentences.

What is compared is a score per seed and date, ``[seeds, dates]`` (a RankIC series, a return series), or one
number per seed, ``[seeds, 1]``. Runs are paired: same seed, same date, so only the differences count. Seeds
and dates are both samples of something larger, and they are crossed, not nested (every seed meets the same
market):

    difference[s, t] = mean + seed effect[s] + date effect[t] + rest.

A bootstrap draw of the mean's error is the sum of two independent parts:

- dates: the stationary bootstrap of Politis and Romano (1994), doi:10.1080/01621459.1994.10476870, of the
  series averaged over seeds; its blocks keep the serial correlation that overlapping labels bring. The
  draws are widened as Student's t is, for the n / block pieces they rest on.
- seeds: deviations of the seed means with Gaussian multipliers, over an independent chi: given the data
  this is Student's t with S - 1 degrees of freedom. Seeds are few, and resampling two or three of them
  would claim far too much: intervals called 95 % would cover about 60 % with two seeds.

The rest's variance enters both parts, so with several seeds the intervals err on the wide side. With one
seed only dates are resampled, and the sentence says what that leaves out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "FEWEST",
    "Association",
    "Comparison",
    "Estimate",
    "compare",
    "compare_all",
    "default_block",
    "estimate",
    "holm",
    "kendall",
    "verdict",
]

Floats = NDArray[np.float64]

_CHUNK = 2**22
"""Index entries held at once: long series and many draws stay within some tens of megabytes."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: the mean over seeds and dates.
        low, high: basic bootstrap interval at ``level``; NaN if there is nothing to resample.
        p: two-sided p-value of a mean of zero; the interval excludes zero where ``p < 1 - level``.
        n_seeds, n_dates: what it rests on, after dates with missing values were left out.
        block: mean block length of the date bootstrap, in dates.
        level: the nominal coverage.
    """

    mean: float
    low: float
    high: float
    p: float
    n_seeds: int
    n_dates: int
    block: float
    level: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Candidate minus baseline, paired by seed and date.

    Attributes:
        difference: mean of candidate minus baseline; above zero means that the candidate is higher.
        low, high: interval of the difference, not corrected for the number of comparisons.
        p: two-sided p-value of no difference; p_holm: after Holm's correction over the family compared.
        n_comparisons: size of that family.
        n_seeds, n_dates: paired seeds and dates.
        level: nominal coverage of the interval; 1 - level is the level of the test.
    """

    baseline: str
    candidate: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    n_comparisons: int
    n_seeds: int
    n_dates: int
    level: float

    @property
    def shown(self) -> bool:
        """Whether the difference can be told from chance, after the correction."""
        return self.p_holm < 1 - self.level


@dataclass(frozen=True, slots=True)
class Association:
    """Whether two numbers per trial rise together.

    Attributes:
        tau: Kendall's tau-b; NaN where either number is the same throughout.
        low, high: percentile bootstrap interval at ``level``, over trials; NaN for fewer than `FEWEST` trials, and for
            a perfect order: each resample of it is perfect too, so that the interval would claim a certainty of 1.
        p: two-sided p-value of no association, from permutations; NaN for fewer than `FEWEST` trials.
        n: trials with both numbers.
        level: the nominal coverage.
    """

    tau: float
    low: float
    high: float
    p: float
    n: int
    level: float


FEWEST = 5
"""Trials below which resampling says nothing: even with five the interval of a strong association is too narrow
(coverage about 0.8; with eight, and wherever the association is moderate, it keeps its 0.95), and with four even a
perfect order has p = 2 / 4! = 0.083."""

_ORDERS = 10_000
"""Permutations that are all gone through, for up to seven trials; for more they are drawn."""


def default_block(n_dates: int) -> float:
    """Mean block length ``n^(1/3)``, at least 2 (ten-day labels every five days overlap)."""
    return float(max(2, math.ceil(n_dates ** (1 / 3))))


def estimate(
    values: ArrayLike,
    *,
    block: float | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Mean, interval and p-value of ``values [seeds, dates]`` (or ``[dates]``: one seed).

    Dates on which any seed lacks a finite value are left out. The same arguments give the same numbers;
    negated values give the negated numbers.

    Args:
        block: mean block length in dates; `default_block` if None, 1 for independent dates.
        draws: bootstrap draws; the smallest p-value is 2 / (draws + 1).
        seed: of the draws.

    Raises:
        ValueError: not one or two dimensions, or no date is complete.
    """
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if table.ndim != 2:
        raise ValueError(f"values must be [seeds, dates], got shape {table.shape}.")
    table = table[:, np.isfinite(table).all(axis=0)]
    n_seeds, n_dates = table.shape
    if not n_dates or not n_seeds:
        raise ValueError("there is no date on which every seed has a finite value.")
    length = min(default_block(n_dates) if block is None else float(block), n_dates)
    mean = float(table.mean())
    if n_seeds == 1 and n_dates == 1:
        return Estimate(mean, math.nan, math.nan, math.nan, 1, 1, length, level)
    rng = np.random.default_rng(seed)
    errors = _date_errors(table.mean(axis=0), length, draws, rng)
    errors += _seed_errors(table.mean(axis=1), draws, rng)
    tail = (1 - level) / 2
    low, high = np.quantile(errors, [tail, 1 - tail])
    beyond = min(int(np.sum(errors >= mean)), int(np.sum(errors <= mean)))
    p = min(1.0, 2 * (beyond + 1) / (draws + 1))
    return Estimate(mean, mean - float(high), mean - float(low), p, n_seeds, n_dates, length, level)


def compare(
    baseline: ArrayLike,
    candidate: ArrayLike,
    *,
    names: tuple[str, str] = ("baseline", "candidate"),
    block: float | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two optimizers on scores ``[seeds, dates]`` whose rows and columns belong together.

    Swapping the two negates the difference and its interval. Arguments are those of `estimate`.
    """
    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired scores need equal shapes, got {a.shape} and {b.shape}.")
    e = estimate(b - a, block=block, level=level, draws=draws, seed=seed)
    return Comparison(*names, e.mean, e.low, e.high, e.p, e.p, 1, e.n_seeds, e.n_dates, level)


def compare_all(
    baseline: str,
    pairs: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    block: float | None = None,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> list[Comparison]:
    """Compare each candidate with the baseline and correct the p-values together (Holm).

    Args:
        pairs: candidate -> (baseline's scores, candidate's scores) on the seeds and dates both have.
    """
    family = [
        compare(a, b, names=(baseline, name), block=block, level=level, draws=draws, seed=seed)
        for name, (a, b) in pairs.items()
    ]
    corrected = holm([comparison.p for comparison in family])
    return [
        replace(comparison, p_holm=float(p), n_comparisons=len(family))
        for comparison, p in zip(family, corrected, strict=True)
    ]


def kendall(
    x: ArrayLike, y: ArrayLike, *, level: float = 0.95, draws: int = 2_000, seed: int = 0
) -> Association:
    """Kendall's rank correlation tau-b of ``x [trials]`` and ``y [trials]`` (Kendall 1945, ties corrected for).

    Trials that lack a finite number of the two are left out. The trials are taken as independent; those that share a
    seed or an optimizer are not quite, so that the interval errs on the narrow side.

    The p-value is exact for up to seven trials: the share of all ``n!`` orders whose tau is at least as far from 0.

    Args:
        draws: of the bootstrap, and of the permutations of more trials, whose smallest p-value is 1 / (draws + 1).
        seed: of the draws.

    Raises:
        ValueError: not two series of equal length.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"need two series of equal length, got shapes {a.shape} and {b.shape}.")
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    n = len(a)
    tau = float(_tau(a[None], b[None])[0])
    if n < FEWEST or math.isnan(tau):
        return Association(tau, math.nan, math.nan, math.nan, n, level)
    rng = np.random.default_rng(seed)
    exact = math.factorial(n) <= _ORDERS
    again: list[Floats] = []
    by_chance: list[Floats] = []
    rows = max(1, _CHUNK // n**2)
    for first in range(0, draws, rows):
        count = min(rows, draws - first)
        resampled = rng.integers(n, size=(count, n))
        again.append(_tau(a[resampled], b[resampled]))
        if not exact:
            shuffled = rng.permuted(np.broadcast_to(b, (count, n)), axis=1)
            by_chance.append(_tau(np.broadcast_to(a, (count, n)), shuffled))
    if exact:
        orders = np.array(list(itertools.permutations(range(n))))
        by_chance.append(_tau(np.broadcast_to(a, orders.shape), b[orders]))
    tail = (1 - level) / 2
    low, high = np.nanquantile(np.concatenate(again), [tail, 1 - tail])  # a draw of one trial only has no tau
    if low == high:
        low = high = math.nan
    beyond = np.abs(np.concatenate(by_chance)) >= abs(tau) - 1e-12
    # of drawn orders the one that was found counts as one more
    p = float(beyond.mean()) if exact else (int(beyond.sum()) + 1) / (draws + 1)
    return Association(tau, float(low), float(high), p, n, level)


def holm(p: Sequence[float]) -> Floats:
    """Step-down corrected p-values of Holm (1979), in the order given; NaN stays NaN and is not counted."""
    values = np.asarray(p, dtype=np.float64)
    corrected = np.full(values.shape, np.nan)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known], kind="stable")]
    steps = values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def verdict(comparison: Comparison, metric: str, digits: int = 4) -> str:
    """One or two plain sentences: what the comparison shows, or that it shows nothing.

    Args:
        metric: name of a score of which more is better, such as ``"RankIC"``.
        digits: decimals of the difference.
    """
    c = comparison
    seeds = f"{c.n_seeds} seed{'s' * (c.n_seeds != 1)}"
    basis = f"{seeds} and {c.n_dates} dates" if c.n_dates > 1 else seeds
    if math.isnan(c.p):
        return (
            f"{c.candidate} and {c.baseline} differ by {_signed(c.difference, digits)} in {metric}; "
            "one number each says nothing about chance. Run more seeds."
        )
    if c.difference == c.low == c.high == 0:
        return f"{c.candidate} and {c.baseline} are tied: their {metric} is the same throughout ({basis})."
    p = f"{p_text(c.p_holm)} after Holm" if c.n_comparisons > 1 else p_text(c.p)
    if not c.shown:
        text = (
            f"No difference in {metric} between {c.candidate} and {c.baseline} can be shown with {basis}: "
            f"{_signed(c.difference, digits)} [{_signed(c.low, digits)}, {_signed(c.high, digits)}] ({p})."
        )
    else:
        verb, sign = ("beats", 1) if c.difference > 0 else ("trails", -1)
        size, bounds = abs(c.difference), sorted((sign * c.low, sign * c.high))
        text = (
            f"{c.candidate} {verb} {c.baseline} on {metric} by {size:.{digits}f} "
            f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}] ({p}; {basis})."
        )
    return text + (" Seed-to-seed variation is not measured." if c.n_seeds == 1 else "")


def p_text(p: float) -> str:
    """``p = 0.03`` with two significant digits, ``p < 0.001`` below that."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.2g}" if p < 0.995 else "p = 1"


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _date_errors(series: Floats, block: float, draws: int, rng: np.random.Generator) -> Floats:
    """Errors of the mean of ``series [dates]`` under the stationary bootstrap, ``[draws]``."""
    n = len(series)
    if n == 1:
        return np.zeros(draws)
    centred = series - series.mean()
    errors = np.empty(draws)
    rows = max(1, _CHUNK // n)
    for first in range(0, draws, rows):
        last = min(first + rows, draws)
        errors[first:last] = centred[_stationary_indices(n, block, last - first, rng)].mean(axis=1)
    # about n / block independent pieces: the variance among so few is itself uncertain, as in Student's t
    pieces = max(n / block - 1, 1.0)
    return errors * math.sqrt(n / (n - 1)) / np.sqrt(rng.chisquare(pieces, draws) / pieces)


def _stationary_indices(n: int, block: float, draws: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Resampled positions ``[draws, n]``: blocks of geometric length, mean ``block``, on a circle."""
    position = np.arange(n)
    begins = rng.random((draws, n)) < 1 / block
    begins[:, 0] = True
    begin = np.maximum.accumulate(np.where(begins, position, 0), axis=1)
    start = rng.integers(n, size=(draws, n))
    return (np.take_along_axis(start, begin, axis=1) + position - begin) % n


def _seed_errors(means: Floats, draws: int, rng: np.random.Generator) -> Floats:
    """Errors of the mean of ``means [seeds]`` as multiplier draws ``[draws]``; zero for one seed."""
    n = len(means)
    if n == 1:
        return np.zeros(draws)
    deviations = (means - means.mean()) / math.sqrt(n * (n - 1))
    normal: Floats = rng.standard_normal((draws, n)) @ deviations
    return normal / np.sqrt(rng.chisquare(n - 1, draws) / (n - 1))


def _tau(x: Floats, y: Floats) -> Floats:
    """tau-b of each row ``[rows, trials]``; NaN where a row does not vary."""
    left, right = np.triu_indices(x.shape[1], 1)
    dx, dy = np.sign(x[:, left] - x[:, right]), np.sign(y[:, left] - y[:, right])
    scale = np.sqrt((dx * dx).sum(axis=1) * (dy * dy).sum(axis=1))
    return np.divide((dx * dy).sum(axis=1), scale, out=np.full(len(x), np.nan), where=scale > 0)

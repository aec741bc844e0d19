from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from steppe.study.statistics import compare, compare_all, default_block, estimate, holm, verdict

FINITE = st.floats(-1, 1, allow_subnormal=False).map(lambda x: round(x, 6))
TABLES = arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 30)), elements=FINITE)


def autoregressive(phi: float, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal((*shape[:-1], shape[-1] + 30))
    series = np.zeros_like(noise)
    for t in range(1, noise.shape[-1]):
        series[..., t] = phi * series[..., t - 1] + noise[..., t]
    return series[..., 30:]


def coverage(tables: np.ndarray, **options: float) -> float:
    estimates = [estimate(table, draws=500, **options) for table in tables]  # type: ignore[arg-type]
    return float(np.mean([e.low <= 0 <= e.high for e in estimates]))


@pytest.mark.parametrize(("phi", "least"), [(0.0, 0.91), (0.3, 0.87)])
def test_dates_interval_covers(phi: float, least: float) -> None:
    # nominal 0.95; 1500 series gave 0.953 (phi 0) and 0.913 (phi 0.3); the slack is Monte-Carlo error of 400
    tables = autoregressive(phi, (400, 1, 48), np.random.default_rng(1))
    assert least <= coverage(tables) <= 0.99


def test_blocks_are_needed_when_labels_overlap() -> None:
    noise = np.random.default_rng(2).standard_normal((400, 1, 49))
    overlapping = noise[..., 1:] + noise[..., :-1]  # ten-day labels every five days
    assert coverage(overlapping, block=1.0) < 0.88 < coverage(overlapping)


@pytest.mark.parametrize("n_seeds", [2, 3, 6])
def test_seed_effects_are_covered_with_few_seeds(n_seeds: int) -> None:
    rng = np.random.default_rng(n_seeds)
    tables = rng.standard_normal((300, n_seeds, 1)) + 0.3 * rng.standard_normal((300, n_seeds, 40))
    assert 0.91 <= coverage(tables) <= 0.995


def test_one_seed_leaves_seed_variation_out() -> None:
    rng = np.random.default_rng(3)
    tables = rng.standard_normal((200, 1, 1)) + 0.3 * rng.standard_normal((200, 1, 40))
    assert coverage(tables) < 0.5


def test_pairing_narrows() -> None:
    rng = np.random.default_rng(4)
    market = rng.standard_normal((1, 48))
    a, b = market + 0.1 * rng.standard_normal((2, 3, 48))
    paired = compare(a, b)
    unpaired = compare(a, b[:, rng.permutation(48)])
    assert paired.high - paired.low < 0.3 * (unpaired.high - unpaired.low)


def test_interval_scales_with_the_data_and_the_level() -> None:
    table = np.random.default_rng(5).standard_normal((3, 60))
    base, double = estimate(table), estimate(2 * table)
    assert double.high - double.low == pytest.approx(2 * (base.high - base.low))
    assert estimate(table, level=0.8).high < base.high
    shifted = estimate(table + 7)
    assert (shifted.low, shifted.high) == pytest.approx((base.low + 7, base.high + 7))


@settings(max_examples=30, deadline=None)
@given(TABLES, st.integers(0, 3))
def test_swapping_negates(table: np.ndarray, seed: int) -> None:
    other = np.roll(table, 1, axis=1)
    forth = compare(table, other, draws=200, seed=seed)
    back = compare(other, table, draws=200, seed=seed)
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-forth.difference, -forth.high, -forth.low), abs=1e-12
    )
    assert back.p == forth.p


@settings(max_examples=30, deadline=None)
@given(TABLES, st.integers(0, 3))
def test_interval_holds_the_mean_and_agrees_with_p(table: np.ndarray, seed: int) -> None:
    e = estimate(table, draws=400, seed=seed)
    assert e == estimate(table, draws=400, seed=seed)
    assert 0 < e.p <= 1
    if e.p < 0.04:  # at the edge the two differ by the resolution of the draws
        assert e.low > 0 or e.high < 0
    if e.p > 0.06:
        assert e.low <= 1e-12
        assert e.high >= -1e-12


def test_holm_by_hand() -> None:
    # sorted: .005 x 4, .01 x 3, .03 x 2, .04 x 1 (raised to the step before)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert np.isnan(holm([math.nan, 0.01])[0])
    assert holm([math.nan, 0.01])[1] == 0.01
    assert holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_properties(p: list[float]) -> None:
    corrected = holm(p)
    assert np.all(corrected >= np.asarray(p))
    assert np.all(corrected <= np.minimum(1, np.asarray(p) * len(p)))
    assert np.all(np.diff(corrected[np.argsort(p, kind="stable")]) >= 0)


def test_missing_dates_are_left_out_of_both() -> None:
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((2, 2, 20))
    a[0, 3] = np.nan
    b[1, 7] = np.inf
    comparison = compare(a, b)
    kept = [t for t in range(20) if t not in (3, 7)]
    assert comparison.n_dates == 18
    assert comparison.difference == pytest.approx((b - a)[:, kept].mean())


def test_input_errors() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        compare([[1.0, 2.0]], [[1.0]])
    with pytest.raises(ValueError, match="no date"):
        estimate([[math.nan, 1.0], [1.0, math.nan]])
    with pytest.raises(ValueError, match=r"\[seeds, dates\]"):
        estimate(np.zeros((1, 2, 3)))


def test_default_block() -> None:
    assert [default_block(n) for n in (2, 48, 400)] == [2, 4, 8]


def test_long_series_are_drawn_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(7).standard_normal((1, 50))
    whole = estimate(table)
    monkeypatch.setattr("steppe.study.statistics._CHUNK", 50 * 700)
    chunked = estimate(table)
    assert chunked.low == pytest.approx(whole.low, rel=0.1)


def family() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(8)
    base = rng.standard_normal((3, 48))
    noise = 0.1 * rng.standard_normal((3, 3, 48))
    return {
        "GSAM": (base, base + 0.2 + noise[0]),
        "SAM": (base, base + noise[1]),
        "ASAM": (base, base - 0.2 + noise[2]),
        "copy": (base, base.copy()),
    }


def test_compare_all_corrects_the_family() -> None:
    comparisons = {c.candidate: c for c in compare_all("AdamW", family())}
    assert [c.shown for c in comparisons.values()] == [True, False, True, False]
    assert list(holm([c.p for c in comparisons.values()])) == [c.p_holm for c in comparisons.values()]
    assert all(c.n_comparisons == 4 for c in comparisons.values())


def test_verdicts() -> None:
    gsam, sam, asam, copy = (verdict(c, "RankIC") for c in compare_all("AdamW", family()))
    assert gsam.startswith("GSAM beats AdamW on RankIC by 0.2")
    assert "after Holm; 3 seeds and 48 dates" in gsam
    assert sam.startswith(
        "No difference in RankIC between SAM and AdamW can be shown with 3 seeds and 48 dates: "
    )
    assert asam.startswith("ASAM trails AdamW on RankIC by 0.1882 [0.16")
    assert copy == "copy and AdamW are tied: their RankIC is the same throughout (3 seeds and 48 dates)."
    one = compare(np.zeros(48), np.random.default_rng(9).standard_normal(48), names=("AdamW", "SAM"))
    assert "1 seed and 48 dates" in verdict(one, "RankIC")
    assert verdict(one, "RankIC").endswith("Seed-to-seed variation is not measured.")
    assert "Holm" not in verdict(one, "RankIC")
    lonely = compare([[0.1]], [[0.2]])
    assert "says nothing about chance" in verdict(lonely, "accuracy")
    per_seed = compare(np.zeros((4, 1)), np.ones((4, 1)) + 0.01 * np.arange(4)[:, None])
    assert verdict(per_seed, "accuracy").endswith("4 seeds).")

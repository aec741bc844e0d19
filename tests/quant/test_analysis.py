import numpy as np
import polars as pl
import pytest
import torch

from steppe.quant.analysis import NO_MODEL, analyse, blend, no_model
from steppe.quant.factor_test import factor_test

TABLES = {"ic", "layers", "decay", "factor", "factor_yearly", "scores"}
FUNDS = {"fund", "fund_daily", "fund_yearly", "fund_rebalances"}
ROWS = np.arange(300, 500, 5)


def scored(panel, seed):
    """Random scores of both parts, of the stocks that trade."""
    g = torch.Generator().manual_seed(seed)
    off = ~torch.from_numpy(np.asarray(panel.traded[ROWS]))
    return {
        part: torch.randn(off.shape, generator=g).masked_fill(off, torch.nan) for part in ("daily", "weekly")
    }


@pytest.fixture(scope="module")
def trained(small_market):
    keys = [("adamw", 0), ("adamw", 1), ("sam", 0), ("gam", 0), ("gam", 1)]
    return {key: scored(small_market, n) for n, key in enumerate(keys)}


@pytest.fixture(scope="module")
def reference(small_market):
    close = np.asarray(small_market.field("close"))
    return no_model(close, ROWS, np.asarray(small_market.traded[ROWS]))


@pytest.fixture(scope="module")
def analysis(small_market, trained, reference):
    index = next(iter(small_market.members))
    return analyse(small_market, ROWS, trained, reference, indices=(index,))


def keys(table, *columns):
    return set(table.select("optimizer", "seed", *columns).unique().iter_rows())


def test_every_score_is_in_every_factor_table(analysis):
    assert analysis.tables.keys() == TABLES | FUNDS
    single = {
        (optimizer, seed, part)
        for optimizer, seed in (("adamw", 0), ("adamw", 1), ("sam", 0), ("gam", 0), ("gam", 1))
        for part in ("daily", "weekly", "blend")
    }
    # an average needs two seeds
    averaged = {(optimizer, None, "blend") for optimizer in ("adamw", "gam", NO_MODEL)}
    for name in TABLES - {"scores"}:
        assert keys(analysis.tables[name], "part") == single | averaged
        assert analysis.tables[name].schema["seed"] == pl.Int64


def test_only_blends_become_funds(analysis, small_market):
    index = next(iter(small_market.members))
    expected = {("adamw", 0), ("adamw", 1), ("sam", 0), ("gam", 0), ("gam", 1)}
    expected |= {("adamw", None), ("gam", None), (NO_MODEL, None)}
    for name in FUNDS:
        assert keys(analysis.tables[name], "index") == {(*key, index) for key in expected}
    assert analysis.facts["fund"]["indices"] == {index: {"weights": "data", "benchmark": "price index"}}
    daily = analysis.tables["fund_daily"]
    assert daily["ret"].is_finite().all()
    # all funds on an index are measured by the same benchmark
    assert daily.group_by("date").agg(pl.col("benchmark").n_unique())["benchmark"].max() == 1


def test_one_tester_for_all_gives_what_each_test_alone_would(analysis, trained, small_market):
    alone = factor_test(trained["sam", 0]["weekly"].numpy(), small_market, ROWS)
    ours = analysis.tables["ic"].filter(optimizer="sam", part="weekly").drop("optimizer", "seed", "part")
    assert ours.equals(alone.ic)


def test_stored_scores_are_averaged_over_seeds(analysis, trained, small_market):
    stored = analysis.tables["scores"]
    assert set(stored["optimizer"]) == {"adamw", "sam", "gam", NO_MODEL}
    blends = [blend(list(trained["gam", seed].values())) for seed in (0, 1)]
    z = np.stack([b.numpy() for b in blends])
    z = (z - np.nanmean(z, axis=2, keepdims=True)) / np.nanstd(z, axis=2, keepdims=True)
    date, stock = np.nonzero(np.isfinite(z).all(axis=0))
    own = stored.filter(optimizer="gam").sort("date", "symbol")
    names = np.asarray(small_market.symbols)[stock]
    order = np.lexsort((names, small_market.dates[ROWS][date]))
    assert own["symbol"].to_list() == names[order].tolist()
    assert np.allclose(own["score"], z.mean(axis=0)[date, stock][order], atol=1e-5)


def test_without_trained_scores_there_is_nothing_to_say(small_market, reference):
    assert analyse(small_market, ROWS, {}, reference) == ({}, {})


def test_without_indices_there_are_no_funds(small_market, trained, reference):
    found = analyse(small_market, ROWS, {("sam", 0): trained["sam", 0]}, reference)
    assert found.tables.keys() == TABLES
    assert not found.facts


def test_the_reference_score_is_reversal_and_low_volatility(small_market):
    close = np.asarray(small_market.field("close"))
    universe = np.asarray(small_market.traded[ROWS])
    scores = no_model(close, ROWS, universe).numpy()
    k = 7
    window = close[ROWS[k] - 20 : ROWS[k] + 1].astype(float)
    with np.errstate(invalid="ignore"):
        change = np.diff(window, axis=0) / window[:-1]
    known = universe[k] & np.isfinite(change).all(axis=0)
    raw = [-(window[-1] / window[0] - 1)[known], -change[:, known].std(axis=0, ddof=1)]
    expected = np.mean([(x - x.mean()) / x.std() for x in raw], axis=0)
    assert np.array_equal(np.isfinite(scores[k]), known)
    assert np.allclose(scores[k, known], expected, atol=1e-5)


def test_the_reference_score_does_not_read_the_future(small_market):
    close = np.array(small_market.field("close"))
    universe = np.asarray(small_market.traded[ROWS])
    before = no_model(close, ROWS, universe)
    close[ROWS[20] + 1 :] = 1.0
    assert torch.equal(no_model(close, ROWS, universe)[:21].nan_to_num(9), before[:21].nan_to_num(9))

"""Who is in a date's cross-section, an index, and a fill."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from panels import make_panel

from steppe.core.errors import DataError
from steppe.quant.universe import buyable, index_weights, sellable, universe_mask


def only(panel, *places):
    out = np.zeros(panel.shape, bool)
    for place in places:
        out[place] = True
    return out


def test_universe_is_traded_ordinary_old_enough_members_of_the_date():
    panel = make_panel((10, 6))
    age = np.tile(np.arange(10, dtype=np.int32)[:, None] + 88, (1, 6))
    age[:, 1:] = 5000
    late = only(panel, (slice(4, None), slice(3, None)))  # effective on row 4, not a row before
    panel = replace(
        panel,
        age=age,
        traded=~only(panel, (2, 1)),
        special=only(panel, (slice(5, None), 2)),
        members={"A": only(panel, (slice(None), slice(0, 3))), "B": late},
    )
    everything = universe_mask(panel)
    assert np.array_equal(everything, panel.traded & ~panel.special)
    assert np.array_equal(universe_mask(panel, ["B"]), late)
    assert np.array_equal(universe_mask(panel, ("A", "B")), everything & (panel.members["A"] | late))
    old = universe_mask(panel, min_age=91)
    assert np.array_equal(old[:, 1:], everything[:, 1:])
    assert old[:, 0].tolist() == [False] * 3 + [True] * 7  # 91 days old on row 3
    with pytest.raises(DataError, match="Did you mean"):
        universe_mask(panel, ["AA"])


def test_a_fill_needs_a_bar_and_an_open_side():
    panel = make_panel((4, 3))
    panel = replace(
        panel,
        traded=~only(panel, (1, 0)),
        sealed_up=only(panel, (2, 1)),
        sealed_down=only(panel, (3, 2)),
        delisted=only(panel, (3, 0)),
        limit_up=~only(panel),
        special=~only(panel),
    )
    assert np.array_equal(buyable(panel), ~only(panel, (1, 0), (2, 1), (3, 0)))
    assert np.array_equal(sellable(panel), ~only(panel, (1, 0), (3, 2)))


def test_weights_of_the_data_come_first_and_sum_to_one():
    panel = make_panel((6, 4))
    given_weights = np.array([[0.0, 0.0, 0.0, 0.0], [0.2, np.nan, 0.2, 0.0]], np.float32)[[0, 1, 1, 1, 1, 1]]
    weights, source = index_weights(replace(panel, weights={"IDX": given_weights}), "IDX")
    assert source == "data"
    assert weights.dtype == np.float64
    np.testing.assert_allclose(weights, np.array([[0.0] * 4, [0.5, 0, 0.5, 0]])[[0, 1, 1, 1, 1, 1]])


def test_without_weights_members_weigh_by_float_cap():
    panel = make_panel((6, 6))  # the first three are members
    cap = panel.float_cap.copy()
    cap[0] = np.nan
    cap[2, 1] = np.nan
    panel = replace(panel, weights={}, float_cap=cap, delisted=only(panel, (slice(4, None), 0)))
    weights, source = index_weights(panel, "IDX")
    assert source == "float_cap"
    assert (weights[0] == 0).all()
    np.testing.assert_allclose(weights[1:].sum(axis=1), 1, rtol=1e-15)
    np.testing.assert_allclose(weights[1, :3], cap[1, :3] / cap[1, :3].astype(float).sum())
    assert (weights[:, 3:] == 0).all()
    assert weights[2, 1] == 0 < weights[1, 1]
    assert (weights[4:, 0] == 0).all()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), at=st.integers(1, 19))
def test_weights_at_t_ignore_everything_after_t(seed, at):
    one, two = make_panel((20, 8), seed=seed), make_panel((20, 8), seed=seed + 1)
    cap = np.concatenate([one.float_cap[:at], two.float_cap[at:]])
    member = np.concatenate([one.members["IDX"][:at], ~two.members["IDX"][at:]])
    mixed = replace(one, float_cap=cap, members={"IDX": member}, weights={})
    assert np.array_equal(
        index_weights(mixed, "IDX")[0][:at], index_weights(replace(one, weights={}), "IDX")[0][:at]
    )


def test_weights_that_nobody_knows_are_an_error():
    panel = make_panel((5, 4))
    with pytest.raises(DataError, match=r"unknown index 'IDY'\. Did you mean 'IDX'"):
        index_weights(panel, "IDY")
    with pytest.raises(DataError, match="neither weights nor members with a float cap"):
        index_weights(replace(panel, weights={}, float_cap=np.full_like(panel.float_cap, np.nan)), "IDX")

"""What is known at date t uses nothing after t: change the whole future, nothing at t may change."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from steppe.core.seeding import generator
from steppe.quant.bars import daily_bars, rolling_bars
from steppe.quant.factor_model import FactorProblem
from steppe.quant.labels import forward_returns
from steppe.quant.stock_factor import WEEK, StockFactorSpec, make_split, universe_mask

BLOCKS = StockFactorSpec(
    train=("2015-07-01", "2016-06-30"),
    validation=("2016-07-01", "2016-12-30"),
    test=("2017-01-02", "2017-06-30"),
)


def with_other_future(panel, date, seed):
    """The panel with every value, mask and membership after row ``date`` replaced by noise."""
    rng = np.random.default_rng(seed)

    def noisy(plane):
        plane = np.array(plane)
        tail = plane[date + 1 :]
        if plane.dtype == bool:
            plane[date + 1 :] = rng.random(tail.shape) < 0.5
        elif np.issubdtype(plane.dtype, np.integer):
            plane[date + 1 :] = rng.integers(0, 5, tail.shape)
        else:
            plane[date + 1 :] = np.exp(rng.normal(size=tail.shape))
        return plane

    planes = {f.name: getattr(panel, f.name) for f in dataclasses.fields(panel)}
    arrays = {k: noisy(v) for k, v in planes.items() if isinstance(v, np.ndarray) and v.ndim >= 2}
    members = {name: noisy(plane) for name, plane in panel.members.items()}
    return dataclasses.replace(panel, **arrays, members=members)


class Unchecked(FactorProblem):
    min_stocks = 0  # the future is noise: it may hold too few stocks


def problems(panel):
    bars, labels, split = daily_bars(panel), forward_returns(panel, 10), make_split(panel, BLOCKS)
    universe = universe_mask(panel, tuple(panel.members))
    yield Unchecked(bars, labels, universe, split, window=30, hidden=4, layers=1)
    yield Unchecked(
        rolling_bars(bars, WEEK), labels, universe, split, window=10, stride=WEEK, hidden=4, layers=1
    )


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**31), place=st.floats(0, 1))
def test_scores_and_memberships_at_t_ignore_everything_after_t(small_market, seed, place):
    rows = make_split(small_market, BLOCKS).test
    date = int(rows[int(place * (len(rows) - 1))])
    mutated = with_other_future(small_market, date, seed)
    known = rows[rows <= date]
    indices = tuple(small_market.members)
    assert np.array_equal(
        universe_mask(small_market, indices)[: date + 1], universe_mask(mutated, indices)[: date + 1]
    )
    for one, other in zip(problems(small_market), problems(mutated), strict=True):
        model = one.model(generator(seed, "model"))
        assert np.array_equal(one.scores(model, known), other.scores(model, known), equal_nan=True)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**31))
def test_training_and_validation_see_nothing_of_the_block_after_theirs(small_market, seed):
    split = make_split(small_market, BLOCKS)
    for block, following in (("train", split.validation[0]), ("validation", split.test[0])):
        mutated = with_other_future(small_market, int(following) - 1, seed)
        for one, other in zip(problems(small_market), problems(mutated), strict=True):
            for a, b in zip(one.full(block), other.full(block), strict=True):
                assert all(np.array_equal(x.numpy(), y.numpy()) for x, y in zip(a, b, strict=True))


def test_the_embargo_drops_exactly_one_label_horizon(small_market):
    every_day = BLOCKS.model_copy(update={"every": 1})
    split = make_split(small_market, every_day)
    assert split.validation[0] - split.train[-1] == every_day.horizon + 2
    assert split.test[0] - split.validation[-1] == every_day.horizon + 2
    # the last label of the train block is complete on its last session
    assert small_market.dates[split.train[-1] + every_day.horizon + 1] <= np.datetime64(every_day.train[1])


@pytest.mark.parametrize("block", ["train", "validation"])
def test_labels_stay_inside_their_block(small_market, block):
    split = make_split(small_market, BLOCKS)
    last = np.datetime64(getattr(BLOCKS, block)[1])
    assert (small_market.dates[getattr(split, block) + BLOCKS.horizon + 1] <= last).all()

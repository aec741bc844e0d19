"""What is known at date t uses nothing after t: change the whole future, nothing at t may change."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from panels import with_other_future

from steppe.core.seeding import generator
from steppe.quant.bars import daily_bars, rolling_bars
from steppe.quant.factor_model import FactorProblem, Feed
from steppe.quant.labels import forward_returns
from steppe.quant.stock_factor import WEEK, StockFactorSpec, make_splits
from steppe.quant.universe import universe_mask

SINGLE = StockFactorSpec(
    train=("2015-07-01", "2016-06-30"),
    validation=("2016-07-01", "2016-12-30"),
    test=("2017-01-02", "2017-06-30"),
)
WALK = StockFactorSpec(
    walk_forward={
        "first": "2016-11-15",
        "last": "2017-05-31",
        "train_months": 8,
        "validation_months": 3,
        "test_months": 3,
    }
)
both = pytest.mark.parametrize("spec", [SINGLE, WALK], ids=["single", "walk_forward"])


class Unchecked(FactorProblem):
    min_stocks = 0  # the future is noise: it may hold too few stocks


def problems(panel, spec):
    """Daily and weekly models of every block."""
    bars, labels = daily_bars(panel), forward_returns(panel, 10)
    rest = labels, universe_mask(panel, tuple(panel.members)), panel.dates, panel.symbols
    for feed in (Feed(bars, *rest, 30), Feed(rolling_bars(bars, WEEK), *rest, 10, WEEK)):
        for split in make_splits(panel.dates, spec).values():
            yield Unchecked(feed, split, hidden=4, layers=1)


@both
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**31), place=st.floats(0, 1))
def test_scores_and_memberships_at_t_ignore_everything_after_t(small_market, spec, seed, place):
    rows = np.concatenate([split.test for split in make_splits(small_market.dates, spec).values()])
    date = int(rows[int(place * (len(rows) - 1))])
    mutated = with_other_future(small_market, date, seed)
    indices = tuple(small_market.members)
    assert np.array_equal(
        universe_mask(small_market, indices)[: date + 1], universe_mask(mutated, indices)[: date + 1]
    )
    for one, other in zip(problems(small_market, spec), problems(mutated, spec), strict=True):
        model = one.model(generator(seed, "model"))
        known = one.split.test[one.split.test <= date]
        assert np.array_equal(one.scores(model, known), other.scores(model, known), equal_nan=True)


@both
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_training_and_validation_see_nothing_of_the_block_after_theirs(small_market, spec, seed):
    for number, split in enumerate(make_splits(small_market.dates, spec).values()):
        for block, following in (("train", split.validation[0]), ("validation", split.test[0])):
            mutated = with_other_future(small_market, int(following) - 1, seed)
            pairs = zip(problems(small_market, spec), problems(mutated, spec), strict=True)
            blocks = len(make_splits(small_market.dates, spec))
            for one, other in list(pairs)[number::blocks]:
                for a, b in zip(one.full(block), other.full(block), strict=True):
                    assert all(np.array_equal(x.numpy(), y.numpy()) for x, y in zip(a, b, strict=True))


@both
def test_a_trained_block_model_scores_t_without_the_future(small_market, spec):
    date = int(next(reversed(make_splits(small_market.dates, spec).values())).test[0])
    mutated = with_other_future(small_market, date, 1)
    for one, other in zip(problems(small_market, spec), problems(mutated, spec), strict=True):
        found = []
        for problem in (one, other):
            model = problem.model(generator(0, "model"))
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            for batch in problem.batches(generator(0, "batches")):
                optimizer.zero_grad()
                problem.loss(model, batch).backward()
                optimizer.step()
            found.append(problem.scores(model, problem.split.test[problem.split.test <= date]))
        assert np.array_equal(*found, equal_nan=True)
        assert np.isfinite(found[0]).any()


@both
def test_the_embargo_drops_exactly_one_label_horizon(small_market, spec):
    every_day = spec.model_copy(update={"every": 1})
    for split in make_splits(small_market.dates, every_day).values():
        assert split.validation[0] - split.train[-1] == every_day.horizon + 2
        if spec is SINGLE:
            # the last label of the train block is complete on its last session
            last = small_market.dates[split.train[-1] + every_day.horizon + 1]
            assert last <= np.datetime64(every_day.train[1])
        # the grid of the test dates need not begin with the block
        assert 0 <= split.test[0] - split.validation[-1] - (every_day.horizon + 2) < WEEK


@both
def test_labels_stay_inside_their_block(small_market, spec):
    for split in make_splits(small_market.dates, spec).values():
        assert split.train[-1] + spec.horizon + 1 < split.validation[0]
        assert split.validation[-1] + spec.horizon + 1 < split.test[0]

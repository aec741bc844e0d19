from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from steppe.core.errors import DataError
from steppe.core.objective import Objective
from steppe.core.seeding import generator
from steppe.quant.analysis import blend
from steppe.quant.bars import daily_bars
from steppe.quant.factor_model import FactorProblem, Feed, ic_loss
from steppe.quant.labels import forward_returns
from steppe.quant.stock_factor import StockFactor
from steppe.quant.universe import universe_mask
from steppe.quant.walk_forward import Split

SPLIT = Split(np.arange(100, 300, 5), np.arange(320, 400, 5), np.arange(420, 640, 5))


@pytest.fixture(scope="module")
def problem(small_market):
    market = small_market
    bars, labels = daily_bars(market), forward_returns(market, 10)
    feed = Feed(bars, labels, universe_mask(market), market.dates, market.symbols, window=10)
    return FactorProblem(feed, SPLIT, hidden=4, layers=1)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 10), st.floats(-5, 5))
def test_loss_is_minus_the_correlation_whatever_the_scale(seed, scale, shift):
    g = generator(seed)
    x, y = torch.randn(40, generator=g).double(), torch.randn(40, generator=g).double()
    expected = -np.corrcoef(x.numpy(), y.numpy())[0, 1]
    assert float(ic_loss(x * scale + shift, y)) == pytest.approx(expected, abs=1e-9)


def test_constant_scores_give_loss_zero_and_finite_gradients():
    x = torch.ones(10, requires_grad=True)
    loss = ic_loss(x, torch.randn(10))
    loss.backward()
    assert loss == 0
    assert torch.isfinite(x.grad).all()


def test_the_model_has_the_published_size(problem):
    published = FactorProblem(replace(problem.feed, window=30), SPLIT).model(generator(0))
    parameters = sum(p.numel() for p in published.parameters())
    assert parameters == 3 * 64 * (6 + 64 + 2) + 3 * 64 * (64 + 64 + 2) + 65


def test_initial_weights_depend_on_the_generator_alone(problem):
    def flat(seed):
        return torch.cat([p.detach().flatten() for p in problem.model(generator(seed)).parameters()])

    before = torch.get_rng_state()
    assert torch.equal(flat(1), flat(1))
    assert not torch.equal(flat(1), flat(2))
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_holds_every_training_date_once_in_the_generators_order(problem):
    def sizes(seed):
        return [len(batch.labels) for batch in problem.batches(generator(seed))]

    assert len(sizes(0)) == len(SPLIT.train)
    assert sum(sizes(0)) == problem.samples
    assert sizes(0) == sizes(0) != sizes(1)
    assert sorted(sizes(0)) == sorted(sizes(1))


def test_one_batch_is_one_dates_cross_section(problem):
    for date, batch in zip(SPLIT.train, problem.full("train"), strict=True):
        stocks = np.flatnonzero(problem.feed.eligible[date])
        labels = problem.feed.labels[date, stocks]
        assert batch.windows.shape == (10, len(stocks), 6)
        assert np.array_equal(batch.labelled.numpy(), np.flatnonzero(np.isfinite(labels)))
        assert batch.labels.mean().abs() < 1e-5
        assert batch.labels.std(correction=0) == pytest.approx(1, abs=1e-5)


def test_a_sample_is_spread_over_dates_and_stocks(problem):
    whole = problem.sample("train", 10**6, 10**6)
    assert len(whole) == len(SPLIT.train)
    for batch, full in zip(whole, problem.full("train"), strict=True):
        assert torch.equal(batch.windows, full.windows[:, full.labelled])
        assert torch.allclose(batch.labels, full.labels, atol=1e-6)
    few = problem.sample("test", 3, 25)
    assert [len(batch.labels) for batch in few] == [25, 25, 25]
    assert all(batch.labels.mean().abs() < 1e-5 for batch in few)
    first = next(iter(problem.full("test")))
    assert torch.equal(few[0].windows[:, 0], first.windows[:, first.labelled[0]])
    assert torch.equal(few[0].windows[:, -1], first.windows[:, first.labelled[-1]])
    assert torch.isfinite(problem.loss(problem.model(generator(0)), few[1]))


def test_scores_cover_the_universe_and_nothing_else(problem):
    scores = problem.outputs(problem.model(generator(0)))["scores"].numpy()
    assert np.array_equal(np.isfinite(scores), problem.feed.eligible[SPLIT.test])


def test_training_lowers_the_loss(problem):
    model = problem.model(generator(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = problem.batch(SPLIT.train[0])
    objective = Objective(model, problem.loss, batch)
    first = float(objective.value())
    for _ in range(30):
        optimizer.step(objective)
    assert float(objective.value()) < first - 0.2
    assert (objective.cost.gradient, objective.cost.forward) == (30, 2)


def test_a_collapsed_model_is_not_mistaken_for_a_good_one(problem):
    model = problem.model(generator(0))
    torch.nn.init.zeros_(model.head.weight)
    assert np.isnan(problem.metrics(model, "validation")["ic"])


def test_too_few_stocks_is_an_error_that_names_the_block(problem, small_market):
    universe = np.zeros(small_market.shape, dtype=bool)
    universe[:, :5] = True
    with pytest.raises(DataError, match="train block needs at least 20 stocks"):
        FactorProblem(replace(problem.feed, universe=universe), SPLIT)


def test_the_blend_is_the_mean_of_standardised_scores_where_both_exist():
    a = torch.tensor([[1.0, 2.0, 3.0, torch.nan, 9.0]])
    b = torch.tensor([[30.0, 20.0, 10.0, 5.0, torch.nan]])
    assert torch.allclose(blend([a, b])[0, :3], torch.zeros(3), atol=1e-6)
    assert torch.isnan(blend([a, b])[0, 3:]).all()
    assert torch.allclose(blend([a, a * 10])[0, [0, 1, 2, 4]], blend([a])[0, [0, 1, 2, 4]])


def test_the_panels_path_is_not_part_of_the_identity(small_market, tmp_path):
    blocks = {
        "train": ["2015-07-01", "2016-06-30"],
        "validation": ["2016-07-01", "2016-12-30"],
        "test": ["2017-01-02", "2017-06-30"],
    }
    small_market.save(tmp_path / "one")
    small_market.save(tmp_path / "two")
    one, two = (StockFactor(panel=str(tmp_path / name), **blocks) for name in ("one", "two"))
    for part in ("daily", "weekly"):
        assert one.parts[part].identity == two.parts[part].identity
        assert one.parts[part].output_identity == two.parts[part].output_identity


def test_drawn_batches_are_a_function_of_the_generator(problem):
    drawing = FactorProblem(problem.feed, SPLIT, hidden=4, layers=1, batch_stocks=25)
    one, same, other = (list(drawing.batches(generator(seed))) for seed in (0, 0, 1))
    assert all(torch.equal(a.windows, b.windows) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a.windows, b.windows) for a, b in zip(one, other, strict=True))
    assert {batch.windows.shape for batch in one} == {(10, 25, 6)}
    for batch in one:
        assert batch.labelled.tolist() == list(range(25))
        assert batch.windows.mean(dim=1).abs().max() < 1e-4
    assert drawing.samples == 25 * len(SPLIT.train)
    # validation and scores take everybody
    assert (
        drawing.batch(SPLIT.validation[0]).windows.shape == problem.batch(SPLIT.validation[0]).windows.shape
    )

import math

import pytest
import torch
from torch import nn

from steppe.core.errors import SteppeError
from steppe.core.seeding import generator
from steppe.optim.registry import create
from steppe.study.train import train

KEYS = ("adamw", "sam", "asam", "gsam", "gam", "friendly_sam")


class Regression:
    """A small noisy regression that overfits."""

    watch = ("loss", -1)
    samples = 24

    def __init__(self):
        g = generator(7, "data")
        self.x, self.v = torch.randn(24, 3, generator=g), torch.randn(24, 3, generator=g)
        self.y, self.w = self.x.sum(1).sin(), self.v.sum(1).sin()

    def model(self, generator):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(self, model, batch):
        x, y = batch
        return (model(x).squeeze(-1) - y).square().mean()

    def batches(self, generator):
        for part in torch.randperm(24, generator=generator).split(6):
            yield self.x[part], self.y[part]

    def metrics(self, model, split):
        with torch.no_grad():
            return {"loss": float(self.loss(model, (self.v, self.w)))}


def run(folder, key="sam", epochs=5, patience=5, seed=0, problem=None, stop_after=None):
    seen = []

    def on_epoch(epoch):
        seen.append(epoch)
        if epoch.number == stop_after:
            raise KeyboardInterrupt  # before this epoch's checkpoint, as a kill would

    folder.mkdir(exist_ok=True)
    base = {} if key == "adamw" else {"base": "adamw"}
    trained = train(
        problem or Regression(),
        lambda model: create(key, model.named_parameters(), lr=0.02, **base),
        seed,
        epochs=epochs,
        patience=patience,
        folder=folder,
        on_epoch=on_epoch,
    )
    return trained, seen


def weights(trained):
    return torch.cat([p.detach().flatten() for p in trained.model.parameters()])


@pytest.mark.parametrize("key", KEYS)
def test_an_interrupted_trial_resumes_to_the_same_bits(tmp_path, key):
    whole, epochs = run(tmp_path / "whole", key)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", key, stop_after=3)
    resumed, rest = run(tmp_path / "cut", key)
    assert [epoch.number for epoch in rest] == [3, 4, 5]
    assert torch.equal(weights(whole), weights(resumed))
    assert [e.metrics for e in epochs[2:]] == [e.metrics for e in rest]
    assert whole.cost == resumed.cost
    # and once more: nothing left to do, the same result
    again, none = run(tmp_path / "cut", key)
    assert not none
    assert torch.equal(weights(again), weights(whole))


def test_every_optimizer_starts_from_the_same_weights_and_sees_the_same_batches(tmp_path):
    order = {}

    class Watched(Regression):
        def batches(self, generator):
            for x, y in super().batches(generator):
                order.setdefault(self.key, []).append(x)
                yield x, y

    for key in KEYS:
        problem = Watched()
        problem.key = key
        run(tmp_path / key, key, epochs=2, problem=problem)
    for key in KEYS:
        assert all(torch.equal(a, b) for a, b in zip(order[key], order["adamw"], strict=True))


@pytest.mark.parametrize(("key", "passes"), [("adamw", 1), ("sam", 2), ("gam", 4)])
def test_cost_is_counted_where_it_happens(tmp_path, key, passes):
    trained, epochs = run(tmp_path / "a", key, epochs=3)
    assert trained.cost.gradient == 3 * 4 * passes
    assert [e.cost.gradient for e in epochs] == [4 * passes, 8 * passes, 12 * passes]


def test_early_stopping_keeps_the_best_weights(tmp_path):
    problem = Regression()
    trained, epochs = run(tmp_path / "a", "adamw", epochs=200, patience=4)
    losses = [e.metrics["validation_loss"] for e in epochs]
    assert trained.best_epoch == losses.index(min(losses)) + 1
    assert trained.epochs == trained.best_epoch + 4 < 200
    assert problem.metrics(trained.model, "validation")["loss"] == min(losses)


def test_divergence_is_an_error_that_says_so(tmp_path):
    class Diverging(Regression):
        def metrics(self, model, split):
            return {"loss": math.nan}

    with pytest.raises(SteppeError, match=r"validation loss is nan after epoch 1.*learning rate"):
        run(tmp_path / "a", problem=Diverging())

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import steppe.study.train as training
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


def run(
    folder,
    key="sam",
    epochs=5,
    patience=5,
    seed=0,
    problem=None,
    stop_after=None,
    optimizer_of=None,
    evaluations=None,
):
    seen = []

    def on_epoch(epoch):
        seen.append(epoch)
        if epoch.number == stop_after:
            raise KeyboardInterrupt  # before this epoch's checkpoint, as a kill would

    folder.mkdir(exist_ok=True)
    base = {} if key == "adamw" else {"base": "adamw"}
    trained = train(
        problem or Regression(),
        optimizer_of or (lambda model: create(key, model.named_parameters(), lr=0.02, **base)),
        seed,
        epochs=epochs,
        patience=patience,
        folder=folder,
        evaluations=evaluations,
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


def test_what_trains_at_other_weights_than_it_evaluates_is_told_when(tmp_path):
    # lr 0.5: without the eval() before the checkpoint and the train() after it the weights would differ
    free = pytest.importorskip("schedulefree").AdamWScheduleFree
    optimizers = []

    def optimizer_of(model):
        optimizers.append(free(model.parameters(), lr=0.5))
        return optimizers[-1]

    class Watched(Regression):
        def metrics(self, model, split):
            assert not optimizers[-1].param_groups[0]["train_mode"]
            return super().metrics(model, split)

    whole, epochs = run(tmp_path / "whole", problem=Watched(), optimizer_of=optimizer_of)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", problem=Watched(), optimizer_of=optimizer_of, stop_after=3)
    resumed, rest = run(tmp_path / "cut", problem=Watched(), optimizer_of=optimizer_of)
    assert [e.metrics for e in epochs[2:]] == [e.metrics for e in rest]
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.model is not resumed.model
    best = epochs[whole.best_epoch - 1].metrics["validation_loss"]
    assert Regression().metrics(whole.model, "validation")["loss"] == best


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


MEASURED = ("gradients", "perturbed", "perturbation", "surrogate_gap", "cosine", "gradient_norm", "skipped")


@dataclass
class Told:
    """What a step tells; healthy if not said otherwise."""

    perturbed: bool = True
    perturbation: float = 0.05
    surrogate_gap: float = 0.1
    cosine: float = math.nan
    gradient_norm: float = 2.0


class Telling(torch.optim.SGD):
    """Gradient descent that tells of its steps what `script(step)` says; None is a skipped step."""

    def __init__(self, model, script):
        super().__init__(model.parameters(), lr=0.01)
        self.script, self.diagnose, self.skipped, self.diagnostics = script, False, 0, None
        self.diagnosed, self.number = [], 0

    def step(self, closure):
        told = self.script(self.number)
        if self.diagnose:
            self.diagnosed.append(self.number)
        self.number += 1
        if told is None:
            self.skipped += 1
            return closure()
        self.diagnostics = told
        return super().step(closure)


class Long(Regression):
    """24 steps in an epoch."""

    def batches(self, generator):
        for part in torch.randperm(24, generator=generator).split(1):
            yield self.x[part], self.y[part]


def tell(folder, script, epochs=1):
    """The telling optimizer after training, and what each epoch's metrics have of its steps."""
    made = []

    def optimizer_of(model):
        made.append(Telling(model, script))
        return made[-1]

    _, seen = run(folder, epochs=epochs, problem=Long(), optimizer_of=optimizer_of)
    metrics = [
        {k.removeprefix("step_"): v for k, v in epoch.metrics.items() if k.startswith("step_")}
        for epoch in seen
    ]
    return made[-1], metrics


def test_a_thin_even_sample_of_the_steps_is_diagnosed(tmp_path):
    optimizer, _ = tell(tmp_path / "a", lambda step: Told(), epochs=2)
    assert optimizer.diagnosed == [0, 20, 24 + 0, 24 + 20]


def test_diagnosis_waits_for_a_perturbed_step(tmp_path):
    def script(step):
        return Told(
            perturbed=step % 3 == 1, perturbation=float(step), cosine=0.5 if step % 3 == 1 else math.nan
        )

    optimizer, (metrics,) = tell(tmp_path / "a", script)
    assert optimizer.diagnosed == [0, 1, 20, 21, 22]
    assert metrics["perturbation"] == (1 + 22) / 2
    assert metrics["perturbed"] == 8 / 24


def test_means_are_over_the_steps_that_have_them(tmp_path):
    def script(step):
        if step in (3, 4, 5):
            return None
        known = step == 7
        return Told(
            perturbed=known, surrogate_gap=0.25 if known else math.nan, gradient_norm=float(step < 12)
        )

    _, (metrics,) = tell(tmp_path / "a", script)
    assert metrics == {
        "gradients": 1.0,
        "skipped": 3 / 24,
        "perturbed": 1 / 21,
        "surrogate_gap": 0.25,
        "gradient_norm": 9 / 21,
        "perturbation": 0.05,
    }  # no cosine was measured, so there is none


def test_skipped_steps_tell_nothing_else(tmp_path):
    _, (metrics,) = tell(tmp_path / "a", lambda step: None)
    assert metrics == {"gradients": 1.0, "skipped": 1.0}


@pytest.mark.parametrize("key", KEYS[1:])
def test_sharpness_aware_optimizers_tell_of_their_steps(tmp_path, key):
    _, epochs = run(tmp_path / "a", key, epochs=2)
    for epoch in epochs:
        told = {name: epoch.metrics[f"step_{name}"] for name in MEASURED}
        assert (told["perturbed"], told["skipped"]) == (1.0, 0.0)
        assert told["gradients"] == (4 if key == "gam" else 2)
        assert told["perturbation"] > 0
        assert told["gradient_norm"] > 0
        assert -1 <= told["cosine"] <= 1
        assert math.isfinite(told["surrogate_gap"])
    if key == "sam":
        assert told["perturbation"] == pytest.approx(0.05, rel=1e-4)
        assert told["surrogate_gap"] == pytest.approx(0.05 * told["gradient_norm"], rel=0.5)


def test_a_plain_optimizer_tells_nothing(tmp_path):
    _, epochs = run(tmp_path / "a", "adamw", epochs=1)
    assert set(epochs[0].metrics) == {"train_loss", "validation_loss"}


@pytest.mark.parametrize("key", KEYS[1:])
def test_diagnosis_changes_no_bit(tmp_path, key, monkeypatch):
    thin, _ = run(tmp_path / "thin", key)
    monkeypatch.setattr(training, "DIAGNOSE_EVERY", 1)
    every, _ = run(tmp_path / "every", key)
    monkeypatch.setattr(training, "_Diagnosing", type("Nobody", (), {}))
    never, epochs = run(tmp_path / "never", key)
    assert not any(name.startswith("step_") for name in epochs[0].metrics)
    assert torch.equal(weights(thin), weights(never))
    assert torch.equal(weights(every), weights(never))


@pytest.mark.parametrize(("key", "budget", "gradients"), [("adamw", 17, 6), ("sam", 18, 6), ("sam", 19, 8)])
def test_a_budget_in_evaluations_ends_with_the_step_that_reaches_it(tmp_path, key, budget, gradients):
    trained, epochs = run(tmp_path / "a", key, evaluations=budget)
    assert trained.cost.gradient == gradients  # of three evaluations each, four steps an epoch
    assert trained.epochs == len(epochs) == math.ceil(gradients / (4 if key == "adamw" else 8))
    again, none = run(tmp_path / "a", key, evaluations=budget)
    assert not none
    assert torch.equal(weights(again), weights(trained))
    whole, all_epochs = run(tmp_path / "b", key)
    if trained.epochs > 1:
        assert epochs[0].metrics == all_epochs[0].metrics
    assert whole.cost.gradient > gradients


def test_a_trial_within_a_budget_resumes_to_the_same_bits(tmp_path):
    whole, epochs = run(tmp_path / "whole", evaluations=70)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_after=2, evaluations=70)
    resumed, rest = run(tmp_path / "cut", evaluations=70)
    assert torch.equal(weights(whole), weights(resumed))
    assert [e.metrics for e in epochs[1:]] == [e.metrics for e in rest]
    assert whole.cost == resumed.cost
    assert whole.cost.evaluations == 72


def test_training_ends_when_the_optimizer_has_finished(tmp_path):
    class Ends(torch.optim.SGD):
        steps = 0

        @property
        def finished(self):
            return "enough" if self.steps >= 6 else ""

        def step(self, closure):
            self.steps += 1
            return super().step(closure)

    trained, epochs = run(tmp_path / "a", optimizer_of=lambda model: Ends(model.parameters(), lr=0.01))
    assert trained.epochs == len(epochs) == 2

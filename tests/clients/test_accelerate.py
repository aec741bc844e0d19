"""In a loop of Accelerate our optimizers do what they do in a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from steppe.optim import ASAM, GSAM, SAM, FriendlySAM

from .common import BATCH, FAMILY, assert_same, batches, constant, data, decay, make, mse, network, plain_loop

accelerate = pytest.importorskip("accelerate", reason="needs the extra steppe[accelerate]")

CLIP = 0.5


@pytest.fixture(autouse=True)
def own_state():
    # the state of Accelerate is the process's: another test's precision must not be this one's
    from accelerate.state import AcceleratorState, GradientState

    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()


def chunks(batch, parts):
    return list(zip(*(part.chunk(parts) for part in batch), strict=True))


class Loop:
    """What ``examples/accelerate_loop.py`` does."""

    def __init__(self, cls, parts=2, samples=32, scaler=None, schedule=decay):
        self.parts, self.model = parts, network()
        self.accelerator = accelerate.Accelerator(gradient_accumulation_steps=parts, cpu=True)
        if scaler is not None:  # Accelerate makes one on a GPU only
            self.accelerator.scaler, self.accelerator.native_amp = scaler, True
            self.accelerator.state._mixed_precision = "fp16"
        self.optimizer = make(cls, self.model)
        loader = DataLoader(TensorDataset(*data(samples)), batch_size=BATCH)
        self.wrapped, self.prepared, self.loader, self.scheduler = self.accelerator.prepare(
            self.model, self.optimizer, loader, schedule(self.optimizer)
        )

    def epoch(self):
        self.wrapped.train()
        for batch in self.loader:
            for one in self.optimizer.passes(self.accelerator.scaler):
                one.loss = 0.0
                for micro_batch in chunks(batch, self.parts):
                    with self.accelerator.accumulate(self.wrapped):
                        loss = mse(self.wrapped, micro_batch)
                        self.accelerator.backward(loss)
                        one.loss += loss.item() / self.parts
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), CLIP)
            self.prepared.step()
            self.scheduler.step()


def reference(cls, parts=2, samples=32, schedule=decay, **options):
    model = network()
    optimizer = make(cls, model)
    steps = [chunks(batch, parts) for batch in batches(samples)] * 2
    plain_loop(model, optimizer, steps, scheduler=schedule(optimizer), clip=CLIP, **options)
    return model, optimizer


@pytest.mark.parametrize("cls", FAMILY)
def test_accumulating_and_clipping_it_is_the_plain_loop(cls):
    loop = Loop(cls)
    loop.epoch()
    loop.epoch()
    expected, optimizer = reference(cls)
    assert_same(loop.model, expected)
    assert loop.optimizer.diagnostics == optimizer.diagnostics
    assert loop.scheduler.get_last_lr()[0] == pytest.approx(0.05 * 0.7**4)


def test_without_accumulation_and_with_a_smaller_last_batch():
    loop = Loop(ASAM, parts=1, samples=28)
    loop.epoch()
    loop.epoch()
    assert_same(loop.model, reference(ASAM, parts=1, samples=28)[0])


def test_a_closure_goes_through_the_prepared_optimizer():
    loop = Loop(SAM, parts=1)
    for batch in batches():

        def closure(batch=batch):
            loop.prepared.zero_grad()
            loss = mse(loop.wrapped, batch)
            loop.accelerator.backward(loss)
            return loss

        loop.prepared.step(closure)
    model = network()
    plain_loop(model, make(SAM, model), [[batch] for batch in batches()])
    assert_same(loop.model, model)


def test_resumed_training_ends_at_the_same_bits(tmp_path):
    first, second = Loop(FriendlySAM), Loop(FriendlySAM)
    first.epoch()
    first.accelerator.save_state(str(tmp_path))
    second.accelerator.load_state(str(tmp_path))
    second.epoch()
    assert_same(second.model, reference(FriendlySAM)[0])
    assert second.optimizer.steps == 8


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_float16():
    def scaler():
        return torch.amp.GradScaler(
            "cpu", init_scale=2.0**18
        )  # too large at first: steps are skipped until it fits

    def half(model, batch):
        forward = torch.autocast("cpu", dtype=torch.float16)(model.forward)
        return mse(lambda x: forward(x).float(), batch)

    its, mine = scaler(), scaler()
    loop = Loop(GSAM, scaler=its, schedule=constant)
    loop.epoch()
    loop.epoch()
    assert_same(loop.model, reference(GSAM, schedule=constant, loss=half, scaler=mine)[0])
    assert 0 < loop.optimizer.skipped < 8
    assert its.get_scale() == mine.get_scale() < 2.0**18

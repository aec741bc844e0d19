"""Under a Lightning Trainer our optimizers do what they do in a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from steppe.optim import GSAM, SAM, FriendlySAM

from .common import BATCH, FAMILY, assert_same, batches, data, decay, make, mse, network, plain_loop

lightning = pytest.importorskip("lightning", reason="needs the extra steppe[lightning]")

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated"),
]
CLIP = 0.5


class Module(lightning.LightningModule):
    def __init__(self, cls=SAM, **hyper):
        super().__init__()
        self.net = network()
        self.make = lambda: make(cls, self.net, **hyper)
        self.lrs = []

    def training_step(self, batch, batch_idx):
        self.lrs.append(self.optimizers().param_groups[0]["lr"])
        return mse(self.net, batch)

    def configure_optimizers(self):
        optimizer = self.make()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay(optimizer), "interval": "step"}}


def fit(module, epochs=2, resume=None, **options):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(TensorDataset(*data()), batch_size=BATCH), ckpt_path=resume)
    return trainer


def reference(cls=SAM, steps=None, epochs=2, clip=None, **hyper):
    model = network()
    optimizer = make(cls, model, **hyper)
    steps = [[batch] for batch in batches()] if steps is None else steps
    losses = plain_loop(model, optimizer, steps * epochs, scheduler=decay(optimizer), clip=clip)
    return model, losses


@pytest.mark.parametrize("cls", FAMILY)
def test_is_the_plain_loop(cls):
    module = Module(cls)
    trainer = fit(module)
    assert_same(module.net, reference(cls)[0])
    assert trainer.global_step == 8  # steps, not passes
    assert not math.isnan(trainer.optimizers[0].diagnostics.surrogate_gap)
    assert module.lrs[-1] == pytest.approx(0.05 * 0.7**3)


def test_resumed_training_ends_at_the_same_bits(tmp_path):
    whole = Module(FriendlySAM)
    fit(whole, epochs=3)
    fit(Module(FriendlySAM), epochs=1).save_checkpoint(tmp_path / "one.ckpt")
    resumed = Module(FriendlySAM)
    trainer = fit(resumed, epochs=3, resume=tmp_path / "one.ckpt")
    assert_same(resumed.net, whole.net)
    assert trainer.global_step == 12


def test_clipping_of_each_pass_is_clipping_of_the_step_for_a_rule_without_memory():
    module = Module(SAM)
    fit(module, gradient_clip_val=CLIP)
    assert_same(module.net, reference(SAM, clip=CLIP)[0], rtol=1e-5, atol=1e-6)


def test_clipping_of_what_the_base_gets():
    module = Module(GSAM)

    def configure_optimizers():
        optimizer = module.make()

        def clip(*_):
            nn.utils.clip_grad_norm_(module.parameters(), CLIP)

        optimizer.base.register_step_pre_hook(clip)
        return [optimizer], [{"scheduler": decay(optimizer), "interval": "step"}]

    module.configure_optimizers = configure_optimizers
    fit(module)
    assert_same(module.net, reference(GSAM, clip=CLIP)[0])


def test_what_step_returns_can_be_logged():
    class Logging(Module):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            self.log("train_loss", optimizer.step(closure=closure))

    trainer = fit(Logging(SAM))
    assert trainer.callback_metrics["train_loss"].item() == pytest.approx(reference(SAM)[1][-1])


def test_micro_batches_in_manual_optimization():
    class Manual(Module):
        def __init__(self, **hyper):
            super().__init__(**hyper)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                optimizer.zero_grad()
                micro_batches = list(zip(*(part.chunk(2) for part in batch), strict=True))
                for micro_batch in micro_batches:
                    self.manual_backward(mse(self.net, micro_batch) / len(micro_batches))

            optimizer.step(closure)
            self.lr_schedulers().step()

    module = Manual(cls=GSAM)
    trainer = fit(module)
    steps = [list(zip(*(part.chunk(2) for part in batch), strict=True)) for batch in batches()]
    assert_same(module.net, reference(GSAM, steps)[0])
    assert trainer.global_step == 8


def test_bfloat16():
    module = Module(SAM)
    fit(module, precision="bf16-mixed")
    model = network()
    optimizer = make(SAM, model)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        plain_loop(model, optimizer, [[b] for b in batches()] * 2, scheduler=decay(optimizer))
    assert_same(module.net, model)


def scaler():
    return torch.amp.GradScaler(
        "cpu", init_scale=2.0**18
    )  # too large at first: steps are skipped until it fits


def half_precision():
    from lightning.pytorch.plugins import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", scaler=scaler())


def test_float16_as_it_is_is_refused():
    with pytest.raises(RuntimeError, match="needs a completed loop"):
        fit(Module(SAM), plugins=[half_precision()])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_float16_by_a_loop_over_passes():
    class Half(Module):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            optimizer, scaler = optimizer.optimizer, self.trainer.precision_plugin.scaler
            for one in optimizer.passes(scaler):
                one.loss = closure()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.parameters(), CLIP)
            scaler.step(optimizer)
            scaler.update()

    module = Half(GSAM)
    trainer = fit(module, plugins=[half_precision()])
    model = network()
    optimizer, scale = make(GSAM, model), scaler()
    with torch.autocast("cpu", dtype=torch.float16, cache_enabled=False):
        plain_loop(
            model,
            optimizer,
            [[b] for b in batches()] * 2,
            scheduler=decay(optimizer),
            clip=CLIP,
            scaler=scale,
        )
    assert_same(module.net, model)
    assert trainer.global_step == 8
    assert 0 < optimizer.skipped == trainer.optimizers[0].skipped < 8
    assert trainer.precision_plugin.scaler.get_scale() == scale.get_scale()

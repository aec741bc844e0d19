"""Under a Hugging Face Trainer, with the mixin, our optimizers do what they do in a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from steppe.core.errors import SpecError
from steppe.integrations.huggingface import SharpnessAwareMixin
from steppe.optim import GSAM, SAM, FriendlySAM

from .common import FAMILY, assert_same, constant, data, decay, make, network, plain_loop

transformers = pytest.importorskip("transformers", reason="needs the extra steppe[transformers]")
pytest.importorskip("accelerate", reason="needs the extra steppe[transformers]")

CLIP = 0.5


class Trainer(SharpnessAwareMixin, transformers.Trainer):
    pass


class Regression(nn.Module):
    """Takes and gives what a Trainer wants; dropout draws from the generator whose state a checkpoint keeps."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.net, self.dropout = network(), nn.Dropout(dropout)

    def forward(self, x, labels):
        prediction = self.net(self.dropout(x))
        return {"loss": nn.functional.mse_loss(prediction, labels), "logits": prediction}


def rows(samples=32):
    return [{"x": x, "labels": y} for x, y in zip(*data(samples), strict=True)]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train a model; the trainer, with the micro-batches it drew in ``trainer.drawn``."""
    # the state of Accelerate is the process's: another test's precision must not be this one's
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)

    def run(
        model,
        optimizer,
        dataset=None,
        trainer_class=Trainer,
        schedule=decay,
        resume=None,
        scaler=None,
        **options,
    ):
        drawn = []

        def collate(samples):
            drawn.append(transformers.default_data_collator(samples))
            return drawn[-1]

        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **{
                "num_train_epochs": 2,
                "gradient_accumulation_steps": 2,
                "max_grad_norm": CLIP,
                "save_strategy": "no",
                **options,
            },
        )
        torch.manual_seed(0)
        trainer = trainer_class(
            model,
            arguments,
            train_dataset=rows() if dataset is None else dataset,
            data_collator=collate,
            optimizers=(optimizer, schedule(optimizer)),
        )
        if scaler is not None:  # Accelerate makes one on a GPU only
            trainer.accelerator.scaler, trainer.accelerator.native_amp = scaler, True
            monkeypatch.setitem(trainer.accelerator.state.__dict__, "_mixed_precision", "fp16")
        trainer.train(resume_from_checkpoint=resume)
        trainer.drawn = drawn
        return trainer

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def loss_of(model, batch):
    return model(**batch)["loss"]


def grouped(batches, size=2, epochs=2):
    """The micro-batches of each step; an epoch's last step may have fewer."""
    per_epoch = len(batches) // epochs
    starts = [e * per_epoch + i for e in range(epochs) for i in range(0, per_epoch, size)]
    return [batches[s : min(s + size, (s // per_epoch + 1) * per_epoch)] for s in starts]


def reference(cls, trainer, loss=loss_of, schedule=decay, **options):
    model = Regression()
    optimizer = make(cls, model)
    steps = grouped(trainer.drawn)
    return model, plain_loop(model, optimizer, steps, loss=loss, scheduler=schedule(optimizer), **options)


@pytest.mark.parametrize("cls", FAMILY)
def test_accumulating_and_clipping_it_is_the_plain_loop(train, cls):
    model = Regression()
    trainer = train(model, make(cls, model))
    expected, losses = reference(cls, trainer, clip=CLIP)
    assert_same(model, expected)
    assert trainer.state.global_step == 8
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.05 * 0.7**4)
    # the loss that the Trainer reports is the one at the unperturbed weights
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses) / 8)
    assert not math.isnan(trainer.optimizer.optimizer.diagnostics.surrogate_gap)


def test_the_last_step_of_an_epoch_has_fewer_micro_batches(train):
    model = Regression()
    trainer = train(model, make(GSAM, model), rows(28))
    assert trainer.state.global_step == 8
    assert [len(step) for step in grouped(trainer.drawn)] == [2, 2, 2, 1] * 2
    assert_same(model, reference(GSAM, trainer, clip=CLIP)[0])


def test_tokens_are_averaged_over_all_micro_batches(train):
    """A language model divides by the number of labels of the whole step, which rows of unequal length make visible."""
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    tokens = torch.randint(8, (16, 6), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(6) > torch.arange(16).unsqueeze(1) % 5, -100)
    dataset = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]

    def language_model():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)

    model, expected = language_model(), language_model()
    trainer = train(model, make(SAM, model), dataset, max_grad_norm=1e9)

    optimizer = make(SAM, expected)
    scheduler = decay(optimizer)
    for step in grouped(trainer.drawn):
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in step)
        for _ in optimizer.passes():
            for batch in step:
                expected(**batch, num_items_in_batch=items).loss.backward()
        optimizer.step()
        scheduler.step()
    assert_same(model, expected)


def test_a_plain_optimizer_runs_as_ever(train):
    one, other = Regression(), Regression()
    train(one, AdamW(one.parameters(), lr=0.05))
    train(other, AdamW(other.parameters(), lr=0.05), trainer_class=transformers.Trainer)
    assert_same(one, other)


def test_resumed_within_an_epoch_it_ends_at_the_same_bits(train, tmp_path):
    whole, resumed = Regression(dropout=0.2), Regression(dropout=0.2)
    train(whole, make(FriendlySAM, whole), save_strategy="steps", save_steps=3)
    trainer = train(resumed, make(FriendlySAM, resumed), resume=str(tmp_path / "checkpoint-3"))
    assert_same(resumed, whole)
    assert trainer.state.global_step == 8
    assert trainer.optimizer.optimizer.steps == 8


def test_bfloat16(train):
    model = Regression()
    trainer = train(model, make(SAM, model), bf16=True)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    assert_same(model, reference(SAM, trainer, clip=CLIP, loss=autocast(loss_of))[0])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_float16(train):
    def scaler():
        return torch.amp.GradScaler(
            "cpu", init_scale=2.0**18
        )  # too large at first: steps are skipped until it fits

    model, mine, its = Regression(), scaler(), scaler()
    trainer = train(model, make(GSAM, model), schedule=constant, scaler=its)
    loss = torch.autocast("cpu", dtype=torch.float16)(loss_of)
    assert_same(model, reference(GSAM, trainer, loss, constant, clip=CLIP, scaler=mine)[0])
    assert 0 < trainer.optimizer.optimizer.skipped < 8
    assert its.get_scale() == mine.get_scale()


def test_the_trainer_may_make_the_optimizer(tmp_path):
    model = Regression()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        weight_decay=0.1,
        max_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows(),
        optimizer_cls_and_kwargs=(SAM, {"base": AdamW, "lr": 0.05, "rho": 0.1}),
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert optimizer.steps == 2
    assert [(group["weight_decay"], group["rho"]) for group in optimizer.param_groups] == [
        (0.1, 0.1),
        (0.0, 0.1),
    ]


def test_without_the_mixin_it_is_refused(train):
    model = Regression()
    with pytest.raises(RuntimeError, match="needs a completed loop"):
        train(model, make(SAM, model), trainer_class=transformers.Trainer)


def test_an_optimizer_that_looks_at_samples_is_refused(train, monkeypatch):
    monkeypatch.setattr(SAM, "closure_takes_pass", True)
    model = Regression()
    with pytest.raises(SpecError, match="losses of single samples"):
        train(model, make(SAM, model))

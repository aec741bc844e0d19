"""A Hugging Face Trainer with SAM over AdamW: a mixin, because a Trainer calls ``optimizer.step()`` without a closure.

The mixin makes the Trainer run every pass over the step's micro-batches; accumulation, clipping, mixed precision,
schedulers and checkpoints stay the Trainer's own. It goes before any Trainer class.
Run: ``python examples/huggingface_trainer.py``, after ``pip install steppe[transformers]``.
"""

from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from steppe.integrations.huggingface import SharpnessAwareMixin
from steppe.optim import SAM


class SharpnessAwareTrainer(SharpnessAwareMixin, Trainer):  # a changed line
    pass


torch.manual_seed(0)
starts, strides = torch.randint(16, (256, 1)), torch.randint(1, 4, (256, 1))
tokens = (starts + strides * torch.arange(12)) % 16  # each sequence counts on in steps of 1, 2 or 3
dataset = [{"input_ids": row, "labels": row} for row in tokens]

model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
)
optimizer = SAM(model.named_parameters(), base=torch.optim.AdamW, lr=1e-2, rho=0.05)  # the other one


def loss():
    with torch.no_grad():
        return model.eval()(input_ids=tokens, labels=tokens).loss.item()


before = loss()
with TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=4,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = SharpnessAwareTrainer(model, arguments, train_dataset=dataset, optimizers=(optimizer, None))
    steps = trainer.train().global_step
print(f"loss before {before:.4f}, after {steps} steps {loss():.4f}")
assert loss() < 0.8 < before

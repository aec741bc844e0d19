"""A loop of Accelerate with ASAM over AdamW: every pass runs over all micro-batches of the step.

``accelerator.accumulate`` counts micro-batches, divides the loss and keeps ranks from averaging before the last of a
pass. ``passes(accelerator.scaler)`` is right with and without mixed precision.
Run: ``python examples/accelerate_loop.py``, after ``pip install steppe[accelerate]``.
"""

import torch
from accelerate import Accelerator
from torch import nn

from steppe.optim import ASAM

torch.manual_seed(0)
x = torch.randn(512, 8)
y = torch.sin(x[:, :1]) * x[:, 1:2] + 0.1 * torch.randn(512, 1)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64, shuffle=True)
model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 1))

asam = ASAM(model.named_parameters(), base=torch.optim.AdamW, lr=1e-2, rho=0.2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(asam, T_max=20 * len(loader))
accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
model, optimizer, loader, scheduler = accelerator.prepare(model, asam, loader, scheduler)


def loss():
    with torch.no_grad():
        return nn.functional.mse_loss(model(x), y).item()


before = loss()
for _ in range(20):
    for batch in loader:
        micro_batches = list(zip(*(part.chunk(4) for part in batch), strict=True))
        for _ in asam.passes(accelerator.scaler):  # the added line
            for inputs, targets in micro_batches:
                with accelerator.accumulate(model):
                    accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
print(f"loss before {before:.4f}, after {loss():.4f}")
assert loss() < 0.1 < before

"""The same with a closure, as torch.optim documents it: ``optimizer.step(closure)`` does the whole step."""

import torch
from torch import nn

from steppe.optim import create

torch.manual_seed(0)
x = torch.linspace(-2, 2, 200).unsqueeze(1)
y = torch.sin(3 * x) + 0.1 * torch.randn_like(x)

for key in ("adamw", "sam", "asam", "gsam", "gam", "friendly_sam"):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
    base = None if key == "adamw" else "adamw"
    optimizer = create(key, model.named_parameters(), base=base, lr=1e-2)

    def closure(model=model, optimizer=optimizer):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    for _ in range(300):
        loss = optimizer.step(closure)
    print(f"{key:>12}: loss {loss.item():.4f}")
    assert loss.item() < 0.2

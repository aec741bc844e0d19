"""Your own training loop with one optimizer changed: AdamW becomes GSAM over AdamW.

Two moons are too easy to show much; look at how little changes. Run: ``python examples/own_loop.py``.
"""

import torch
from torch import nn

from steppe.optim import GSAM

torch.manual_seed(0)
angle = torch.rand(400) * torch.pi
side = torch.arange(400) % 2
moons = torch.stack([angle.cos() + side - 0.5, (1 - 2 * side) * (angle.sin() - 0.25)], 1) + 0.2 * torch.randn(
    400, 2
)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(moons, side), batch_size=50, shuffle=True)

model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))
loss_fn = nn.CrossEntropyLoss()
optimizer = GSAM(
    model.named_parameters(), base=torch.optim.AdamW, lr=1e-2, rho=0.05, alpha=0.4
)  # the changed line
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)

for _ in range(20):
    for x, y in loader:
        for _ in optimizer.passes():  # as many passes as the optimizer needs: GSAM 2, GAM 4
            loss = loss_fn(model(x), y)
            loss.backward()
        optimizer.step()
    scheduler.step()

with torch.no_grad():
    accuracy = (model(moons).argmax(1) == side).float().mean().item()
print(f"accuracy on the training moons: {accuracy:.3f}")
assert accuracy > 0.9

"""Sharpness-aware training at the price of plain training: SAF, a loss beside the cross-entropy.

A third of the labels is wrong, so a network that fits them all does worse on clean data.
Run: ``python examples/saf_loss.py``.
"""

import torch
import torch.nn.functional as F
from torch import nn

from steppe.optim.sharpness.saf import SAF

draw = torch.Generator().manual_seed(0)
x, clean_x = torch.randn(2, 300, 10, generator=draw)
truth, clean_y = (sample[:, :3].argmax(1) for sample in (x, clean_x))
wrong = torch.rand(300, generator=draw) < 1 / 3
y = torch.where(wrong, torch.randint(3, (300,), generator=draw), truth)
data = torch.utils.data.TensorDataset(torch.arange(300), x, y)  # each sample brings its index
accuracy = {}

for name in ("cross-entropy", "with SAF"):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 3))
    loader = torch.utils.data.DataLoader(data, batch_size=50, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    saf = SAF(samples=300, classes=3, lmbda=1.0) if name == "with SAF" else None
    for _ in range(60):
        for index, inputs, labels in loader:
            logits = model(inputs)
            loss = F.cross_entropy(logits, labels)
            if saf is not None:
                loss = loss + saf(logits, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if saf is not None:
            saf.next_epoch()
    accuracy[name] = (model(clean_x).argmax(1) == clean_y).float().mean().item()
    print(f"{name:>13}: accuracy on clean data {accuracy[name]:.3f}")

print(saf)

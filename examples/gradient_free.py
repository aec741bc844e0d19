"""Trains what has no gradient: a module that decides by a hard threshold, scored by the number of its errors.

The objective is handed to `step` as it would be to torch.optim; it evaluates a whole population at once.
Run: ``python examples/gradient_free.py``
"""

import torch
from torch import nn

from steppe import Objective
from steppe.optim import create

torch.manual_seed(0)
x = 2 * torch.rand(400, 2) - 1
y = (x.norm(dim=1) < 0.7).float()  # a disc


class Threshold(nn.Module):
    def forward(self, x):
        return (x > 0).to(x.dtype)


def errors(model, batch):
    inputs, targets = batch
    return ((model(inputs)[:, 0] > 0).to(targets.dtype) - targets).abs().mean()


for key, hyper in (
    ("cma_es", {"sigma": 0.5}),
    ("pso", {"bounds": (-2.0, 2.0)}),
    ("differential_evolution", {"bounds": (-2.0, 2.0)}),
):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 8), Threshold(), nn.Linear(8, 1))
    objective = Objective(model, errors, (x, y))
    optimizer = create(key, model.parameters(), seed=1, **hyper)
    while objective.cost.forward < 4000 and not optimizer.finished:
        optimizer.step(objective)
    rate = float(objective.value())
    print(f"{key:>22}: {100 * rate:.1f} % wrong after {objective.cost.forward - 1} forward passes")
    assert rate < 0.25

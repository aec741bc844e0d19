"""A skorch net with Friendly-SAM over AdamW: only arguments change.

skorch gives its optimizer a closure. Its history keeps the first loss of a step, the one at the unperturbed weights.
Hyper-parameters of optimizer and base are parameters of the net, for ``set_params`` and scikit-learn's searches.
Run: ``python examples/skorch_net.py``, after ``pip install steppe[skorch]``.
"""

import torch
from skorch import NeuralNetRegressor
from torch import nn

from steppe.optim import FriendlySAM

torch.manual_seed(0)
x = 4 * torch.rand(256, 1) - 2
y = torch.sin(3 * x) + 0.1 * torch.randn_like(x)

net = NeuralNetRegressor(
    nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)),
    optimizer=FriendlySAM,  # the changed line
    optimizer__base=torch.optim.AdamW,  # and two added ones
    optimizer__rho=0.05,
    lr=2e-2,
    max_epochs=50,
    batch_size=32,
    train_split=None,
    verbose=0,
).initialize()


def loss():
    return nn.functional.mse_loss(torch.from_numpy(net.predict(x)), y).item()


before = loss()
net.fit(x.numpy(), y.numpy())
print(f"loss before {before:.4f}, after {loss():.4f}")
assert loss() < 0.1 < before

"""Six clients that each know two of three classes learn one classifier; three of them train in a round.

FedAvg swings with the classes of the round's clients, FedSMOO less. Run: ``python examples/federated.py``.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from steppe.optim.federated import FedAvg, Federation, FedSMOO

generator = torch.Generator().manual_seed(0)
label = torch.arange(600) % 3
centre = torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]])
point = centre[label] + 0.5 * torch.randn(600, 2, generator=generator)

clients = []
for i in range(6):
    known = ((label == i % 3) | (label == (i + 1) % 3)).nonzero()[i // 3 :: 2, 0]
    clients.append(DataLoader(TensorDataset(point[known], label[known]), batch_size=50, shuffle=True))


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


accuracy: dict[str, list[float]] = {}
for method in (FedAvg(), FedSMOO(rho=0.1, lmbda=0.1)):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
    federation = Federation(model, loss, clients, method, lr=0.1, local_epochs=5, participation=0.5)
    accuracy[type(method).__name__] = hits = []
    for _ in range(15):
        federation.round()
        with torch.no_grad():
            hits.append((model(point).argmax(1) == label).float().mean().item())
    print(f"{type(method).__name__}: {federation.cost.gradient} gradients")

print("round", *accuracy)
for number, row in enumerate(zip(*accuracy.values(), strict=True), start=1):
    print(f"{number:>5}", *(f"{share:.3f}" for share in row))
assert min(hits[-1] for hits in accuracy.values()) > 0.7

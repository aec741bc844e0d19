"""Restarts on advice, beside controls that need none. The adviser may be any program: here a line of Python.

It reads the task and the trace on its input and prints one candidate per line; a language model would do the same.
"""

import sys

import torch

from steppe.optim import create


def rastrigin(x):
    return 10 * len(x) + (x.square() - 10 * torch.cos(2 * torch.pi * x)).sum()


# the adviser rounds the best weights it is shown, which stand in the last line of the trace
ADVISER = """
import sys
best = [line for line in sys.stdin if ": " in line and "as loss" not in line and "Each line" not in line][-1]
weights = [float(word) for word in best.split(": ")[1].split()]
print(*[round(0.5 * weight) for weight in weights])
print(*[round(weight) for weight in weights])
"""

proposers = {
    "random_restart": {"kind": "random_restart", "low": -4.0, "high": 4.0},
    "jitter": {"kind": "jitter", "scale": 1.0},
    "quadratic_fit": "quadratic_fit",
    "command": {"kind": "command", "argv": [sys.executable, "-c", ADVISER]},
}
for name, proposer in proposers.items():
    x = torch.nn.Parameter(torch.tensor([3.3, -2.6, 1.8], dtype=torch.float64))
    optimizer = create("proposed", [x], base="adam", lr=0.05, proposer=proposer, every=40, candidates=2)

    def closure(x=x, optimizer=optimizer):
        optimizer.zero_grad()
        loss = rastrigin(x)
        loss.backward()
        return loss

    for _ in range(200):
        optimizer.step(closure)
    print(f"{name:>15}: loss {optimizer.best_value:.4f}")
    if name == "command":
        assert optimizer.best_value < 0.1

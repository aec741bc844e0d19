"""Training speed of the stock factor beside plain ``nn.GRU``, in one run, as ratios.

Per date 1,000 stocks, window 30, GRU 6 -> 64 x 2 layers, one thread, process CPU time, interleaved, median of the
ratios of neighbouring repeats (a busy machine slows both alike).

    python benchmarks/training.py [--stocks 1000] [--repeats 15]
"""

import argparse
import statistics
import time

import numpy as np
import torch
from torch import nn

from steppe.core.objective import Objective
from steppe.optim.registry import OPTIMIZERS, create
from steppe.quant.factor_model import FactorProblem, Feed
from steppe.quant.features import cross_section
from steppe.quant.walk_forward import Split


def seconds(call) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stocks", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)

    rng = np.random.default_rng(0)
    dates, stocks = 60, given.stocks
    bars = np.exp(rng.normal(0, 0.02, (dates, stocks * 2, 6)).cumsum(0)).astype(np.float32)  # half is outside
    labels = rng.normal(size=bars.shape[:2]).astype(np.float32)
    universe = np.zeros(bars.shape[:2], dtype=bool)
    universe[:, rng.permutation(stocks * 2)[:stocks]] = True
    rows = np.arange(40, 43)
    names = np.array([f"S{n}" for n in range(stocks * 2)])
    market = Feed(bars, labels, universe, np.arange(dates).astype("datetime64[D]"), names, window=30)
    problem = FactorProblem(market, Split(rows, rows, rows))

    plain, windows, weights = nn.GRU(6, 64, 2), torch.randn(30, stocks, 6), torch.randn(stocks, 64)

    def gru_alone() -> None:
        plain.zero_grad()
        states, _ = plain(windows)
        (states[-1] * weights).sum().backward()

    model = problem.model(torch.Generator().manual_seed(0))
    keys = [key for key, spec in OPTIMIZERS.items() if key == "adamw" or spec.family == "sharpness-aware"]
    optimizers = {
        key: create(key, model.named_parameters(), base=None if key == "adamw" else "adamw", lr=1e-3)
        for key in keys
    }

    def step(key: str) -> None:
        # one batch of the training loop: build the cross-section, then the optimizer's step
        optimizers[key].step(Objective(model, problem.loss, problem.batch(41)))

    def feed() -> None:
        cross_section(bars, 41, np.flatnonzero(problem.feed.eligible[41]), 30)

    runs = {"nn.GRU alone": gru_alone, "feed": feed} | {key: (lambda key=key: step(key)) for key in keys}
    for call in runs.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(given.repeats):
        for name, call in runs.items():
            times[name].append(seconds(call))

    def ratio(name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))

    print(
        f"{stocks} stocks, window 30, GRU 6 -> 64 x 2, torch {torch.__version__}, 1 thread, {given.repeats} repeats"
    )
    print(f"{'':>14} {'samples/core-s':>15} {'best':>8} {'of nn.GRU':>10} {'of AdamW step':>14}")
    for name in runs:
        middle, best = statistics.median(times[name]), min(times[name])
        passes = OPTIMIZERS[name].evals if name in OPTIMIZERS else 1
        print(
            f"{name:>14} {passes * stocks / middle:15,.0f} {passes * stocks / best:8,.0f} "
            f"{passes / ratio(name, 'nn.GRU alone'):10.3f} {ratio(name, 'adamw'):14.3f}"
        )
    print("samples/core-s counts every gradient evaluation; 'of nn.GRU' is that rate over nn.GRU's alone.")


if __name__ == "__main__":
    main()

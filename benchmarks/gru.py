"""The native GRU beside ``nn.GRU``: samples per CPU second, in one run, interleaved.

GRU 6 -> 64 x 2, window 30, one thread; a sample is one stock's window. Forward and backward give the weights'
gradients (6.84 MFLOP a sample, counting a multiplication and an addition as two), inference the last state (2.28).
Ratios are medians over neighbouring repeats, since a busy machine slows both alike. The bound is what this machine's
matrix product of 1,024 x 1,024 attains in float32 in the same run.

    python benchmarks/gru.py [--stocks 1000] [--repeats 15]
"""

import argparse
import copy
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.quant import gru
from steppe.quant.gru import GRU

WINDOW, FIELDS, HIDDEN, LAYERS = 30, 6, 64, 2
FLOP = 2 * WINDOW * 3 * HIDDEN * sum((HIDDEN if layer else FIELDS) + HIDDEN for layer in range(LAYERS))


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def kernels() -> dict[str, gru.Precision]:
    """Name of each path of the kernels that this machine has -> its precision."""
    found: dict[str, gru.Precision] = {}
    for precision in ("fp32", "bf16"):
        try:
            path = gru.path(precision)
        except SpecError:
            continue
        if path != "torch":
            found[f"kernel {path}"] = precision
    return found


def work(stocks: int) -> dict[str, Callable[[], object]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = nn.GRU(FIELDS, HIDDEN, LAYERS)
    half = copy.deepcopy(plain).bfloat16()
    windows, weights = torch.randn(WINDOW, stocks, FIELDS), torch.randn(stocks, HIDDEN)
    windows16, weights16 = windows.bfloat16(), weights.bfloat16()

    def last(x: Tensor, module: nn.GRU = plain) -> Tensor:
        return module(x)[0][-1]

    def auto(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return last(x)

    def train(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, w: Tensor) -> None:
        module.zero_grad()
        (forward(x) * w).sum().backward()

    def infer(forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
        with torch.no_grad():
            forward(x)

    fast = {name: GRU(FIELDS, HIDDEN, LAYERS, precision=precision) for name, precision in kernels().items()}
    for module in fast.values():
        module.load_state_dict(plain.state_dict())
    ways = {
        "nn.GRU fp32": (plain, last, windows, weights),
        **{name: (module, module, windows, weights) for name, module in fast.items()},
        "nn.GRU bf16": (half, lambda x: last(x, half), windows16, weights16),
        "nn.GRU autocast": (plain, auto, windows, weights),
    }
    runs: dict[str, Callable[[], object]] = {}
    for name, (module, forward, x, w) in ways.items():
        runs[f"{name}, training"] = lambda m=module, f=forward, x=x, w=w: train(m, f, x, w)
        runs[f"{name}, inference"] = lambda f=forward, x=x: infer(f, x)
    return runs


def peak() -> Callable[[], object]:
    a, b, out = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.empty(1024, 1024)
    return lambda: torch.mm(a, b, out=out)


def _process(stocks: int, name: str, until: float, rates: "multiprocessing.SimpleQueue[float]") -> None:
    call = work(stocks)[f"{name}, training"]
    call()
    time.sleep(max(0.0, until - time.time()))
    started, steps = time.time(), 0
    while time.time() - started < 3:
        call()
        steps += 1
    rates.put(steps * stocks / (time.time() - started))


def processes(stocks: int, name: str, number: int) -> float:
    """Samples per second of wall-clock time, all processes together."""
    context = multiprocessing.get_context("spawn")
    rates, until = context.SimpleQueue(), time.time() + 6
    workers = [context.Process(target=_process, args=(stocks, name, until, rates)) for _ in range(number)]
    for worker in workers:
        worker.start()
    total = sum(rates.get() for _ in workers)
    for worker in workers:
        worker.join()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stocks", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    if not kernels():
        raise SystemExit(gru.path_in_words("fp32"))

    runs = work(given.stocks) | {"peak": peak()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for call in runs.values():
        call()
    for _ in range(given.repeats):
        for name, call in runs.items():
            times[name].append(seconds(call))

    bound = 2 * 1024**3 / min(times["peak"])
    print(
        f"{given.stocks} stocks, window {WINDOW}, GRU {FIELDS} -> {HIDDEN} x {LAYERS}, torch {torch.__version__}, "
        "1 thread,"
    )
    print(f"{given.repeats} repeats; matrix product of this machine {bound / 1e9:.0f} GFLOP/s (best)")
    print(f"{'':>28} {'samples/core-s':>14} {'best':>9} {'of nn.GRU':>9} {'best':>6} {'of the product':>14}")
    for name in runs:
        if name == "peak":
            continue
        phase = name.rsplit(", ", 1)[1]
        base = times[f"nn.GRU fp32, {phase}"]
        ratio = statistics.median(b / a for a, b in zip(times[name], base, strict=True))
        best = given.stocks / min(times[name])
        flop = FLOP * (3 if phase == "training" else 1)
        print(
            f"{name:>28} {given.stocks / statistics.median(times[name]):14,.0f} {best:9,.0f} {ratio:9.2f} "
            f"{min(base) / min(times[name]):6.2f} {best * flop / bound:14.0%}"
        )
    for name in kernels():
        path = name.split()[1]
        kept = gru.native.tape_size(path, WINDOW, given.stocks, FIELDS, HIDDEN, LAYERS) * 4 / given.stocks
        one, two = processes(given.stocks, name, 1), processes(given.stocks, name, 2)
        print(
            f"{name}: kept for backward {kept / 1024:.0f} KiB a sample; training in 1 process {one:,.0f}, "
            f"in 2 processes {two:,.0f} samples per second of the clock ({two / one:.2f} times) on "
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
        )


if __name__ == "__main__":
    main()

"""A loss surface beside as many plain forward passes, CPU seconds of one thread in one run, alternating.

GRU 6 -> 64 x 2, window 30, a linear head (38,849 weights), mean squared error over 4,000 samples. Both sides take the
samples in chunks, which fit into the caches; the surface also moves the weights to each point of the grid.

    python benchmarks/surface.py [--samples 4000] [--chunk 250] [--resolution 51] [--rounds 3]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from curvature import made
from torch import nn

from steppe.core.seeding import generator
from steppe.landscape.directions import random_directions
from steppe.landscape.point import Point
from steppe.landscape.surface import surface
from steppe.quant.gru import path


def seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--chunk", type=int, default=250)
    parser.add_argument("--resolution", type=int, default=51)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    net, batches = made(args.samples, 500, 50)
    point = Point.from_loader(net, nn.MSELoss(), batches)
    x, y = (torch.cat([batch[i] for batch in batches]) for i in (0, 1))
    chunks = list(zip(x.split(args.chunk), y.split(args.chunk), strict=True))
    axes = random_directions(point, generator(0, "directions"))

    def grid() -> None:
        surface(point, point.theta, axes, [(-1, 1), (-1, 1)], args.resolution, chunk=args.chunk)

    @torch.no_grad()
    def plain() -> None:
        for _ in range(args.resolution**2):
            sum(float(nn.functional.mse_loss(net(inputs), target)) for inputs, target in chunks)

    for precision in ("fp32", "torch"):
        net.factor.gru.precision = precision
        ratios = []
        for _ in range(args.rounds):
            ours, theirs = seconds(grid), seconds(plain)
            ratios.append(ours / theirs)
        name = "nn.GRU" if precision == "torch" else path(precision)
        print(
            f"{name:8} {args.resolution} x {args.resolution}, {args.samples} samples in chunks of {args.chunk}: "
            f"{ours:.1f} CPU-s, plain passes {theirs:.1f}; ratio {statistics.median(ratios):.3f}, "
            f"median of {args.rounds}",
            flush=True,
        )


if __name__ == "__main__":
    main()

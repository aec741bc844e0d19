"""Speed and memory of the sharpness-aware family beside its peers and beside what memory allows, in one run.

    python benchmarks/optimizers.py [--sets resnet50 small gru] [--only sam gsam] [--device cpu] [--rounds 5]
                                    [--optax-python PATH]

Prints tables in Markdown.

**Beyond the passes.** Each contender steps with gradients that are handed over, over a base optimizer that does
nothing; what handing over costs is measured and taken off. Sets of tensors: those of ResNet-50, 1,200 small ones, the
stock GRU (6 -> 64 x 2, with its head). Each runs in a process of its own, in turns, so that a busy machine slows all
alike; ratios are medians over the rounds. Time is processor time of one thread (on a GPU, until it is done).

**The bound** is what the sweeps through memory that a method cannot do without would take (`limits.LIMITS`), at the
speed of four kernels on flat memory of the same size: a norm, a copy, w + a·g, a copy back. It knows of no launches,
so it means something for large tensors only, and what has to be checked or kept is on top: ours reads the last
gradient once more to see that it is finite, and torch has no kernel that copies and adds at once.

**Memory from the system.** On Linux new pages cost several times what is done with them, and glibc gives freed memory
back at once when it lies at the end of the heap. So the first table shows what a contender costs that gets all its
temporary memory anew; the second, with an allocator that keeps what is freed, the kernels alone. Training lies
between the two, depending on what activations leave behind.

**peer** marks those of others: see `peers`. optax needs an interpreter with JAX and optax: --optax-python.
"""

from __future__ import annotations

import argparse
import inspect
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import peers
import torch
from lanes import (
    SAMPLES,
    Contender,
    Entry,
    Idle,
    Lane,
    Momentum,
    Rolling,
    Sample,
    Shapes,
    Times,
    bound,
    footprint,
    measured,
    mover,
    sampler,
)
from limits import LIMITS
from peers import LR, Build, Step
from torch import Tensor, nn
from torch.optim import Optimizer

from steppe.optim import OPTIMIZERS, create
from steppe.optim.registry import optimizer_class
from steppe.optim.sharpness.ascent import Perturbation
from steppe.optim.sharpness.gradients import gradient_of
from steppe.testing.rig import Rig

SHARPNESS = [key for key, spec in OPTIMIZERS.items() if spec.family == "sharpness-aware"]
CYCLE = {"looksam": 5}
"""Steps that are timed together; else 2, since some take turns with their memory."""


# -- sets of tensors -------------------------------------------------------------------------------------------------


def resnet50(divisor: int = 1) -> Iterator[tuple[int, ...]]:
    """Shapes of ResNet-50's parameters, all widths divided."""
    inside = 64 // divisor
    yield from ((inside, 3, 7, 7), (inside,), (inside,))
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        narrow, wide = width // divisor, 4 * width // divisor
        for block in range(blocks):
            sizes = [(narrow, inside, 1, 1), (narrow, narrow, 3, 3), (wide, narrow, 1, 1)]
            if not block:
                sizes.append((wide, inside, 1, 1))
            for size in sizes:  # a convolution, and the weight and bias of its batch normalisation
                yield from (size, size[:1], size[:1])
            inside = wide
    yield from ((1000 // divisor, inside), (1000 // divisor,))


def stock_gru() -> Iterator[tuple[int, ...]]:
    for module in (nn.GRU(6, 64, 2), nn.Linear(64, 1)):
        yield from (tuple(param.shape) for param in module.parameters())


@dataclass(frozen=True)
class Set:
    """Tensors, and how many samples a round takes of them."""

    title: str
    shapes: Shapes
    samples: int

    @property
    def numbers(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


SETS = {
    "resnet50": Set("ResNet-50", list(resnet50()), 1),
    "small": Set("1,200 small tensors", [(64, 64), (64,), (64, 32), (32,)] * 300, 2),
    "gru": Set("stock GRU", list(stock_gru()), 60),
}


# -- contenders ------------------------------------------------------------------------------------------------------


def ours(key: str, restore: str, **hyper: Any) -> Build:
    """A registered optimizer, called with a closure."""

    def build(params: list[nn.Parameter], base: type[Optimizer]) -> Step:
        asked = inspect.signature(optimizer_class(key)).parameters
        given: dict[str, Any] = {"base": base, "lr": LR} if "base" in asked else {}
        demo = OPTIMIZERS[key].demos[0]  # what has no default
        given |= {
            name: demo[name] for name in demo if name in asked and asked[name].default is asked[name].empty
        }
        optimizer: Any = create(key, params, restore=restore, **given, **hyper)

        def step(backward: Callable[..., Any]) -> None:
            if hasattr(optimizer, "tail"):
                optimizer.tail = torch.arange(SAMPLES) % 2 == 0
            optimizer.step(backward)

        return step

    return build


def entries(key: str, base: type[Optimizer] = Idle) -> list[Entry]:
    """A method's lines: ours, then the peers that have it."""
    variants = {"": {}, ", by tensor": {"norms": "tensor"}} if key == "looksam" else {"": {}}
    ways = ("copy", "swap", "subtract") if key in peers.PYTORCH_OPTIMIZER else ("copy", "subtract")
    rows = [
        (f"{key}{suffix}, {way}", ours(key, way, **hyper))
        for suffix, hyper in variants.items()
        for way in ways[: 1 if suffix else 3]
    ]
    if key == "sam":
        rows += [("bare foreach", peers.bare_foreach), ("peer: davda54", peers.davda54)]
    if key in peers.PYTORCH_OPTIMIZER:
        rows += [
            (f"peer: pytorch_optimizer, {how}", peers.pytorch_optimizer(key, how == "foreach"))
            for how in ("one by one", "foreach")
        ]
    if key == "msam" and base is Idle:
        base = Rolling
    passes = math.ceil(LIMITS[key].passes)
    return [Entry(name, build, passes, CYCLE.get(key, 2), base) for name, build in rows]


def move_ours(restore: str) -> Callable[[list[nn.Parameter]], Callable[[], None]]:
    """There and back along ``.grad``, without a pass between."""

    def make(params: list[nn.Parameter]) -> Callable[[], None]:
        optimizer: Any = create("sam", params, base=Idle, restore=restore)
        direction = gradient_of(optimizer.bucketed(lambda index, param: True))

        @torch.no_grad()
        def move() -> None:
            with optimizer.perturbed(Perturbation(direction, [1e-3])):
                pass

        return move

    return make


MOVES = {
    "ours, copy": move_ours("copy"),
    "ours, swap": move_ours("swap"),
    "ours, subtract": move_ours("subtract"),
    "bare foreach": peers.move_bare_foreach,
    "peer: davda54": peers.move_davda54,
}


# -- tables ----------------------------------------------------------------------------------------------------------


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"\n### {title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "|".join([" --- "] + [" ---: "] * (len(columns) - 1)) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def milliseconds(seconds: float) -> str:
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.3f}"


class Timing:
    """The tables of seconds for one set of tensors.

    Args:
        tensors: the set.
        source: random numbers, of which all gradients are made.
        device: where to run.
        rounds: number of rounds.
        optax: an interpreter that has optax, or None.
    """

    def __init__(self, tensors: Set, source: Tensor, device: str, rounds: int, optax: str | None) -> None:
        self.tensors, self.source, self.device = tensors, source, torch.device(device)
        self.rounds, self.optax = rounds, optax

    def beyond_the_passes(self, keys: Sequence[str], keep: bool = False) -> None:
        rows = []
        for key in keys:
            times = self._times(entries(key), keep, optax=key == "sam" and not keep)
            rows += self._lines(times, times[f"{key}, copy"], LIMITS[key].accesses)
        self._table(
            "beyond the passes, over a base that does nothing" + (", memory kept" if keep else ""),
            ("of the bound", "of ours, copy"),
            rows,
        )

    def over_sgd(self) -> None:
        alone = Entry("SGD alone", peers.plain, 1, base=Momentum)
        times = self._times([alone, *entries("sam", Momentum)])
        self._table(
            "whole step of SAM over SGD with momentum, beyond the passes",
            ("of SGD alone", "of ours, copy"),
            self._lines(times, times["sam, copy"], 0, times["SGD alone"]),
        )

    def perturb_and_restore(self) -> None:
        """Without norm, checks and loop."""
        for keep in (False, True):
            lanes = {"bound": self._bound(keep)} | {
                name: self._lane(lambda values, move=move: mover(move, values, self.tensors.shapes), keep)
                for name, move in MOVES.items()
            }
            times = {
                name: Times(each) for name, each in measured(lanes, self.rounds, self.tensors.samples).items()
            }
            self._table(
                "perturb and restore alone, the norm known" + (", memory kept" if keep else ""),
                ("of the bound", "of ours, copy"),
                self._lines(times, times["ours, copy"], 6),
            )

    def _times(self, lines: Sequence[Entry], keep: bool = False, optax: bool = False) -> dict[str, Times]:
        """By name, with "bound" for 8 accesses; `optax` beside them, over a base that does nothing."""
        lanes: dict[str, Contender] = {"bound": self._bound(keep)}
        for line in lines:
            lanes[line.name] = self._lane(
                lambda values, line=line: sampler(line, values, self.tensors.shapes), keep
            )
        if optax and self.optax:
            lanes["peer: optax"] = peers.Optax(self.optax, self.tensors.shapes)
        return {
            name: Times(each) for name, each in measured(lanes, self.rounds, self.tensors.samples).items()
        }

    def _bound(self, keep: bool) -> Lane:
        return self._lane(lambda values: bound(values, self.tensors.numbers), keep)

    def _lane(self, make: Callable[[Tensor], Callable[[], Sample]], keep: bool) -> Lane:
        return Lane(lambda: make(self.source.to(self.device)), keep)

    def _lines(
        self, times: dict[str, Times], first: Times, accesses: float, unit: Times | None = None
    ) -> list[tuple[str, ...]]:
        unit = unit or times["bound"]
        share = accesses / 8 if unit is times["bound"] else 1
        return [
            (
                name,
                milliseconds(each.best),
                milliseconds(each.middle),
                f"{each.over(unit) / share:.2f}" if share else "",
                f"{each.over(first):.2f}",
                f"{each.faults:,.0f}",
            )
            for name, each in times.items()
            if name != "bound"
        ]

    def _table(self, what: str, ratios: tuple[str, str], rows: Sequence[Sequence[str]]) -> None:
        numbers, count = self.tensors.numbers, len(self.tensors.shapes)
        table(
            f"{self.tensors.title} ({count:,} tensors, {numbers / 1e6:.3g} M numbers): {what}",
            ("", "ms, best", "ms, median", *ratios, "page faults"),
            rows,
        )


def copies(source: Tensor, device: str) -> None:
    """Copies of the weights that are held, over SGD with momentum, beside the least."""
    shapes = list(resnet50(4))
    unit = 4 * sum(math.prod(shape) for shape in shapes)

    def held(build: Build) -> tuple[float, float]:
        # in a process of its own: what one contender leaves behind must not be freed under another
        lane: Any = Lane(lambda: lambda: footprint(build, Momentum, source.to(device), shapes, steps=6))
        ((peak, after),) = lane.run(1)
        lane.close()
        return peak / unit, after / unit

    least = held(peers.plain)
    builds: dict[str, tuple[str, Build]] = {}
    for key in SHARPNESS:
        builds |= {f"{key}, {restore}": (key, ours(key, restore)) for restore in ("copy", "subtract")}
        if key == "sam":
            builds |= {"bare foreach": (key, peers.bare_foreach), "peer: davda54": (key, peers.davda54)}
        if key in peers.PYTORCH_OPTIMIZER:
            builds["peer: pytorch_optimizer"] = key, peers.pytorch_optimizer(key, True)
    rows = []
    for name, (key, build) in builds.items():
        peak, after = held(build)
        limit = LIMITS.get(key)
        rows.append(
            (
                name,
                f"{peak - least[0]:.2f}",
                limit.peak if limit else "",
                f"{after - least[1]:.2f}",
                limit.persistent if limit else "",
            )
        )
    table(
        "Copies of the weights beside weights, gradients and the base's state (ResNet-50, a quarter as wide)",
        ("", "within a step", "least", "between steps", "least"),
        rows,
    )


def passes() -> None:
    """Gradients that are taken in 20 steps."""
    rows = []
    for key in SHARPNESS:
        spec = OPTIMIZERS[key]
        rig = Rig(spec, spec.demos[0])
        rig.train(20)
        least = LIMITS[key].passes if key in LIMITS else spec.evals
        rows.append((key, str(rig.passes), f"{20 * least:g}" + (" on average" if spec.random else "")))
    table("Gradients in 20 steps", ("", "counted", "by the method"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--only", nargs="*", default=list(LIMITS), choices=list(LIMITS), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--optax-python", metavar="PATH", help="an interpreter with jax and optax")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # the bases' own gradients do not matter here

    print(f"torch {torch.__version__}, {given.device}, 1 thread, {given.rounds} rounds, ", end="")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores at the start")
    if not given.optax_python:
        print("optax.contrib.sam is left out: give --optax-python an interpreter that has jax and optax.")
    started, before = time.perf_counter(), sum(os.times()[:4])
    for key in given.only:  # what is imported once is there before lanes are forked
        for entry in entries(key):
            sampler(entry, torch.randn(2000), [(2, 3), (3,)])()
    shared = [key for key in given.only if key == "sam" or key in peers.PYTORCH_OPTIMIZER]
    for name in given.sets:
        tensors = SETS[name]
        # the lanes are forked from here: this memory is theirs too, and a GPU is not touched before
        source = torch.randn(tensors.numbers + 1000, generator=torch.Generator().manual_seed(0)) / 1000
        timing = Timing(tensors, source, given.device, given.rounds, given.optax_python)
        timing.beyond_the_passes(given.only if name == "resnet50" else shared)
        if name == "resnet50":
            timing.beyond_the_passes(shared, keep=True)
            timing.perturb_and_restore()
        timing.over_sgd()
    copies(torch.randn(3_000_000) / 1000, given.device)
    passes()
    spent = sum(os.times()[:4]) - before
    print(
        f"\n{time.perf_counter() - started:.0f} s ({spent:.0f} s of processor time), "
        f"load {os.getloadavg()[0]:.1f} at the end"
    )


if __name__ == "__main__":
    main()

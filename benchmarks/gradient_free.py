"""Gradient-free optimizers beside their peers at equal budgets, and populations evaluated together.

    python benchmarks/gradient_free.py                    # a few minutes on one core
    python benchmarks/gradient_free.py --seeds 3 --problems autoencoder --only "cma"

First, a population by `Objective.values` against one candidate at a time, as users write it: weights from a vector into
``.data``, forward, ``.item()``. CPU seconds of one thread, the best of some repeats.

Then the smallest loss within 10,000 forward passes, a gradient counted as three. A seed draws the start, which is the
same for all. CMA-ES, SLSQP and Adam go from there without bounds, CMA-ES with a standard deviation of 0.3 of the box
(0.1 on the MLP); swarms, differential evolution and annealing search the box. Populations are each package's own
default, 40 where it has none or where its own (SciPy's 15 a weight) is more than a tenth of the budget. A peer that
hands over a population has it evaluated together, the others call once per candidate. Searches run until the budget is
spent or they say that they have converged. Full covariances are for up to 100 weights (--full for all).

Verdicts compare the decades of (loss - floor), at least 1e-8, paired by seed: mean difference and 95 % over bootstrap
samples of the seeds. Time per evaluation is CPU time of the whole run, loss included, over its evaluations: the median
of the seeds; jax compiles before. "One by one" is what it would be if the peer had each candidate evaluated alone, as
it does without `Objective.values`. The peers (cma, cmaes, pyswarms, evosax, SciPy) are optional; what is missing is
skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from gradient_free_losses import BUDGET, PROBLEMS, Array, Counted, Problem, Spent
from gradient_free_peers import PEERS, Row
from torch import nn

from steppe.core.flat import flatten
from steppe.core.seeding import derive, generator
from steppe.optim import create

WIDEST = 100  # weights, for a full covariance
RESOLUTION = 1e-8  # of loss - floor
FIRST_SEED = 100  # defaults were chosen on lower ones


def ours(counted: Counted, key: str, bounded: bool = False, seeded: bool = True, **hyper: Any) -> None:
    given = {**hyper, **({"bounds": counted.problem.box} if bounded else {})}
    if key == "cma_es":
        given["sigma"] = counted.problem.sigma
    if seeded:
        given["seed"] = counted.seed
    search: Any = create(key, counted.parameters, **given)
    while not counted.over and not search.finished:
        search.step(counted)


def adam(counted: Counted) -> None:
    steps = counted.budget // 3
    optimizer = create("adam", counted.parameters, lr=counted.problem.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.step(counted)
        schedule.step()


def steppes() -> Iterator[Row]:
    def row(name: str, family: str, key: str, full: bool = False, **settings: Any) -> Row:
        return Row(f"steppe {name}", family, partial(ours, key=key, **settings), full)

    yield row("cma_es", "CMA-ES", "cma_es", full=True)
    yield row("cma_es bipop", "CMA-ES, restarts", "cma_es", full=True, restarts="bipop")
    yield row("cma_es separable", "CMA-ES, separable", "cma_es", covariance="separable")
    yield row("pso", "PSO", "pso", bounded=True)
    yield row("differential_evolution", "DE", "differential_evolution", bounded=True)
    yield row("annealing", "", "annealing", bounded=True)
    yield row("dual_annealing", "dual annealing", "dual_annealing", bounded=True, maxiter=10**6)
    yield row(
        "dual_annealing, no local search",
        "dual annealing alone",
        "dual_annealing",
        bounded=True,
        local_search="none",
        maxiter=10**6,
    )
    yield row("slsqp (gradients)", "", "slsqp", seeded=False, ftol=1e-12, maxiter=10**5)
    yield Row("steppe adam, cosine (gradients)", "", adam)


def rows() -> list[Row]:
    found = list(steppes())
    for make in PEERS:
        try:
            found += make()
        except ImportError as error:
            print(f"{make.__name__.rstrip('s')} skipped: {error}")
    return found


def batched(repeats: int = 10) -> None:
    """Print the CPU time of `Objective.values` and of the article's loop."""
    print("a population at once (Objective.values) against one at a time, CPU ms, best of repeats")
    for problem in (PROBLEMS["autoencoder"](), PROBLEMS["mlp"]()):
        model, (inputs, targets) = problem.objective.model, problem.objective.batch
        criterion = nn.MSELoss()

        def loss(x: Array, model: Any = model, inputs: Any = inputs, targets: Any = targets) -> float:
            vector, at = torch.tensor(x), 0
            for parameter in model.parameters():
                size = parameter.numel()
                parameter.data = vector[at : at + size].view(parameter.shape)
                at += size
            return criterion(model(inputs), targets).item()  # noqa: B023

        for population in (10, 100, 1000):
            draw = generator(0, "batched", population)
            theta = torch.randn(population, problem.dim, generator=draw, dtype=torch.float64)
            x = theta.numpy()
            together = problem.objective.values(theta)
            alone = torch.tensor([loss(row) for row in x], dtype=torch.float64)
            off = float(((together - alone) / alone).abs().max())
            whole = best_time(partial(problem.objective.values, theta), repeats, max(1, 100 // population))
            single = best_time(lambda x=x, loss=loss: [loss(row) for row in x], repeats, 1)
            print(
                f"  {problem.name:12} {problem.dim:5} weights, population {population:4}: {1e3 * whole:8.3f} "
                f"against {1e3 * single:8.2f}, {single / whole:5.1f} times; largest relative difference {off:.0e}",
                flush=True,
            )


def best_time(call: Callable[[], Any], repeats: int, calls: int) -> float:
    """CPU seconds of one call, the least of the repeats."""
    least = math.inf
    for _ in range(repeats):
        began = time.process_time()
        for _ in range(calls):
            call()
        least = min(least, (time.process_time() - began) / calls)
    return least


@dataclass(frozen=True)
class Result:
    """Over the seeds."""

    row: Row
    losses: Array
    evaluations: Array
    each: Array  # CPU seconds per evaluation, all
    search: Array  # without the loss

    def decades(self, floor: float) -> Array:
        return np.log10(np.maximum(self.losses - floor, RESOLUTION))

    def line(self) -> str:
        ranked = np.sort(self.losses)
        end = min(1, (len(ranked) - 1) // 2)
        low, high = ranked[end], ranked[len(ranked) - 1 - end]
        return (
            f"  {self.row.name:39} {np.median(ranked):11.6g} {low:11.6g} {high:11.6g} "
            f"{int(np.median(self.evaluations)):7d} "
            f"{1e6 * np.median(self.each):8.1f} {1e6 * np.median(self.search):8.1f}"
        )


def measure(problem: Problem, row: Row, seeds: Sequence[int]) -> Result:
    found = []
    for seed in [None, *seeds] if "evosax" in row.name else seeds:  # once for jax to compile
        warm = seed is None
        drawn = derive(seed or 0, problem.name)
        start = problem.start(generator(drawn, "start"))
        counted = Counted(problem, start, drawn, 200 if warm else BUDGET)
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peers' on overflow
            with contextlib.suppress(Spent):
                row.run(counted)
        spent = time.process_time() - began
        if not warm:
            n = counted.evaluations
            found.append((counted.best, min(n, BUDGET), spent / n, (spent - counted.seconds) / n))
    return Result(row, *(np.array(column) for column in zip(*found, strict=True)))


def interval(differences: Array, samples: int = 10_000) -> tuple[float, float]:
    """95 % of the means of bootstrap samples."""
    picks = np.random.default_rng(0).integers(len(differences), size=(samples, len(differences)))
    low, high = np.quantile(differences[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def verdicts(problem: Problem, results: Sequence[Result]) -> Iterator[str]:
    """Ours against the best peer: of each family, and of all."""
    compared = [result for result in results if result.row.family]
    x = flatten(problem.objective.parameters)
    alone = best_time(lambda: problem.value(x), repeats=5, calls=100)
    families = dict.fromkeys(result.row.family for result in compared)
    for family in (*families, "all"):
        here = [result for result in compared if family in (result.row.family, "all")]
        sides = [[result for result in here if result.row.ours is mine] for mine in (True, False)]
        if not all(sides):
            continue

        def rank(result: Result) -> tuple[float, float]:
            decades = result.decades(problem.floor)
            return float(np.median(decades)), float(decades.mean())

        own, peer = (min(side, key=rank) for side in sides)
        differences = own.decades(problem.floor) - peer.decades(problem.floor)
        low, high = interval(differences)
        word = "within noise" if low <= 0 <= high else "better" if high < 0 else "WORSE"
        line = f"    {family:20} {own.row.name} against {peer.row.name}: {differences.mean():+.2f} decades "
        line += f"[{low:+.2f}, {high:+.2f}], {word}"
        if problem.is_module and family != "all":
            spent = np.median(own.each)
            times = ", ".join(
                f"{other.row.name} {np.median(other.each) / spent:.2f} "
                f"({(np.median(other.search) + alone) / spent:.2f} one by one)"
                for other in sides[1]
            )
            line += f"; time per evaluation over ours: {times}"
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument(
        "--only", nargs="+", help="rows whose name has one of these in it; 'batched' for the first part alone"
    )
    parser.add_argument("--full", action="store_true", help="full covariances of many weights too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only in (None, ["batched"]):
        batched()
    if args.only == ["batched"]:
        return
    seeds = range(FIRST_SEED, FIRST_SEED + args.seeds)
    chosen = [row for row in rows() if args.only is None or any(word in row.name for word in args.only)]
    for name in args.problems:
        problem = PROBLEMS[name]()
        print(
            f"{name}: {problem.dim} weights, floor {problem.floor:.10g}, box {problem.box}, {BUDGET:,} forward passes, "
            f"{len(seeds)} seeds\n"
            f"  {'':39} {'median':>11} {'2nd best':>11} {'2nd worst':>11} {'passes':>7} {'us each':>8} {'search':>8}"
        )
        results = []
        for row in chosen:
            if row.full and problem.dim > WIDEST and not args.full:
                continue
            results.append(measure(problem, row, seeds))
            print(results[-1].line(), flush=True)
        print("  ours against the best peer, loss above the floor; paired by seed", flush=True)
        for line in verdicts(problem, results):
            print(line, flush=True)


if __name__ == "__main__":
    main()

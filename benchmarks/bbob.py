"""CMA-ES with restarts beside pycma's on the 24 noiseless BBOB functions.

    python benchmarks/bbob.py                                # BIPOP, dimensions 5, 10, 20: a few minutes on one core
    python benchmarks/bbob.py --restarts ipop --budget 2000 --instances 15

Functions and their instances come from coco-experiment, the peer from cma (both in the extra `dev`). A problem is one
function and one instance; both optimizers start it from the same point, drawn in [-4, 4]^dim, with a standard deviation
of 2, and restart around it. Scored are 51 targets per problem, from 10^2 to 10^-8 above the minimum: how many are
reached within the budget, and how early (area under their distribution over log evaluations, 0 to 1). ERT is the
expected running time to 10^-8, evaluations of all runs per success; its ratio is over the functions that both solved.

Differences are paired by problem; the interval is of their mean, over bootstrap samples of the problems.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from steppe.core.seeding import derive
from steppe.optim import CMAES

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pycma misses matplotlib
        import cma
    from cocoex import BareProblem
except ImportError as missing:
    sys.exit(
        f"needs pycma and coco-experiment (pip install -c constraints.txt cma coco-experiment): {missing}"
    )

TARGETS = 10.0 ** np.linspace(2, -8, 51)
SIGMA = 2.0


class Counted:
    """A problem that notes when each target is reached, and ends the run after the budget or the last target."""

    def __init__(self, problem: BareProblem, budget: int) -> None:
        self.problem, self.budget = problem, budget
        self.minimum = problem.best_value()
        self.evaluations = 0
        self.seconds = 0.0
        self.reached = np.full(len(TARGETS), np.inf)

    def __call__(self, x: np.ndarray) -> float:
        return self.many(np.asarray(x)[None])[0]

    def many(self, x: np.ndarray) -> list[float]:
        started = time.process_time()
        values = np.atleast_1d(self.problem(np.ascontiguousarray(x)))
        at = self.evaluations + 1 + np.arange(len(values))
        least = np.minimum.accumulate(values - self.minimum)
        for j in np.flatnonzero(np.isinf(self.reached) & (least[-1] <= TARGETS)):
            when = at[np.argmax(least <= TARGETS[j])]
            self.reached[j] = when if when <= self.budget else np.inf
        self.evaluations += len(values)
        self.seconds += time.process_time() - started
        return values.tolist()

    @property
    def over(self) -> bool:
        return self.evaluations >= self.budget or bool(np.isfinite(self.reached[-1]))


def ours(counted: Counted, start: np.ndarray, restarts: str, seed: int) -> None:
    x = torch.nn.Parameter(torch.tensor(start))
    search = CMAES([x], sigma=SIGMA, restarts=restarts, seed=seed)
    while not counted.over and not search.finished:
        search.tell(torch.tensor(counted.many(search.ask().numpy()), dtype=torch.float64))


def pycmas(counted: Counted, start: np.ndarray, restarts: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    begun = []

    def somewhere() -> np.ndarray:
        begun.append(start + SIGMA * rng.standard_normal(len(start)) if begun else start)
        return begun[-1]

    options = {
        "verbose": -9,
        "seed": seed % 2**31 + 1,
        "maxfevals": counted.budget,
        "ftarget": counted.minimum + TARGETS[-1],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cma.fmin2(
            counted,
            somewhere,
            SIGMA,
            options,
            restarts=0 if restarts == "none" else 9,
            bipop=restarts == "bipop",
        )


RUNNERS = {"steppe": ours, "pycma": pycmas}


def run(args: argparse.Namespace) -> list[dict]:
    rows = []
    for dim in args.dimensions:
        for function in args.functions:
            for instance in range(1, args.instances + 1):
                seed = derive(args.seed, function, instance, dim)
                start = np.random.default_rng(seed).uniform(-4, 4, dim)
                for name, runner in RUNNERS.items():
                    counted = Counted(BareProblem("bbob", function, dim, instance), args.budget * dim)
                    began = time.process_time()
                    runner(counted, start, args.restarts, seed)
                    seconds = time.process_time() - began - counted.seconds
                    rows.append(
                        {
                            "dim": dim,
                            "function": function,
                            "instance": instance,
                            "optimizer": name,
                            "reached": counted.reached,
                            "evaluations": min(counted.evaluations, counted.budget),
                            "overhead": seconds / counted.evaluations,
                        }
                    )
        print(f"dimension {dim} done", file=sys.stderr)
    return rows


def scores(rows: list[dict], budget: int) -> dict[str, np.ndarray]:
    """Per problem: the share of targets reached, and the area under their distribution over log evaluations."""
    reached = np.stack([row["reached"] for row in rows])
    end = math.log(budget * rows[0]["dim"])
    return {
        "solved": np.isfinite(reached).mean(1),
        "area": np.where(
            np.isfinite(reached), 1 - np.log(np.minimum(reached, budget * rows[0]["dim"])) / end, 0
        ).mean(1),
    }


def interval(differences: np.ndarray, samples: int = 10_000) -> tuple[float, float]:
    """95 % of the means of bootstrap samples."""
    picks = np.random.default_rng(0).integers(len(differences), size=(samples, len(differences)))
    low, high = np.quantile(differences[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)


def running_times(rows: list[dict]) -> dict[int, float]:
    """Function -> expected running time to the last target; only functions solved at least once."""
    spent: dict[int, list[float]] = {}
    for row in rows:
        last = row["reached"][-1]
        total = spent.setdefault(row["function"], [0.0, 0])
        total[0] += last if math.isfinite(last) else row["evaluations"]
        total[1] += math.isfinite(last)
    return {function: total / count for function, (total, count) in spent.items() if count}


def report(rows: list[dict], args: argparse.Namespace) -> None:
    print(
        f"BBOB, {len(args.functions)} functions x {args.instances} instances, {args.budget} x dim evaluations, "
        f"restarts {args.restarts}; pycma {cma.__version__}"
    )
    print(
        "dim | targets reached: steppe  pycma  difference [95 %]         | area: steppe  pycma  difference [95 %]"
        "          | solved both  ERT ratio | overhead us/evaluation: steppe  pycma"
    )
    verdicts = []
    for dim in (*args.dimensions, None):
        here = {
            name: [row for row in rows if row["optimizer"] == name and dim in (row["dim"], None)]
            for name in RUNNERS
        }
        parts = {
            name: [
                scores([r for r in found if r["dim"] == d], args.budget)
                for d in args.dimensions
                if dim in (d, None)
            ]
            for name, found in here.items()
        }
        line = f"{dim or 'all':>3}"
        for kind in ("solved", "area"):
            a, b = (np.concatenate([part[kind] for part in parts[name]]) for name in RUNNERS)
            low, high = interval(a - b)
            line += f" | {a.mean():.4f}  {b.mean():.4f}  {(a - b).mean():+.4f} [{low:+.4f}, {high:+.4f}]"
            word = "within noise" if low <= 0 <= high else "steppe better" if low > 0 else "pycma better"
            verdicts.append(f"{dim or 'all'} {kind}: {word}")
        times = [running_times(here[name]) for name in RUNNERS] if dim else [{}, {}]
        both = sorted(times[0].keys() & times[1].keys())
        if both:
            ratio = math.exp(np.mean([math.log(times[0][f] / times[1][f]) for f in both]))
            line += f" | {len(both):2d} ({len(times[0])}, {len(times[1])})  {ratio:.3f}"
        per = [1e6 * float(np.median([row["overhead"] for row in here[name]])) for name in RUNNERS]
        print(line + f" | {per[0]:.1f}  {per[1]:.1f}")
    print("verdict (difference paired by problem): " + "; ".join(verdicts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dimensions", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--functions", type=int, nargs="+", default=list(range(1, 25)))
    parser.add_argument("--instances", type=int, default=3)
    parser.add_argument("--budget", type=int, default=300, help="evaluations per dimension")
    parser.add_argument("--restarts", choices=("none", "ipop", "bipop"), default="bipop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write every run to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = run(args)
    report(rows, args)
    if args.json:
        plain = [
            {**row, "reached": [t if math.isfinite(t) else None for t in row["reached"]]} for row in rows
        ]
        args.json.write_text(json.dumps(plain))


if __name__ == "__main__":
    main()

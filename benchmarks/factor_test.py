"""CPU time of the factor test beside alphalens-reloaded, and of what both of them have in common.

    python benchmarks/factor_test.py [--peer PYTHON] [--stocks 1000] [--dates 1500] [--repeat 5]

PYTHON is an interpreter whose environment has alphalens-reloaded (it brings IPython, matplotlib and statsmodels, so
this project does not ask for it); without it only our own times are shown. Both test the same scores on the same
simulated prices with 5 % of the bars missing, every date a rebalance. The four core steps are alphalens's own: clean
factor with forward returns over 1, 5 and 10 sessions, RankIC of each, mean return by decile and date, decile turnover.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from steppe.quant.factor_test import FactorTester
from steppe.quant.labels import forward_returns_over
from steppe.quant.layers import form_layers
from steppe.quant.panel import FIELDS, Panel
from steppe.quant.ranking import Ordered

PERIODS = (1, 5, 10)
LAYERS = 10


def market(dates: int, stocks: int) -> tuple[Panel, np.ndarray]:
    """A random walk with 5 % of the bars missing, with returns after every one of `dates`; scores of some foresight."""
    rng = np.random.default_rng(0)
    shape = (dates + max(PERIODS) + 1, stocks)
    moves = 0.02 * rng.standard_normal(shape)
    prices = 10 * np.exp(np.cumsum(moves, axis=0))
    prices[rng.random(shape) < 0.05] = np.nan
    on, off = np.isfinite(prices), np.zeros(shape, dtype=bool)
    panel = Panel(
        name="benchmark",
        simulated=True,
        fingerprint="",
        dates=np.busday_offset("2015-01-05", np.arange(shape[0])),
        symbols=np.array([f"S{i:04d}" for i in range(stocks)]),
        values=np.repeat(prices[:, :, None], len(FIELDS), axis=2).astype(np.float32),
        factor=np.where(on, 1, np.nan).astype(np.float32),
        traded=on,
        listed=~off,
        delisted=off,
        age=np.full(shape, 1000, dtype=np.int32),
        limit_up=off,
        limit_down=off,
        sealed_up=off,
        sealed_down=off,
        special=off,
        industry=np.broadcast_to(rng.integers(0, 30, stocks).astype(np.int16), shape),
        float_cap=np.exp(rng.standard_normal(shape)).astype(np.float32),
        industries=tuple(str(i) for i in range(30)),
    )
    future = sum(moves[step : step + dates] for step in range(2, 7))
    scores = (future + 0.9 * rng.standard_normal((dates, stocks))).astype(np.float32)
    scores[~on[1 : dates + 1]] = np.nan  # whom alphalens could not drop by itself
    return panel, scores


class Core:
    """The four steps of alphalens with the parts of `FactorTester`."""

    def __init__(self, panel: Panel, dates: int) -> None:
        self.returns = forward_returns_over(panel, PERIODS, rows=np.arange(dates))
        self.order = {period: Ordered(returns) for period, returns in self.returns.items()}
        self.known = np.isfinite(self.returns[PERIODS[0]])

    def test(self, scores: np.ndarray) -> dict[str, list[float]]:
        rank = Ordered(scores).ranks(np.isfinite(scores) & self.known)
        rank_ic = [float(np.nanmean(self.order[period].rank_ic(rank))) for period in PERIODS]
        layers = form_layers(rank, LAYERS)
        means = [layers.mean(self.returns[period]) for period in PERIODS]
        return {
            "rank_ic": rank_ic,
            "top": [float(mean[:, LAYERS].mean()) for mean in means],
            "turnover": np.nanmean(layers.entered()[:, 1:], axis=0).tolist(),
        }


def fastest(call: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """The least CPU seconds of a call (other work on the machine only ever adds), and its result."""
    times = []
    for _ in range(repeat):
        started = time.process_time()
        result = call()
        times.append(time.process_time() - started)
    return min(times), result


def peer(python: str, panel: Panel, scores: np.ndarray, repeat: int) -> dict[str, Any] | None:
    """The fastest of `repeat` runs of alphalens, on prices of t + 1 at t, the last known one carried on."""
    prices = np.array(panel.field("vwap"), dtype=np.float64)
    for before, now in pairwise(prices):
        np.copyto(now, before, where=np.isnan(now))
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "market.npz"
        np.savez(path, scores=scores, prices=prices[1:], days=panel.dates)
        for _ in range(repeat):
            command = [python, str(Path(__file__).with_name("alphalens_peer.py")), str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"alphalens-reloaded did not run in {python}: {done.stderr.strip().splitlines()[-1]}")
                return None
            runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    return min(runs, key=lambda run: sum(run["seconds"].values()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", default=sys.executable, help="interpreter that has alphalens-reloaded")
    parser.add_argument("--stocks", type=int, default=1000)
    parser.add_argument("--dates", type=int, default=1500)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    panel, scores = market(options.dates, options.stocks)
    rows = np.arange(options.dates)

    prepare, core = fastest(lambda: Core(panel, options.dates), options.repeat)
    factor, ours = fastest(lambda: core.test(scores), options.repeat)
    rows_of = {"every date": rows, "weekly": rows[::5]}
    full = {}
    for dates, at in rows_of.items():
        prepared, tester = fastest(lambda at=at: FactorTester(panel, at), options.repeat)
        full[dates] = prepared, fastest(lambda t=tester, at=at: t.test(scores[at]), options.repeat)[0]
    theirs = peer(options.peer, panel, scores, max(1, options.repeat // 2))

    print(
        f"{options.stocks} stocks x {options.dates} dates, 5 % missing; CPU seconds, best of {options.repeat}"
    )
    print(f"  four core steps, one factor      {prepare + factor:7.3f}  (shared {prepare:.3f})")
    print(f"  four core steps, a further one   {factor:7.3f}")
    for dates, (prepared, one) in full.items():
        print(
            f"  FactorTester, {dates:<18} {prepared + one:7.3f}  (shared {prepared:.3f}, a further one {one:.3f})"
        )
    if theirs is None:
        return
    print(f"alphalens-reloaded {theirs['version']}")
    for step, seconds in theirs["seconds"].items():
        print(f"  {step:<32} {seconds:7.3f}")
    total = sum(theirs["seconds"].values())
    print(f"  {'together':<32} {total:7.3f}")
    print(
        f"times as fast: {total / (prepare + factor):.0f} for one factor, {total / factor:.0f} for each further one"
    )
    for key in ("rank_ic", "top", "turnover"):
        gap = np.abs(np.array(ours[key]) - theirs[key]).max()
        print(f"  largest difference of {key:<9} {gap:.1e}  (means over dates)")


if __name__ == "__main__":
    main()

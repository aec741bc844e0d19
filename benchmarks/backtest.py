"""CPU time of one weekly backtest over eight years of 3,400 stocks, beside its slow equal in Python and vectorbt.

    python benchmarks/backtest.py [--peer PYTHON] [--sessions 1950] [--stocks 3400] [--repeat 7]

PYTHON is an interpreter whose environment has vectorbt (it brings numba and pandas, so this project does not ask for
it). Decisions are looked up in an array: only the backtest itself is timed. The portfolio is 200 equal names, of
which a fifth changes each week. Two made-up markets: one with suspensions, sealed limits and delistings, for ourselves
and the slow one in Python; one in which everything trades every day and costs are 0, for vectorbt: there both mean the
same, and the daily returns must agree. (With costs vectorbt lets the orders at the end of the queue go short of
cash, we cut all purchases alike; it knows no suspended or sealed session and no delisting.)
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests" / "quant"))
from panels import make_panel
from slow_backtest import slow_backtest

from steppe.quant.backtest import backtest
from steppe.quant.panel import Panel
from steppe.quant.performance import excess_metrics

EVERY, NAMES = 5, 200


def rough(plain: Panel, rng: np.random.Generator) -> Panel:
    """The market with 2 % of its bars missing in spells of ten, 1 % of the sessions sealed, and delistings."""
    begins = rng.random(plain.shape) < 0.002
    suspended = np.zeros(plain.shape, bool)
    for lag in range(10):
        suspended[lag:] |= begins[: len(begins) - lag]
    delisted = np.cumsum(rng.random(plain.shape) < 2e-5, axis=0) > 0
    traded = ~suspended & ~delisted
    sealed = rng.random(plain.shape)
    return make_panel(
        plain.shape,
        traded=traded,
        delisted=delisted,
        sealed_up=traded & (sealed < 0.005),
        sealed_down=traded & (sealed > 0.995),
    )


def targets(rng: np.random.Generator, rebalances: int, stocks: int) -> np.ndarray:
    out = np.zeros((rebalances, stocks))
    names = rng.permutation(stocks)[:NAMES]
    for row in out:
        row[names] = 1 / NAMES
        fresh = rng.permutation(np.setdiff1d(np.arange(stocks), names))[: NAMES // 5]
        names = np.concatenate([rng.permutation(names)[NAMES // 5 :], fresh])
    return out


def timed(call: Callable[[], Any], repeat: int = 1) -> tuple[float, Any]:
    """Least CPU seconds, and the result."""
    best = float("inf")
    for _ in range(repeat):
        start = time.process_time()
        result = call()
        best = min(best, time.process_time() - start)
    return best, result


def vectorbt(python: str, panel: Panel, rows: np.ndarray, wanted: np.ndarray, cost: float) -> dict[str, Any]:
    size = np.full(panel.shape, np.nan)
    size[rows + 1] = wanted
    close, vwap = (panel.field(name).astype(np.float64) for name in ("close", "vwap"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "market.npz"
        np.savez(file, close=close, vwap=vwap, size=size, days=panel.dates, cost=cost)
        script = str(Path(__file__).with_name("vectorbt_peer.py"))
        done = subprocess.run([python, script, str(file)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", help="python with vectorbt")
    parser.add_argument("--sessions", type=int, default=1950)
    parser.add_argument("--stocks", type=int, default=3400)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    plain = make_panel((options.sessions, options.stocks))
    panel = rough(plain, rng)
    rows = np.arange(0, options.sessions - 1, EVERY)
    wanted = targets(rng, len(rows), options.stocks)

    def decide(row: int, held: np.ndarray) -> np.ndarray:
        return wanted[row // EVERY]

    seconds, ours = timed(lambda: backtest(panel, rows, decide), options.repeat)
    slow_seconds, slow = timed(lambda: slow_backtest(panel, rows, decide))
    metrics, _ = timed(
        lambda: excess_metrics(ours.returns, np.zeros_like(ours.returns), ours.dates), options.repeat
    )
    print(f"{options.sessions} sessions x {options.stocks} stocks, {len(rows)} rebalances of {NAMES} names,")
    print("CPU seconds of one thread")
    print(f"  backtest            {seconds:8.3f}")
    print(f"  its metrics         {metrics:8.4f}")
    difference = np.abs(ours.returns - slow.returns).max()
    print(
        f"  plain Python        {slow_seconds:8.1f}   {slow_seconds / seconds:4.0f} times; "
        f"returns differ by {difference:.0e}"
    )
    if options.peer:
        seconds, ours = timed(lambda: backtest(plain, rows, decide, cost=0.0), options.repeat)
        peer = vectorbt(options.peer, plain, rows, wanted, 0.0)
        print("everything trades, no costs")
        print(f"  backtest            {seconds:8.3f}")
        difference = np.abs(ours.returns - np.array(peer["returns"])[1:]).max()
        print(
            f"  vectorbt {peer['version']:10} {peer['seconds']:8.1f}   {peer['seconds'] / seconds:4.0f} times; "
            f"returns differ by {difference:.0e}"
        )


if __name__ == "__main__":
    main()

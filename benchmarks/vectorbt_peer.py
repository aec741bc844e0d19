"""Times vectorbt for `backtest.py`: a script of its own, because it may live in another environment.

    python vectorbt_peer.py market.npz    # close, vwap, size [sessions, stocks] (NaN: no order), days, cost

Prints one JSON line: CPU seconds of the second run (the first compiles), and the daily returns.
"""

import json
import sys
import time
import warnings

import numpy as np
import pandas as pd
import vectorbt


def main() -> None:
    warnings.simplefilter("ignore")
    with np.load(sys.argv[1]) as market:
        days = pd.DatetimeIndex(market["days"])
        close, vwap, size = (pd.DataFrame(market[name], days) for name in ("close", "vwap", "size"))
        cost = float(market["cost"])

    def run():
        portfolio = vectorbt.Portfolio.from_orders(
            close,
            size,
            size_type="targetpercent",
            price=vwap,
            val_price=vwap,
            fees=cost,
            call_seq="auto",  # sales first
            cash_sharing=True,
            group_by=True,
            init_cash=1e6,
            freq="1D",
        )
        return portfolio.returns()

    run()
    started = time.process_time()
    returns = run()
    seconds = time.process_time() - started
    print(json.dumps({"version": vectorbt.__version__, "seconds": seconds, "returns": returns.tolist()}))


if __name__ == "__main__":
    main()

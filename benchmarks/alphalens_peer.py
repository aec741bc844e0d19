"""Times alphalens-reloaded for `factor_test.py`: a script of its own, because it may live in another environment.

    python alphalens_peer.py market.npz    # scores and prices [dates, stocks], days [dates]

Prints one JSON line: CPU seconds of every step, and what came out.
"""

import json
import sys
import time
import warnings

import alphalens
import numpy as np
import pandas as pd

PERIODS = (1, 5, 10)


def main() -> None:
    warnings.simplefilter("ignore")
    with np.load(sys.argv[1]) as market:
        days = pd.DatetimeIndex(market["days"], name="date")
        stocks = [f"S{i:04d}" for i in range(market["scores"].shape[1])]
        prices = pd.DataFrame(market["prices"], days[: len(market["prices"])], stocks)
        factor = pd.DataFrame(market["scores"], days[: len(market["scores"])], stocks).stack().dropna()
    factor.index.names = ["date", "asset"]
    seconds = {}

    def timed(name, call):
        started = time.process_time()
        result = call()
        seconds[name] = time.process_time() - started
        return result

    clean = timed(
        "clean factor and forward returns",
        lambda: alphalens.utils.get_clean_factor_and_forward_returns(
            factor, prices, quantiles=10, periods=PERIODS, max_loss=1.0
        ),
    )
    ic = timed("RankIC, 3 periods", lambda: alphalens.performance.factor_information_coefficient(clean))
    means, _ = timed(
        "decile mean returns by date",
        lambda: alphalens.performance.mean_return_by_quantile(clean, by_date=True, demeaned=False),
    )
    turnover = timed(
        "decile turnover",
        lambda: [
            alphalens.performance.quantile_turnover(clean["factor_quantile"], quantile, 1)
            for quantile in range(1, 11)
        ],
    )
    print(
        json.dumps(
            {
                "version": alphalens.__version__,
                "seconds": seconds,
                "rank_ic": [float(ic[column].mean()) for column in ic.columns],
                "top": [
                    float(means.xs(10, level="factor_quantile")[column].mean()) for column in means.columns
                ],
                "turnover": [float(series.mean()) for series in turnover],
            }
        )
    )


if __name__ == "__main__":
    main()

"""The factor test against alphalens-reloaded, where definitions agree: installed by hand, since it brings a lot."""

from itertools import pairwise

import numpy as np
import pytest
from panels import make_panel

from steppe.quant.factor_test import FactorTester

STOCKS, DATES, PERIODS, LAYERS = 60, 70, (1, 5, 10), 5
LAST = max(PERIODS)


@pytest.fixture(scope="module")
def market():
    """Suspensions, ties, and 50 stocks scored a day: both rules of forming quantiles agree on multiples of LAYERS."""
    rng = np.random.default_rng(0)
    panel = make_panel((DATES + LAST + 1, STOCKS), traded=rng.random((DATES + LAST + 1, STOCKS)) > 0.05)
    scores = rng.standard_normal((DATES, STOCKS)).astype(np.float32)
    for d in range(DATES):
        open_tomorrow = np.flatnonzero(panel.traded[d + 1])
        scores[d, ~panel.traded[d + 1]] = np.nan
        scores[d, rng.permutation(open_tomorrow)[50:]] = np.nan
    scores[::7] = np.round(scores[::7], 1)
    return panel, scores


@pytest.fixture(scope="module")
def theirs(market):
    """alphalens's clean factor from prices of t + 1 at t, the last known one carried through suspensions."""
    utils = pytest.importorskip("alphalens.utils", reason="alphalens-reloaded is not installed")
    import pandas as pd

    panel, scores = market
    prices = np.array(panel.field("vwap"), dtype=np.float64)
    for before, now in pairwise(prices):
        np.copyto(now, before, where=np.isnan(now))
    days = pd.DatetimeIndex(panel.dates, name="date")
    factor = pd.DataFrame(scores, days[:DATES], panel.symbols).stack().dropna()
    factor.index.names = ["date", "asset"]
    return utils.get_clean_factor_and_forward_returns(
        factor,
        pd.DataFrame(prices[1:], days[:-1], panel.symbols),
        quantiles=LAYERS,
        periods=PERIODS,
        max_loss=1.0,
    )


@pytest.mark.filterwarnings("ignore")
def test_rank_ic_of_every_period(market, theirs):
    performance = pytest.importorskip("alphalens.performance")
    panel, scores = market
    ic = performance.factor_information_coefficient(theirs)
    for period, column in zip(PERIODS, ic.columns, strict=True):
        tester = FactorTester(panel, np.arange(DATES), layers=LAYERS, horizon=period, horizons=PERIODS)
        test = tester.test(scores)
        np.testing.assert_allclose(test.ic["rank_ic"].to_numpy(), ic[column].to_numpy(), atol=1e-6)
        assert test.decay["rank_ic"][PERIODS.index(period)] == pytest.approx(ic[column].mean(), abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_quantile_returns_and_turnover(market, theirs):
    performance = pytest.importorskip("alphalens.performance")
    panel, scores = market
    untied = np.array([d % 7 != 0 for d in range(DATES)])  # tied scores share a layer here, and an edge there
    tester = FactorTester(panel, np.arange(DATES), layers=LAYERS, horizon=10, holding=1, horizons=PERIODS)
    layers = tester.test(scores).layers
    means, _ = performance.mean_return_by_quantile(theirs, by_date=True, demeaned=False)
    for quantile in range(1, LAYERS + 1):
        ours = layers.filter(layers["layer"] == quantile)
        of_date = means.xs(quantile, level="factor_quantile")
        for name, column in (("ret", of_date.columns[0]), ("ret_10", of_date.columns[2])):
            np.testing.assert_allclose(
                ours[name].to_numpy()[untied], of_date[column].to_numpy()[untied], atol=1e-6
            )
        entered = performance.quantile_turnover(theirs["factor_quantile"], quantile, 1).to_numpy()
        both = untied & np.r_[False, untied[:-1]]
        np.testing.assert_allclose(ours["entered"].to_numpy()[both], entered[both], atol=1e-12)

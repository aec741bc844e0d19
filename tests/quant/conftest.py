import pytest
from panels import make_panel

from steppe.quant.sources.simulated import simulated_market

__all__ = ["make_panel"]


@pytest.fixture(scope="session")
def small_market():
    """About 2.5 simulated years of 80 stocks."""
    return simulated_market(seed=3, stocks=80, start="2015-01-01", end="2017-06-30")

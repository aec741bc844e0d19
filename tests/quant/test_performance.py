"""The line of an index-enhancement table: by hand, against empyrical, and the definition the published one fits."""

import numpy as np
import polars as pl
import pytest

from steppe.core.errors import DataError
from steppe.quant import performance as perf

KEYS = [
    "annual_return",
    "benchmark_annual_return",
    "annual_excess",
    "tracking_error",
    "information_ratio",
    "excess_max_drawdown",
    "excess_calmar",
    "monthly_win_rate",
]


@pytest.fixture(scope="module")
def series():
    """About 3.5 years of daily returns of a portfolio and its index."""
    rng = np.random.default_rng(0)
    dates = np.busday_offset("2015-03-02", np.arange(900))
    benchmark = 0.0002 + 0.012 * rng.standard_normal(900)
    return benchmark + 0.0005 + 0.004 * rng.standard_normal(900), benchmark, dates


def test_the_line_by_hand():
    dates = np.array(["2020-01-30", "2020-01-31", "2020-02-03"], dtype="datetime64[D]")
    returns, benchmark = [0.10, -0.20, 0.25], [0.05, 0.0, 0.05]
    line = perf.excess_metrics(returns, benchmark, dates)
    assert list(line) == KEYS
    value = 1.05 * 0.8 * 1.2
    assert line["annual_return"] == pytest.approx(1.1**84 - 1)
    assert line["benchmark_annual_return"] == pytest.approx((1.05 * 1.05) ** 84 - 1)
    assert line["annual_excess"] == pytest.approx(value**84 - 1)
    assert line["tracking_error"] == pytest.approx(np.std([0.05, -0.2, 0.2], ddof=1) * np.sqrt(252))
    assert line["information_ratio"] == pytest.approx(line["annual_excess"] / line["tracking_error"])
    assert line["excess_max_drawdown"] == pytest.approx(0.2)
    assert line["excess_calmar"] == pytest.approx(line["annual_excess"] / 0.2)
    assert line["monthly_win_rate"] == 0.5


def test_annual_excess_compounds_daily_differences_and_nothing_else(series):
    returns, benchmark, dates = series
    line = perf.excess_metrics(returns, benchmark, dates)
    value = 1.0
    for ours, theirs in zip(returns, benchmark, strict=True):
        value *= 1 + ours - theirs
    assert line["annual_excess"] == pytest.approx(value ** (252 / 900) - 1, rel=1e-12)
    ratio = (1 + line["annual_return"]) / (1 + line["benchmark_annual_return"]) - 1
    assert abs(line["annual_excess"] - (line["annual_return"] - line["benchmark_annual_return"])) > 1e-3
    assert abs(line["annual_excess"] - ratio) > 1e-5


def test_equal_to_empyrical(series):
    empyrical, pandas = pytest.importorskip("empyrical"), pytest.importorskip("pandas")
    returns, benchmark, dates = series
    line = perf.excess_metrics(returns, benchmark, dates)
    ours, theirs = (pandas.Series(x, index=pandas.DatetimeIndex(dates)) for x in (returns, benchmark))
    excess = ours - theirs
    gain, risk = empyrical.annual_return(excess), empyrical.annual_volatility(excess)
    months = empyrical.aggregate_returns(excess, "monthly")
    expected = {
        "annual_return": empyrical.annual_return(ours),
        "benchmark_annual_return": empyrical.annual_return(theirs),
        "annual_excess": gain,
        "tracking_error": risk,
        "information_ratio": gain / risk,
        "excess_max_drawdown": -empyrical.max_drawdown(excess),
        "excess_calmar": empyrical.calmar_ratio(excess),
        "monthly_win_rate": (months > 0).mean(),
    }
    for key in KEYS:
        assert line[key] == pytest.approx(expected[key], rel=1e-12), key
    np.testing.assert_allclose(perf.monthly_returns(excess, dates), months.to_numpy(), rtol=1e-10)
    np.testing.assert_allclose(perf.net_value(ours) - 1, empyrical.cum_returns(ours).to_numpy(), atol=1e-12)


def test_by_year_is_the_line_of_each_year_and_of_the_last_252_sessions(series):
    returns, benchmark, dates = series
    table = perf.by_year(returns, benchmark, dates)
    assert table["period"].to_list() == ["2015", "2016", "2017", "2018", "last 12 months"]
    assert table.columns == ["period", "sessions", *KEYS]
    assert table["sessions"].to_list()[-1] == 252
    assert table["sessions"][:-1].sum() == 900
    for period, chosen in (
        ("2016", dates.astype("datetime64[Y]") == np.datetime64("2016")),
        ("last 12 months", slice(-252, None)),
    ):
        line = perf.excess_metrics(returns[chosen], benchmark[chosen], dates[chosen])
        assert table.filter(pl.col("period") == period).select(KEYS).row(0, named=True) == line


def test_by_year_of_a_short_series_has_no_last_year_and_nulls_for_what_is_undefined():
    dates = np.array(["2019-12-31", "2020-01-02", "2020-01-03"], dtype="datetime64[D]")
    table = perf.by_year([0.01, 0.02, 0.03], [0.0, 0.0, 0.0], dates)
    assert table["period"].to_list() == ["2019", "2020"]
    assert table["sessions"].to_list() == [1, 2]
    assert table["tracking_error"].is_null().to_list() == [True, False]
    assert table["excess_calmar"].is_null().all()


def test_lengths_must_agree(series):
    returns, benchmark, dates = series
    with pytest.raises(DataError, match="899 returns, 900 of the benchmark, 900 dates"):
        perf.by_year(returns[1:], benchmark, dates)
    with pytest.raises(DataError, match="the periods must be the same"):
        perf.excess_metrics(returns, benchmark[1:], dates)

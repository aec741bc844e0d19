"""The risk model against planted structure, a plain regression, slow styles, and the future."""

from dataclasses import replace

import numpy as np
import pytest
from panels import make_panel, with_other_future

from steppe.core.errors import DataError
from steppe.quant.risk_model import STYLES, RiskModel
from steppe.quant.universe import universe_mask


@pytest.fixture(scope="module")
def market(small_market):
    return RiskModel(small_market, universe_mask(small_market, min_age=91))


def planted(dates=700, stocks=240, seed=5):
    """Returns of three industries, one style (a fixed size) and specific noise; and their true daily covariances."""
    rng = np.random.default_rng(seed)
    root = 0.01 * np.array([[1.0, 0, 0], [0.7, 0.8, 0], [0.5, 0.2, 0.9]])
    style, noise = 0.004, rng.uniform(0.008, 0.03, stocks)
    industry = np.arange(stocks, dtype=np.int16) % 3
    size = rng.standard_normal(stocks)
    size = (size - size.mean()) / size.std()
    returns = (rng.standard_normal((dates, 3)) @ root.T)[:, industry]
    returns += style * rng.standard_normal((dates, 1)) * size + noise * rng.standard_normal((dates, stocks))
    close = 10 * np.cumprod(1 + returns, axis=0)
    panel = make_panel((dates, stocks))
    values = panel.values.copy()
    values[:, :, :5] = close[:, :, None]
    panel = replace(
        panel,
        values=values,
        industry=np.broadcast_to(industry, close.shape).copy(),
        industries=("a", "b", "c"),
        float_cap=np.broadcast_to(np.exp(size).astype(np.float32), close.shape).copy(),
    )
    x = np.eye(3)[industry]
    true = x @ root @ root.T @ x.T + style**2 * np.outer(size, size) + np.diag(noise**2)
    return panel, 252 * true


def covariance(risk):
    return risk.exposures @ risk.covariance @ risk.exposures.T + np.diag(risk.specific)


def test_planted_structure_is_recovered():
    panel, true = planted()
    model = RiskModel(panel, np.ones(panel.shape, bool))
    stocks = np.arange(panel.shape[1])
    found = np.mean([covariance(model.at(row, stocks)) for row in (300, 500, 699)], axis=0)
    # 252 sessions of half-life 84 know a variance to about 11 %
    rng = np.random.default_rng(0)
    long = rng.dirichlet(np.ones(len(stocks)), 30)
    for books in (long, long - 1 / len(stocks)):
        ratio = np.einsum("pi,ij,pj->p", books, found, books) / np.einsum("pi,ij,pj->p", books, true, books)
        assert abs(ratio.mean() - 1) < 0.12
    assert np.corrcoef(np.diag(found), np.diag(true))[0, 1] > 0.9
    assert np.linalg.norm(found - true) / np.linalg.norm(true) < 0.15


def test_one_session_is_the_weighted_regression(small_market, market):
    session = small_market.shape[0] - 1
    universe = universe_mask(small_market, min_age=91)
    traded = small_market.traded[session] & small_market.traded[session - 1]
    stocks = np.flatnonzero(universe[session - 1] & traded)
    x = market.at(session - 1, stocks).exposures
    close = small_market.field("close").astype(np.float64)
    y = close[session, stocks] / close[session - 1, stocks] - 1
    root = small_market.float_cap[session - 1, stocks].astype(np.float64) ** 0.25
    used = np.abs(x).sum(axis=0) > 0
    expected, *_ = np.linalg.lstsq(root[:, None] * x[:, used], root * y, rcond=None)
    found = market.factor_returns(session)[-1]
    assert found[used] == pytest.approx(expected, abs=1e-6)
    last = market._residuals[session, stocks]
    assert last == pytest.approx(y - x[:, used] @ expected, abs=1e-6)


def slow_styles(panel, universe, row):
    """The raw styles of one date, one stock at a time."""
    close = np.array(panel.field("close"), dtype=np.float64)
    filled = close.copy()
    for t in range(1, row + 1):
        filled[t] = np.where(np.isnan(close[t]), filled[t - 1], close[t])
    returns = np.full(close.shape, np.nan)
    returns[1:] = close[1:] / close[:-1] - 1
    cap = panel.float_cap.astype(np.float64)
    rolled = range(row - 251, row + 1)
    market = []
    for t in rolled:
        inside = universe[t - 1] & np.isfinite(returns[t])
        market.append(np.average(returns[t, inside], weights=cap[t - 1, inside]))
    market = np.array(market)
    out = np.full((panel.shape[1], len(STYLES)), np.nan)
    for i in range(panel.shape[1]):
        year = returns[list(rolled), i]
        known = np.isfinite(year)
        beta = np.nan
        if known.sum() >= 126:
            beta = np.cov(year[known], market[known])[0, 1] / np.var(market[known], ddof=1)
        deviation = {}
        for n in (60, 20):
            window = year[-n:][np.isfinite(year[-n:])]
            deviation[n] = window.std() if len(window) >= 0.75 * n else np.nan
        value = panel.field("vwap")[:, i].astype(np.float64) * panel.field("volume")[:, i]
        turnover = (value / cap[:, i])[row - 59 : row + 1]
        turnover = turnover[np.isfinite(turnover)]
        out[i] = (
            np.log(cap[row, i]),
            beta,
            np.log(filled[row - 21, i] / filled[row - 252, i]),
            deviation[60],
            deviation[20],
            np.log(filled[row, i] / filled[row - 20, i]),
            np.log(turnover.mean()) if len(turnover) >= 45 else np.nan,
        )
    return out


@pytest.mark.parametrize("row", [400, 503, 504, 600])
def test_styles(small_market, market, row):
    universe = universe_mask(small_market, min_age=91)
    raw = slow_styles(small_market, universe, row)
    inside = universe[row]
    z = (raw - np.nanmean(raw[inside], axis=0)) / np.nanstd(raw[inside], axis=0)
    expected = np.nan_to_num(np.clip(z, -3, 3))
    found = market.at(row, np.arange(small_market.shape[1])).exposures[:, -len(STYLES) :]
    assert np.abs(found - expected).max() < 2e-3


def test_the_future_changes_nothing(small_market, market):
    stocks = np.arange(small_market.shape[1])
    for row in (378, 450, 600):  # the first one opens a block
        other = with_other_future(small_market, row)
        there = RiskModel(other, universe_mask(other, min_age=91)).at(row, stocks)
        here = market.at(row, stocks)
        for name in ("exposures", "covariance", "specific"):
            assert np.array_equal(getattr(here, name), getattr(there, name)), name


def test_the_order_of_questions_changes_nothing(small_market):
    universe, stocks = universe_mask(small_market, min_age=91), np.arange(small_market.shape[1])
    rows = (600, 300, 460)
    forward, backward = RiskModel(small_market, universe), RiskModel(small_market, universe)
    one = {row: covariance(forward.at(row, stocks)) for row in rows}
    other = {row: covariance(backward.at(row, stocks)) for row in sorted(rows)}
    assert all(np.array_equal(one[row], other[row]) for row in rows)


def test_bias_statistic_is_near_one(small_market, market):
    """Realised over predicted risk of random portfolios: long only, and against the mean of all."""
    universe, rng = universe_mask(small_market, min_age=91), np.random.default_rng(1)
    price = market._price.astype(np.float64)
    outcomes = {"long": [], "active": []}
    for row in range(300, small_market.shape[0] - 1, 3):
        stocks = np.flatnonzero(universe[row])
        risk = covariance(market.at(row, stocks)) / 252
        returns = price[row + 1, stocks] / price[row, stocks] - 1
        long = rng.dirichlet(np.ones(len(stocks)), 5)
        for kind, books in (("long", long), ("active", long - 1 / len(stocks))):
            outcomes[kind] += list(books @ returns / np.sqrt(np.einsum("pi,ij,pj->p", books, risk, books)))
    assert 0.7 < np.std(outcomes["long"]) < 1.3
    assert 0.8 < np.std(outcomes["active"]) < 1.2


def test_missing_data():
    panel, _ = planted(dates=400, stocks=40)
    traded = panel.traded.copy()
    traded[200:, 0] = False  # suspended for as long as anyone remembers
    traded[:, 1] = False  # never seen
    cap, industry = panel.float_cap.copy(), panel.industry.copy()
    cap[:, 2] = np.nan
    industry[:, 3] = -1
    values = np.where(traded[:, :, None], panel.values, np.nan)
    panel = replace(panel, values=values, traded=traded, float_cap=cap, industry=industry)
    model = RiskModel(panel, universe_mask(panel))
    risk = model.at(399, np.arange(40))
    assert all(np.isfinite(a).all() for a in (risk.exposures, risk.covariance, risk.specific))
    assert (risk.specific > 0).all()
    assert np.linalg.eigvalsh(risk.covariance).min() > 0
    style = dict(zip(STYLES, risk.exposures[:, -len(STYLES) :].T, strict=True))
    assert style["size"][2] == 0
    assert style["liquidity"][2] == 0
    assert style["beta"][1] == 0
    assert risk.exposures[3, :4].tolist() == [0, 0, 0, 1]
    # who has not been seen is as risky as the mean
    mean = model.at(399, np.arange(40)).specific[1]
    assert mean == pytest.approx(risk.specific[4:].mean(), rel=0.1)

    without = replace(panel, float_cap=np.full(panel.shape, np.nan, np.float32))
    assert np.isfinite(covariance(RiskModel(without, universe_mask(panel)).at(399, np.arange(40)))).all()


def test_too_little_history_is_an_error():
    panel, _ = planted(dates=80, stocks=40)
    model = RiskModel(panel, universe_mask(panel))
    with pytest.raises(DataError, match=r"30 sessions up to .* a risk model needs 60"):
        model.at(30, np.arange(40))
    model.at(60, np.arange(40))
    with pytest.raises(DataError, match=r"universe is \(3, 3\)"):
        RiskModel(panel, np.ones((3, 3), bool))

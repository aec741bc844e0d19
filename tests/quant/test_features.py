import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from steppe.quant.bars import daily_bars, rolling_bars
from steppe.quant.features import cross_section, has_window, standardise


@pytest.fixture(scope="module")
def bars(small_market):
    return daily_bars(small_market)


def test_daily_bars_keep_what_traded_and_fill_suspensions_from_the_past(small_market, bars):
    traded = np.asarray(small_market.traded)
    assert np.array_equal(bars[traded], np.asarray(small_market.values)[traded])
    for stock in range(0, small_market.shape[1], 7):
        close, started = np.nan, False
        for date in range(small_market.shape[0]):
            if traded[date, stock]:
                close, started = bars[date, stock, 3], True
            elif started:
                assert (bars[date, stock, :5] == close).all()
                assert bars[date, stock, 5] == 0
            else:
                assert np.isnan(bars[date, stock]).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 7), st.integers(0, 2**31))
def test_rolling_bars_equal_a_slow_reference(sessions, seed):
    rng = np.random.default_rng(seed)
    bars = np.exp(rng.normal(size=(20, 3, 6))).astype(np.float32)
    bars[:, 0, 5] = 0
    rolled = rolling_bars(bars, sessions)
    assert np.isnan(rolled[: sessions - 1]).all()
    for t in range(sessions - 1, 20):
        part = bars[t - sessions + 1 : t + 1].astype(np.float64)
        volume = part[:, :, 5].sum(0)
        vwap = np.where(
            volume > 0, (part[:, :, 4] * part[:, :, 5]).sum(0) / np.maximum(volume, 1e-30), part[-1, :, 3]
        )
        expected = [part[0, :, 0], part[:, :, 1].max(0), part[:, :, 2].min(0), part[-1, :, 3], vwap, volume]
        np.testing.assert_allclose(rolled[t], np.stack(expected, -1), rtol=1e-6)


def test_a_panel_shorter_than_the_bar_has_none():
    assert np.isnan(rolling_bars(np.ones((3, 2, 6), np.float32), 5)).all()


@pytest.mark.parametrize(("window", "stride"), [(30, 1), (20, 5)])
def test_cross_section_equals_a_slow_reference(bars, window, stride):
    date = 400
    stocks = np.flatnonzero(has_window(bars, window, stride)[date])
    assert len(stocks) > 40
    got = cross_section(bars, date, stocks, window, stride).numpy()
    assert got.shape == (window, len(stocks), 6)
    for lag in range(window):
        row = bars[date - stride * (window - 1 - lag), stocks].astype(np.float64) / bars[date, stocks]
        std = row.std(0)
        expected = np.where(std > 1e-7, (row - row.mean(0)) / np.where(std > 1e-7, std, 1), 0)
        np.testing.assert_allclose(got[lag], expected, atol=2e-4)
    assert (got[-1] == 0).all()


def test_standardise_leaves_mean_zero_and_unit_deviation():
    z = standardise(torch.randn(4, 50, 3) * 7 + 2)
    assert torch.allclose(z.mean(1), torch.zeros(4, 3), atol=1e-5)
    assert torch.allclose(z.std(1, correction=0), torch.ones(4, 3), atol=1e-5)


def test_a_window_must_be_whole_and_divisible(bars, small_market):
    mask = has_window(bars, 30)
    assert not mask[:29].any()
    stock = int(np.argmax(np.argmax(np.asarray(small_market.traded), axis=0)))
    first = int(np.argmax(np.asarray(small_market.traded)[:, stock]))
    assert first > 0, "the market should have a stock listed later"
    assert not mask[: first + 29, stock].any()
    assert not mask[bars[:, :, 5] == 0].any(), "a last volume of 0 cannot be divided by"

"""A simulated market: the embedded default, since no real panel of hundreds of stocks may be shipped.

Everything is drawn from one seed by a model of a market with daily price limits; its constants are calibrated
to moments and effect sizes measured on a real panel of Chinese A-shares (2010 to 2019), of which no bar is
copied. The return of a session is

    r_i = beta_i m + load_i g_industry + sum_k z_ik (premium_k + noise_k) + interaction + sigma_i e_i,

market and industry returns m, g, scores z_ik in the style signals k known the evening before (`SIGNALS`),
fat-tailed e_i, and a sigma_i that clusters. Every number computed on it must be shown as simulated.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from steppe.core.errors import SpecError
from steppe.quant.labels import forward_returns
from steppe.quant.panel import Panel
from steppe.quant.ranking import rank_ic, ranks

__all__ = ["REAL_EFFECTS", "SIGNALS", "planted_effects", "signals", "simulated_market"]

Array = NDArray[np.float64]

VERSION: Final = 1
"""Part of the fingerprint: raise it whenever a simulated number changes."""

SIGNALS: Final = (
    "low_volatility_20",
    "reversal_20",
    "volume_contraction_5_60",
    "reversal_5",
    "momentum_12_1",
)
REAL_EFFECTS: Final = dict(zip(SIGNALS, (0.056, 0.045, 0.027, 0.020, 0.008), strict=True))
"""Mean RankIC measured on real A-shares (see `planted_effects` for how): what the premia are calibrated to."""

# Daily return per unit of a signal's score (uniform, standard deviation 1): mean, and standard deviation over days.
PREMIUM: Final = np.array([4.4e-4, 4.3e-4, 1.1e-4, -2.7e-4, 0.1e-4])
PREMIUM_NOISE: Final = np.array([3.4e-3, 3.7e-3, 3.0e-3, 3.5e-3, 2.9e-3])
# Reversal is stronger in volatile stocks: what only a non-linear model finds.
INTERACTION: Final = 8.0e-4

HISTORY: Final = 253  # sessions the longest signal reads
BURN_IN: Final = 300
INDUSTRIES: Final = 10
# Share of all stocks in each index, by float cap from the top.
INDICES: Final = {"SIM-L": 0.09, "SIM-M": 0.15, "SIM-S": 0.30}
# Sessions listed before a stock can enter an index, and over which its float cap is averaged.
SEASONED: Final = 126
LIMIT: Final = 0.10
GAP: Final = 0.18  # share of a day's variance that happens overnight


def simulated_market(
    seed: int = 0, stocks: int = 600, start: str = "2013-01-01", end: str = "2019-12-31"
) -> Panel:
    """A market drawn from `seed`: bit-identical for the same arguments, and for its dates under a later `end`.

    Prices lie on a 0.01 grid within 10 % of the reference price (dividends and splits taken out); what the
    limit withholds moves the next session. Stocks list and delist, are suspended in spells (no bar), pay
    dividends and split. Three indices are rebalanced on the first session of January and July by the mean
    float cap of the half year before. Sessions are Mondays to Fridays.

    Args:
        seed: any integer >= 0; the global RNG is not touched.
        stocks: at least 30. Some list only during the first six years.
        start: first day, ISO.
        end: last day, ISO.

    Returns:
        a `Panel` named "simulated market", ``simulated=True``; weights of the indices are by float cap, and
        so are the returns of its benchmarks.

    Raises:
        SpecError: fewer than 30 stocks, or no session between start and end.
    """
    if stocks < 30:
        raise SpecError(f"stocks {stocks}: a simulated market needs at least 30 for its cross-sections.")
    if seed < 0:
        raise SpecError(f"seed {seed}: must be >= 0.")
    days = np.arange(np.datetime64(start, "D"), np.datetime64(end, "D") + 1)
    dates = days[np.is_busday(days)]
    if not len(dates):
        raise SpecError(f"no session between {start} and {end}.")
    market = _Market(seed, stocks, len(dates))
    rows = [market.step() for _ in range(BURN_IN + len(dates))][BURN_IN:]
    planes: dict[str, Any] = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    shape = planes["traded"].shape

    session = np.arange(len(dates))[:, None]
    list_date = np.where(market.list_at >= 0, dates[np.clip(market.list_at, 0, len(dates) - 1)], dates[0])
    age = (dates[:, None] - list_date[None]).astype(np.int64)
    age += np.where(market.list_at < 0, market.age_at_start, 0)
    age = np.where(session >= market.list_at, age, -1).astype(np.int32)
    members = _memberships(dates, planes["listed"], market.caps)
    weights, benchmarks = {}, {}
    for name, plane in members.items():
        benchmarks[name] = _level(plane, market.caps[-len(dates) :])
        cap = np.where(plane, planes["float_cap"], 0.0)
        weights[name] = (cap / np.maximum(cap.sum(axis=1, keepdims=True), 1e-12)).astype(np.float32)
    identity = ["simulated", VERSION, seed, stocks, start, end]
    return Panel(
        name="simulated market",
        simulated=True,
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        dates=dates,
        symbols=np.array([f"SIM{i:04d}" for i in range(stocks)]),
        age=age,
        special=np.zeros(shape, dtype=bool),
        industry=np.broadcast_to(market.industry.astype(np.int16), shape).copy(),
        industries=tuple(f"industry {i + 1:02d}" for i in range(INDUSTRIES)),
        members=members,
        weights=weights,
        benchmarks=benchmarks,
        notes=(
            f"Simulated from seed {seed}: no number here says anything about a real market.",
            "Planted: "
            + ", ".join(f"{name} (RankIC about {ic})" for name, ic in REAL_EFFECTS.items())
            + ", and reversal that is stronger in volatile stocks.",
            "No special treatment; a 10 % price limit for all; sessions are Mondays to Fridays without holidays.",
        ),
        **planes,
    )


def signals(log_close: Array, volume: NDArray[np.floating]) -> Array:
    """The `SIGNALS` of one evening, ``[5, N]``, each oriented so that a high value is the favourable side.

    low volatility: minus the standard deviation of 20 daily returns; reversal: minus the return over 20 and
    over 5 sessions; volume contraction: minus mean volume of 5 over mean volume of 60 sessions; momentum
    12-1: the return from 252 to 21 sessions ago.

    Args:
        log_close: ``[253, N]`` log adjusted closes, the last row is today; carried forward through
            suspensions, NaN before listing.
        volume: ``[60, N]`` adjusted volume, NaN where not traded.

    Returns:
        NaN where the history is too short or the stock traded on fewer than 15 of 20 (4 of 5, 45 of 60)
        sessions.
    """
    steps = np.diff(log_close[-21:], axis=0)
    traded = np.isfinite(volume)
    flow = np.where(traded, volume, 0.0)
    counts = traded.sum(axis=0), traded[-5:].sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (flow[-5:].sum(axis=0) / counts[1]) / (flow.sum(axis=0) / counts[0])
    now = log_close[-1]
    out = np.stack(
        [
            -steps.std(axis=0),
            log_close[-21] - now,
            -ratio,
            log_close[-6] - now,
            log_close[-22] - log_close[-253],
        ]
    )
    out[:2, traded[-20:].sum(axis=0) < 15] = np.nan
    out[2, (counts[0] < 45) | (counts[1] < 4)] = np.nan
    return out


def planted_effects(panel: Panel, every: int = 5) -> dict[str, float]:
    """Mean RankIC of each of the `SIGNALS`, measured on any panel, simulated or real.

    Over the stocks that are members of an index (all, if the panel has none) and trade at t; the return is
    close(t + 11) / close(t + 1) - 1; every `every`-th date from the first with a year of history.
    """
    rows = np.arange(HISTORY - 1, panel.shape[0] - 11, every)
    if not len(rows):
        raise SpecError(f"{panel.shape[0]} dates: the effects need more than {HISTORY + 11}.")
    log_close = np.log(panel.field("close").astype(np.float64))
    last = np.maximum.accumulate(
        np.where(np.isfinite(log_close), np.arange(len(log_close))[:, None], 0), axis=0
    )
    log_close = np.take_along_axis(log_close, last, axis=0)
    universe = panel.traded[rows]
    if panel.members:
        universe &= np.logical_or.reduce([plane[rows] for plane in panel.members.values()])
    volume = panel.field("volume")
    values = np.stack(
        [signals(log_close[t - HISTORY + 1 : t + 1], volume[t - 59 : t + 1]) for t in rows], axis=1
    )
    future = np.where(universe, forward_returns(panel, 10, rows=rows, price="close"), np.nan)
    return {
        name: float(np.nanmean(rank_ic(value, future))) for name, value in zip(SIGNALS, values, strict=True)
    }


class _Market:
    """The state of the simulation between two sessions; `step` draws one. Prices are whole cents.

    The numbers below are calibrated together to the real panel: dispersion and tails of returns, clustering of
    volatility, memory and dispersion of volume and its link to returns, gaps, ranges, vwap, suspensions, sizes.
    """

    def __init__(self, seed: int, stocks: int, sessions: int) -> None:
        fixed, self.daily = (
            np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(seed).spawn(2)
        )
        n = self.stocks = stocks
        self.session = -BURN_IN
        self.industry = fixed.integers(INDUSTRIES, size=n)
        size = fixed.standard_normal(n)
        quality = fixed.standard_normal(n)
        self.beta = 1 + 0.15 * fixed.standard_normal(n) + 0.05 * quality
        self.load = 1 + 0.3 * fixed.standard_normal(n)
        self.base_sigma = 0.0162 * np.exp(0.19 * quality - 0.06 * size)
        self.base_turnover = np.log(0.0145) + 0.4 * fixed.standard_normal(n) + 0.2 * quality - 0.35 * size
        # two thirds are there from the beginning, the others list over about six years whatever the end is
        later = fixed.random(n) > 0.65
        self.list_at = np.where(later, fixed.integers(0, 1500, n), -BURN_IN)
        self.age_at_start = fixed.integers(400, 6000, n)
        self.delist_at = np.maximum(self.list_at, 0) + 20 + fixed.exponential(250 * 252, n)
        self.phase = fixed.integers(252, size=n)
        self.close = np.floor(100 * np.exp(np.log(11) + 0.65 * fixed.standard_normal(n)).clip(3, 80))
        self.shares = np.round(4e9 * np.exp(1.1 * size) / (self.close / 100), -2)
        self.factor = np.ones(n)
        # new listings are priced low: the limit lets the price rise only over several sessions
        self.pending = np.where(later, np.abs(0.4 + 0.3 * fixed.standard_normal(n)), 0.0)
        self.slow_sigma, self.fast_sigma = 0.25 * fixed.standard_normal(n), np.zeros(n)
        self.slow_volume, self.fast_volume = 0.45 * fixed.standard_normal(n), np.zeros(n)
        self.market_sigma, self.market_volume = 0.0, 0.0
        self.suspended = np.zeros(n, dtype=np.int64)
        self.dead = np.zeros(n, dtype=bool)
        self.now = HISTORY  # row of the session about to be drawn in the three records below
        self.log_close, self.volume, self.caps = np.full((3, HISTORY + BURN_IN + sessions, n), np.nan)

    def step(self) -> dict[str, NDArray[Any]]:
        """Draw one session. The same number of draws whatever happens, all of them from the past's stream."""
        n, rng, t = self.stocks, self.daily, self.now
        common = rng.standard_normal(4 + INDUSTRIES + len(SIGNALS))
        normal = rng.standard_normal((7, n))
        uniform = rng.random((5, n))
        shock = rng.standard_t(4, n) / np.sqrt(2)

        self.dead |= (self.session >= self.delist_at) | ((self.close < 100) & (self.session > self.list_at))
        listed = (self.session >= self.list_at) & ~self.dead
        length = np.minimum(np.exp(1.4 + 1.4 * normal[0]), 250).astype(np.int64) + 1
        begins = listed & (self.suspended == 0) & (uniform[0] < 0.0047) & (self.session > self.list_at)
        self.suspended = np.where(begins, length, np.maximum(self.suspended - 1, 0))
        traded = listed & (self.suspended == 0)

        # market and industries
        market_vol = 0.0180 * np.exp(self.market_sigma)
        market = 0.0006 + market_vol * common[0] / np.sqrt(rng.chisquare(6) / 6) * np.sqrt(4 / 6)
        self.market_sigma = 0.985 * self.market_sigma + 0.10 * (abs(common[0]) - 0.8) + 0.07 * common[1]
        self.market_volume = 0.97 * self.market_volume + 0.15 * common[2] + 3.0 * market
        industries = 0.0065 * np.exp(0.5 * self.market_sigma) * common[4 : 4 + INDUSTRIES]
        systematic = self.beta * market + self.load * industries[self.industry]

        # the planted part, from what was known the evening before
        score = _scores(signals(self.log_close[t - HISTORY : t], self.volume[t - 60 : t]), listed)
        planted = (PREMIUM + PREMIUM_NOISE * common[-len(SIGNALS) :]) @ score
        planted -= INTERACTION * score[0] * score[1]
        sigma = self.base_sigma * np.exp(self.slow_sigma + self.fast_sigma + 0.3 * self.market_sigma)
        drawn = systematic + planted + sigma * shock - 0.5 * sigma**2
        surprise = np.abs(shock) - 0.71
        self.slow_sigma = 0.99 * self.slow_sigma + 0.025 * surprise + 0.035 * normal[1]
        self.fast_sigma = 0.8 * self.fast_sigma + 0.16 * surprise + 0.14 * normal[2]
        self.slow_volume = 0.99 * self.slow_volume + 0.07 * normal[3] + 0.05 * normal[1]
        self.fast_volume = 0.75 * self.fast_volume + 0.30 * normal[4] + 0.27 * surprise + 0.10 * shock

        # ex-dates: the reference price steps down, the factor up
        ex = traded & ((self.session + self.phase) % 252 == 0) & (self.session > self.list_at)
        cash = np.where(ex, np.round(self.close * 0.024 * uniform[1]), 0.0)
        split = np.where(
            ex & (self.close > 2500) & (uniform[2] < 0.5), np.where(uniform[2] < 0.25, 0.5, 1.0), 0.0
        )
        reference = np.floor((self.close - cash) / (1 + split) + 0.5)
        self.factor *= self.close / reference
        self.shares = np.round(self.shares * (1 + split))

        # the path of the day in logs from the reference, then cents within the limit
        spread = np.sqrt(sigma**2 + (self.beta * market_vol) ** 2)
        end = self.pending + drawn
        begin = self.pending + GAP * drawn
        begin += np.sqrt(GAP * (1 - GAP)) * (sigma * normal[5] + self.beta * market_vol * common[3])
        bridge = -2 * (1 - GAP) * spread**2 * np.log1p(-uniform[3:5])  # extremes of a Brownian bridge
        extreme = np.sqrt((end - begin) ** 2 + bridge)
        path = np.stack([begin, (begin + end + extreme[0]) / 2, (begin + end - extreme[1]) / 2, end])
        up = np.floor(reference * (1 + LIMIT) + 0.5 + 1e-6)
        down = np.floor(reference * (1 - LIMIT) + 0.5 + 1e-6)
        cents = np.clip(np.floor(reference * np.exp(path) + 0.5), down, up)
        opened, high, low, closed = cents
        middle, reach = (high + low) / 2, high - low
        place = 0.155 * ((opened + closed) / 2 - middle) + 0.1 * reach * normal[6]
        vwap = np.clip(np.round(middle + place, 1), low, high)

        turnover = np.exp(self.base_turnover + self.slow_volume + self.fast_volume + self.market_volume)
        volume = np.maximum(np.round(self.shares * np.minimum(turnover, 0.5), -2), 100)
        self.pending = np.where(traded, end - np.log(closed / reference), self.pending)
        self.pending += np.where(listed & ~traded, systematic, 0.0)
        self.close = np.where(traded, closed, self.close)
        factor = self.factor.astype(np.float32)
        exact = factor.astype(np.float64)
        values = np.stack([*cents, vwap], axis=1) / 100 * exact[:, None]
        values = np.concatenate([values, (volume / exact)[:, None]], axis=1).astype(np.float32)
        values[~traded] = np.nan
        cap = np.where(listed, self.shares * self.close / 100, np.nan)

        self.log_close[t] = np.where(listed, np.log(self.close / 100 * exact), np.nan)
        self.volume[t] = values[:, 5]
        self.caps[t] = cap
        self.now += 1
        self.session += 1
        return {
            "values": values,
            "factor": np.where(traded, factor, np.nan).astype(np.float32),
            "traded": traded,
            "listed": listed,
            "delisted": self.dead & (self.session >= self.list_at),
            "limit_up": traded & (opened >= up),
            "limit_down": traded & (opened <= down),
            "sealed_up": traded & (low >= up),
            "sealed_down": traded & (high <= down),
            "float_cap": cap.astype(np.float32),
        }


def _scores(signal: Array, listed: NDArray[np.bool_]) -> Array:
    """Ranks spread evenly with mean 0 and standard deviation 1 over the listed stocks; 0 where unknown."""
    rank = ranks(np.where(listed, signal, np.nan))
    count = np.maximum(np.isfinite(rank).sum(axis=1, keepdims=True), 1)
    return np.nan_to_num(((rank - 0.5) / count - 0.5) * np.sqrt(12))


def _level(members: NDArray[np.bool_], caps: Array) -> Array:
    """``[T]`` price index from 1000: members of the date, weighted by their float cap of the evening before.

    A float cap follows splits but not dividends, so its change is the price return that such an index counts.
    """
    held = members[1:] & np.isfinite(caps[1:]) & np.isfinite(caps[:-1])
    growth = [caps[t + 1, on].sum() / caps[t, on].sum() if on.any() else 1.0 for t, on in enumerate(held)]
    level: Array = 1000 * np.cumprod([1.0, *growth])
    return level


def _memberships(
    dates: NDArray[np.datetime64], listed: NDArray[np.bool_], caps: Array
) -> dict[str, NDArray[np.bool_]]:
    """The stocks by float cap in the order of `INDICES`, chosen on the evening before they become effective.

    `caps`: ``[before + T, N]``, the history before the first date included.
    """
    half = dates.astype("datetime64[M]").astype(np.int64) // 6
    effective = np.flatnonzero(np.r_[True, half[1:] != half[:-1]])
    stocks = listed.shape[1]
    members = {name: np.zeros(listed.shape, dtype=bool) for name in INDICES}
    for begin, end in zip(effective, [*effective[1:], len(dates)], strict=True):
        today = len(caps) - len(dates) + begin
        cap = caps[today - SEASONED : today].mean(axis=0)  # NaN for what is not seasoned
        order = np.argsort(-cap, kind="stable")[: np.isfinite(cap).sum()]
        for name, share in INDICES.items():
            chosen, order = np.split(order, [round(share * stocks)])
            members[name][begin:end, chosen] = True
    return {name: plane & listed for name, plane in members.items()}

import dataclasses
from datetime import date

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from steppe.core.errors import DataError, SpecError
from steppe.core.seeding import generator
from steppe.quant.stock_factor import StockFactor
from steppe.quant.walk_forward import WalkForward, add_months, walk_forward_splits

sessions = np.arange("2004-01-01", "2021-01-01", dtype="datetime64[D]")
sessions = sessions[np.is_busday(sessions)]
PUBLISHED = {"first": "2016-12-30", "last": "2020-09-30"}
WALK = {
    "first": "2016-11-15",
    "last": "2017-05-31",
    "train_months": 8,
    "validation_months": 3,
    "test_months": 3,
}
MARKET = {"seed": 3, "stocks": 60, "start": "2015-01-01", "end": "2017-06-30"}
SMALL = {"hidden": 4, "layers": 1, "daily_window": 10, "weekly_window": 4, "simulated": MARKET}


def splits(dates=sessions, horizon=10, every=5, test_every=5, history=99, **plan):
    return walk_forward_splits(
        dates,
        WalkForward(**(PUBLISHED | plan)),
        horizon=horizon,
        every=every,
        test_every=test_every,
        history=history,
    )


def test_the_published_blocks_are_half_yearly_with_six_years_and_two():
    found = splits()
    assert list(found) == [
        "2016-12-30", "2017-06-30", "2017-12-30", "2018-06-30",
        "2018-12-30", "2019-06-30", "2019-12-30", "2020-06-30",
    ]  # fmt: skip
    second = found["2017-06-30"]
    assert sessions[second.train[0]] == np.datetime64("2009-06-30")
    assert sessions[second.validation[0]] == np.datetime64("2015-06-30")
    assert np.datetime64("2017-06-30") <= sessions[second.test[0]] < np.datetime64("2017-07-08")


@settings(max_examples=40)
@given(
    st.dates(date(2014, 1, 1), date(2018, 12, 31)),
    st.integers(5, 900),
    st.integers(1, 60),
    st.integers(1, 24),
    st.integers(1, 14),
    st.integers(1, 30),
    st.integers(1, 40),
)
def test_blocks_tile_the_test_dates_and_keep_apart(first, days, train, validation, test, horizon, test_every):
    last = np.datetime64(first) + days
    found = splits(
        first=first,
        last=str(last),
        train_months=train + 3,
        validation_months=validation + 2,
        test_months=test,
        horizon=horizon,
        test_every=test_every,
    )
    rows = np.concatenate([split.test for split in found.values()])
    inside = np.flatnonzero((sessions >= np.datetime64(first)) & (sessions <= last))
    assert rows.tolist() == inside[::test_every].tolist()
    for name, split in found.items():
        assert sessions[split.test[0]] >= np.datetime64(name)
        assert split.train[-1] + horizon + 1 < split.validation[0]
        assert split.validation[-1] + horizon + 1 < split.test[0]
        assert split.train[0] >= 99


@given(st.dates(date(2014, 1, 1), date(2018, 12, 31)), st.integers(5, 500), st.integers(0, 500))
@settings(max_examples=30)
def test_a_later_last_date_leaves_earlier_blocks_as_they_are(first, days, more):
    one, two = (splits(first=first, last=str(np.datetime64(first) + d)) for d in (days, days + more))
    for name, split in one.items():
        assert np.array_equal(split.train, two[name].train)
        assert np.array_equal(split.validation, two[name].validation)
        assert split.test.tolist() == two[name].test.tolist()[: len(split.test)]


def test_months_end_where_the_month_does():
    assert add_months(date(2016, 8, 31), 6) == date(2017, 2, 28)
    assert add_months(date(2017, 1, 15), -13) == date(2015, 12, 15)


def test_a_panel_that_begins_too_late_is_told_when_it_would_have_to():
    with pytest.raises(
        DataError, match=r"trains from 2008-12-30.*It would have to begin about 2008-0.*to 5\d"
    ):
        splits(sessions[sessions >= np.datetime64("2010-01-04")])
    splits(sessions[sessions >= np.datetime64("2010-01-04")], train_months=48)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"walk_forward": WALK, "train": ["2015-01-01", "2015-12-31"]}, "leave out train, or"),
        ({"train": ["2015-01-01", "2015-12-31"]}, "validation, test missing: give"),
        ({}, "train, validation, test missing"),
        ({"walk_forward": WALK | {"frist": "2016-01-01"}}, r"unknown key 'frist'\. Did you mean 'first'"),
        ({"walk_forward": WALK | {"last": "2015-01-01"}}, "walk_forward: first 2016-11-15 lies after last"),
        ({"walk_forward": WALK, "batch_stocks": 5}, "batch_stocks 5 is too few"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(settings, message):
    with pytest.raises(SpecError, match=message):
        StockFactor(**SMALL, **settings)


def test_a_first_date_beyond_the_panel_is_an_error():
    with pytest.raises(DataError, match="has no session from 2030"):
        splits(first="2030-01-01", last="2031-01-01")


@pytest.fixture(scope="module")
def walk():
    return StockFactor(**SMALL, walk_forward=WALK)


def test_parts_are_named_by_block_and_share_what_they_read(walk):
    assert list(walk.parts) == [
        f"{frequency}-{block}"
        for block in ("2016-11-15", "2017-02-15", "2017-05-15")
        for frequency in ("daily", "weekly")
    ]
    assert len({id(part.feed) for part in walk.parts.values()}) == 2
    assert walk.describe()["blocks"]["test"]["dates"] == len(walk.rows)


def test_later_blocks_and_later_data_do_not_change_a_trained_block(walk):
    longer = StockFactor(**SMALL, walk_forward=WALK | {"last": "2017-06-20"})
    for name, part in walk.parts.items():
        assert part.identity == longer.parts[name].identity
        last = name.endswith("2017-05-15")  # has new dates to score
        assert (part.output_identity != longer.parts[name].output_identity) == last


def edited(panel, dates, before, stock):
    """The panel's first `dates` dates, with one more stock in front: a copy of the first one, not there `before`."""

    def plane(array):
        if array.ndim == 1:
            return array[:dates]
        new = np.array(array[:, :1])
        new[:before] = np.nan if np.issubdtype(array.dtype, np.floating) else 0
        return np.concatenate([new, array] if stock else [array], axis=1)[:dates]

    fields = {f.name: getattr(panel, f.name) for f in dataclasses.fields(panel)}
    changed = {k: plane(v) for k, v in fields.items() if isinstance(v, np.ndarray) and k != "symbols"}
    changed |= {k: {n: plane(a) for n, a in v.items()} for k, v in fields.items() if isinstance(v, dict)}
    symbols = np.array(["000000", *panel.symbols] if stock else panel.symbols)
    return dataclasses.replace(panel, **changed, symbols=symbols)


def test_new_dates_and_new_listings_do_not_change_a_trained_block(walk, tmp_path):
    panel, cut = walk.panel, int(np.searchsorted(walk.panel.dates, np.datetime64("2017-05-01")))
    edited(panel, cut, cut, False).save(tmp_path / "early")
    edited(panel, len(panel.dates), cut, True).save(tmp_path / "late")
    early, late = (
        StockFactor(**SMALL | {"panel": str(tmp_path / name)}, walk_forward=WALK)
        for name in ("early", "late")
    )
    assert len(early.parts) == 4
    assert len(late.parts) == 6
    for name, part in early.parts.items():
        assert part.identity == late.parts[name].identity
        model = part.model(generator(0))
        for a, b in zip(part.full("train"), late.parts[name].full("train"), strict=True):
            assert torch.equal(a.windows, b.windows)
        assert part.output_identity != late.parts[name].output_identity  # one more column
        rows = part.split.test
        scores = late.parts[name].scores(model, rows)
        assert np.array_equal(part.scores(model, rows), scores[:, 1:], equal_nan=True)


def test_a_changed_price_or_membership_changes_the_blocks_that_read_it(walk, tmp_path):
    panel = walk.panel
    values = np.array(panel.values)
    row = int(walk.parts["daily-2016-11-15"].split.train[0])
    values[row - 9, np.flatnonzero(panel.traded[row - 9])[3]] *= np.float32(1.001)
    dataclasses.replace(panel, values=values).save(tmp_path / "changed")
    changed = StockFactor(**SMALL | {"panel": str(tmp_path / "changed")}, walk_forward=WALK)
    same = {name for name, part in walk.parts.items() if part.identity == changed.parts[name].identity}
    assert same == {name for name in walk.parts if not name.endswith("2016-11-15")}


@pytest.mark.parametrize("change", ["hidden", "batch_stocks", "horizon", "every", "daily_window", "universe"])
def test_what_a_block_depends_on_is_in_its_identity(walk, change):
    value = {"universe": ("SIM-L", "SIM-M", "SIM-S"), "batch_stocks": 20}.get(change, 7)
    other = StockFactor(**SMALL | {change: value}, walk_forward=WALK)
    for name, part in walk.parts.items():
        same = change == "daily_window" and name.startswith("weekly")
        assert (part.identity == other.parts[name].identity) == same

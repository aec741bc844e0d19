import pytest

TINY = """
name = "tiny"
baseline = "adamw"
seeds = [0]
epochs = 3
patience = 3
workers = 0

[problem]
kind = "stock_factor"
hidden = 4
layers = 1
every = 10
daily_window = 10
weekly_window = 4
train = [2015-07-01, 2016-06-30]
validation = [2016-07-01, 2016-12-30]
test = [2017-01-02, 2017-06-30]

[problem.simulated]
seed = 3
stocks = 60
start = "2015-01-01"
end = "2017-06-30"

[base]
kind = "adamw"
lr = 1e-3
weight_decay = 1e-2

[optimizers.adamw]
[optimizers.friendly_sam]
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A study file that runs in a few seconds."""
    path = tmp_path_factory.mktemp("study") / "tiny.toml"
    path.write_text(TINY)
    return path

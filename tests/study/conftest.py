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


WALK = """
[problem.walk_forward]
first = 2016-11-15
last = 2017-04-28
train_months = 8
validation_months = 3
test_months = 3
"""


@pytest.fixture(scope="session")
def walk(tmp_path_factory):
    """The same study in two blocks, with a fund, for one epoch."""
    path = tmp_path_factory.mktemp("study") / "walk.toml"
    lines = [line for line in TINY.splitlines() if not line.startswith(("train =", "validation =", "test ="))]
    settings = {"epochs = 3": "epochs = 1", "layers = 1": 'layers = 1\nbatch_stocks = 30\nfunds = ["SIM-L"]'}
    text = "\n".join(settings.get(line, line) for line in lines)
    path.write_text(text.replace("[problem.simulated]", f"{WALK}\n[problem.simulated]"))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A study file that runs in a few seconds."""
    path = tmp_path_factory.mktemp("study") / "tiny.toml"
    path.write_text(TINY)
    return path

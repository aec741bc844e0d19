import pytest

from steppe.core.errors import SpecError, SteppeError
from steppe.study.spec import plan, read_spec
from steppe.study.trial import make_problem


def ids(path, *overrides):
    spec = read_spec(path, overrides)
    return {(t.part, t.label, t.seed): t.id for t in plan(spec, make_problem(spec.problem))}


def test_everything_but_the_optimizer_is_equal_and_written_out(tiny):
    resolved = read_spec(tiny).resolved()
    base = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-2}
    own = {"rho": 0.05, "sigma": 1.0, "lmbda": 0.9, "form": "code"}
    assert resolved["optimizers"] == {
        "adamw": {"kind": "adamw", **base},
        "friendly_sam": {"kind": "friendly_sam", "base": "adamw", **base, **own},
    }


def test_an_optimizer_may_bring_its_own_base(tiny):
    spec = read_spec(tiny, ["optimizers.friendly_sam.base=sgd", "optimizers.friendly_sam.lr=0.1"])
    assert spec.optimizer("friendly_sam") == {"kind": "friendly_sam", "base": "sgd", "hyper": {"lr": 0.1}}
    assert spec.optimizer("adamw") == {
        "kind": "adamw",
        "base": None,
        "hyper": {"lr": 1e-3, "weight_decay": 1e-2},
    }


def test_a_changed_optimizer_changes_only_its_own_trials(tiny):
    before, after = ids(tiny), ids(tiny, "optimizers.friendly_sam.rho=0.1")
    assert {key for key in before if before[key] != after[key]} == {
        ("daily", "friendly_sam", 0),
        ("weekly", "friendly_sam", 0),
    }


@pytest.mark.parametrize(
    "override", ["epochs=4", "problem.hidden=5", "base.lr=0.01", "problem.simulated.seed=4"]
)
def test_what_a_result_depends_on_is_in_every_id(tiny, override):
    before, after = ids(tiny), ids(tiny, override)
    assert not set(before.values()) & set(after.values())


@pytest.mark.parametrize("override", ["title=other", "workers=2"])
def test_what_no_result_depends_on_is_in_no_id(tiny, override):
    assert ids(tiny) == ids(tiny, override)


def test_an_added_seed_keeps_the_trials_of_the_others(tiny):
    before, after = ids(tiny), ids(tiny, "seeds=[0,1]")
    assert before.items() < after.items()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epoch=3", "unknown key 'epoch'. Did you mean 'epochs'"),
        ("epochs=0", "epochs: .*greater than or equal to 1, got 0"),
        ("baseline=sgd", "baseline 'sgd' is not among the optimizers: adamw, friendly_sam"),
        ("seeds=[1,1]", "repeat"),
        ("name=A b", "name"),
        ("epochs", "should read key.sub=value"),
        ("name.x=1", "not a table"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(tiny, override, message):
    with pytest.raises(SpecError, match=message):
        read_spec(tiny, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("problem.kind=stock_facto", "Did you mean 'stock_factor'"),
        ("problem.hiden=4", r"unknown key 'hiden'\. Did you mean 'hidden'"),
        ("problem.train=[2016-01-01, 2015-01-01]", "train block"),
        ("problem.test=[2030-01-01, 2030-12-31]", "test block .* has 0 sessions"),
        ('problem.universe=["SIM-X"]', "unknown index 'SIM-X'"),
        ("optimizers.sm={}", "unknown optimizer 'sm'. Did you mean"),
    ],
)
def test_a_wrong_problem_or_optimizer_says_what_is_wrong(tiny, override, message):
    with pytest.raises(SteppeError, match=message):
        ids(tiny, override)


def test_a_missing_or_broken_file_is_a_clear_error(tmp_path):
    with pytest.raises(SpecError, match="cannot read"):
        read_spec(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(SpecError, match="not valid TOML"):
        read_spec(tmp_path / "bad.toml")


def test_a_budget_in_evaluations_changes_a_trial_only_where_it_is_set(tiny):
    # the identities of studies that were run before there was such a budget
    content = read_spec(tiny).resolved()
    assert content["evaluations"] is None
    before, after = ids(tiny), ids(tiny, "evaluations=100")
    assert all(before[key] != after[key] for key in before)
    with pytest.raises(SpecError, match="evaluations"):
        read_spec(tiny, ["evaluations=0"])

import polars as pl
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from steppe.core.errors import SpecError
from steppe.core.seeding import generator
from steppe.problems.function_study import GRID, FunctionStudy
from steppe.study.run import run_study
from steppe.study.spec import StudySpec

PROBLEM = {
    "kind": "functions",
    "names": ["himmelblau", "rosenbrock-4", "xor", "linear_regression"],
    "steps": 5,
    "start": {"himmelblau": [1.0, 1.0]},
    "spread": 0.1,
}


def spec(**changes):
    content = {
        "name": "functions",
        "problem": PROBLEM,
        "optimizers": {"adam": {"lr": 0.1}, "pso": {"bounds": [-5.0, 5.0]}},
        "baseline": "adam",
        "seeds": (0, 1),
        "epochs": 6,
        "evaluations": 1000,
        "patience": 6,
        "workers": 0,
    }
    return StudySpec.model_validate(content | changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return run_study(spec(), tmp_path_factory.mktemp("functions"))


def test_trials_end_with_the_budget_and_paths_are_in_the_ledger(store):
    assert {row.state for row in store.trials()} == {"done"}
    history = store.history()
    flat = history.filter(pl.col("part") == "himmelblau")
    assert flat["validation_x0"].null_count() == flat["validation_x1"].null_count() == 0
    assert history.filter(pl.col("part") == "xor")["validation_x0"].null_count() > 0
    ends = history.group_by("trial").agg(pl.all().sort_by("epoch").last())
    adam, pso = (ends.filter(pl.col("optimizer") == key) for key in ("adam", "pso"))
    assert set(adam["gradient_evaluations"]) == {30}
    assert set(adam["forward_evaluations"]) == {0}
    assert set(pso["gradient_evaluations"]) == {0}
    assert all(1000 <= count < 1200 for count in pso["forward_evaluations"])


def test_tables_of_the_report(store):
    final = store.table("function_final")
    assert len(final) == 2 * 2 * 4
    assert final.filter(pl.col("part") == "xor")["floor"].null_count() == 4
    known = final.drop_nulls()
    assert (known["value"] >= known["floor"] - 1e-12).all()

    grid = store.table("function_grid")
    assert set(grid["part"]) == {"himmelblau", "linear_regression"}
    assert len(grid) == 2 * GRID**2
    x, y, value = (
        grid.filter(pl.col("part") == "himmelblau")[name].to_numpy() for name in ("x", "y", "value")
    )
    assert value == pytest.approx((x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2, rel=1e-9, abs=1e-9)

    assert store.table("function_minima").group_by("part").len().sort("part").rows() == [
        ("himmelblau", 4),
        ("linear_regression", 1),
    ]
    points, boundary = store.table("function_points"), store.table("boundary")
    assert len(points) == 200
    assert len(boundary) == 4 * GRID**2
    assert boundary["probability"].is_between(0, 1).all()
    starts = store.table("function_start").filter(pl.col("part") == "himmelblau")
    assert starts["seed"].to_list() == [0, 1]
    assert starts["x"][0] != starts["x"][1] != 1.0


def test_facts_of_the_report():
    facts = FunctionStudy(names=["himmelblau", "autoencoder"]).describe()
    assert facts["kind"] == "functions"
    assert facts["parts"]["autoencoder"]["floor"] == 0.7830541615008594
    assert any("0.39689" in sentence for sentence in facts["parts"]["autoencoder"]["errors"])
    assert len(facts["parts"]["himmelblau"]["minima"]) == 4


def test_one_part_that_fails_takes_no_other_with_it(tmp_path):
    optimizers = {"adam": {"lr": 0.1}, "sgd": {"lr": 0.001}}
    problem = {"kind": "functions", "names": ["himmelblau", "autoencoder"]}
    store = run_study(spec(problem=problem, optimizers=optimizers, seeds=(0,)), tmp_path / "s")
    assert [row.part for row in store.trials() if row.state == "failed"] == ["autoencoder"]
    left = store.table("function_final").select("optimizer", "part").rows()
    assert sorted(left) == [("adam", "autoencoder"), ("adam", "himmelblau"), ("sgd", "himmelblau")]


def test_noise_is_a_stream_of_its_own_and_the_score_is_without():
    part = FunctionStudy(names=["noisy_bowl"], steps=4).parts["noisy_bowl"]
    model = part.model(generator(0, "model"))
    assert parameters_to_vector(model.parameters()).tolist() == [1.0, 1.0]
    first = list(part.batches(generator(0, "batches", 1)))
    again = list(part.batches(generator(0, "batches", 1)))
    later = list(part.batches(generator(0, "batches", 2)))
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(torch.stack(first), torch.stack(later))
    assert len({tuple(batch.tolist()) for batch in first}) == 4
    assert part.loss(model, first[0]).item() != 2.0
    assert part.metrics(model, "validation") == {"value": 2.0, "x0": 1.0, "x1": 1.0}


def test_an_epoch_has_the_steps_that_were_asked_for():
    for name in ("himmelblau", "logistic", "xor"):
        part = FunctionStudy(names=[name], steps=25).parts[name]
        assert len(list(part.batches(generator(0, "batches", 1)))) == 25
    assert len(FunctionStudy(names=["logistic"], steps=25).parts["logistic"].full("train")) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"names": ["himelblau"]},
            "unknown function or small problem 'himelblau'. Did you mean 'himmelblau'",
        ),
        ({"names": ["rosenbrok-3"]}, "unknown function 'rosenbrok-3'"),
        ({"names": ["bowl"], "step": 3}, "Did you mean 'steps'"),
        ({"names": ["bowl", "bowl"]}, "repeat themselves"),
        ({"names": ["bowl"], "start": {"bow": [1.0, 1.0]}}, "unknown part 'bow'"),
        ({"names": ["bowl"], "start": {"bowl": [1.0]}}, "problem.start.bowl: need 2 numbers"),
        ({"names": []}, "names"),
    ],
)
def test_settings_are_strict(settings, message):
    with pytest.raises(SpecError, match=message):
        _ = FunctionStudy(**settings).parts

import math

import numpy as np
import pytest
import torch

import steppe
from steppe.core.errors import DataError, SpecError
from steppe.optim.minimize import minimize
from steppe.problems.functions import FUNCTIONS

HIMMELBLAU = FUNCTIONS["himmelblau"]


def shifted(x):
    return (x - 3).square().sum()


def by_numpy(x):
    return float(np.sum(np.square(np.asarray(x) - 1)))


def test_it_is_public():
    assert steppe.minimize is minimize


@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [
        ("adam", {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1}),
        ("torch.optim:RMSprop", {"lr": 0.05}),
        (lambda params: torch.optim.LBFGS(params, line_search_fn="strong_wolfe"), {}),
        ("sam", {"base": "sgd", "lr": 0.1, "rho": 1e-6}),
    ],
)
def test_every_way_to_name_an_optimizer(optimizer, hyper):
    found = minimize(shifted, [0.0, 10.0], optimizer, evaluations=1500, **hyper)
    assert found.x == pytest.approx([3.0, 3.0], abs=0.02)
    assert found.value == float(shifted(torch.from_numpy(found.x)))
    assert len(found.trace.value) == len(found.trace.evaluations)
    assert found.trace.value[0] == 58.0


def test_the_article_stops_where_the_gradient_is_small():
    article = FUNCTIONS["adam_article"]
    found = minimize(article, article.start, "adam", lr=0.1, tolerance=1e-6)
    assert len(found.trace.value) == 298  # 297 steps, and the gradient that says it is enough
    assert found.trace.value[-1] == pytest.approx(-8.949999999999953, abs=1e-14)
    assert found.trace.value[[0, 1, 10, 200]] == pytest.approx(
        [4.0, 2.17000000185641, -7.76589410609043, -8.949999990607559], rel=1e-12
    )
    assert found.finished == "the gradient's norm is below 1e-06"


def test_the_budget_counts_forward_passes():
    found = minimize(shifted, [0.0], "sgd", lr=1e-3, evaluations=31)
    assert found.trace.evaluations.tolist() == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33]
    assert found.evaluations == 34  # and where the last step led
    assert found.finished == "the budget of 31 evaluations is spent"
    assert found.value < found.trace.value[-1]
    found = minimize(shifted, [0.0], "sgd", lr=1e-3, steps=4)
    assert found.finished == "4 steps are done"
    assert len(found.trace.value) == 4


@pytest.mark.parametrize("fn", [HIMMELBLAU, lambda x: HIMMELBLAU(x).numpy()], ids=["torch", "numpy"])
def test_without_gradients_any_number_will_do(fn):
    found = minimize(fn, [0.0, 0.0], "pso", bounds=(-5.0, 5.0), evaluations=1500, seed=1)
    assert found.value < 0.01
    assert min(math.dist(found.x, minimum) for minimum in HIMMELBLAU.minima) < 0.1
    again = minimize(fn, [0.0, 0.0], "pso", bounds=(-5.0, 5.0), evaluations=1500, seed=1)
    other = minimize(fn, [0.0, 0.0], "pso", bounds=(-5.0, 5.0), evaluations=1500, seed=2)
    assert np.array_equal(found.x, again.x)
    assert not np.array_equal(found.x, other.x)
    assert np.abs(found.x).max() <= 5.0
    assert found.evaluations == found.trace.evaluations[-1]


def test_a_search_that_has_ended_says_so():
    pytest.importorskip("scipy")
    found = minimize(by_numpy, [0.0, 0.0], "slsqp", gradient="difference")
    assert found.x == pytest.approx([1.0, 1.0], abs=1e-6)
    assert found.evaluations < 50
    assert "success" in found.finished


def test_the_start_is_left_alone_and_so_is_the_best_point():
    start = torch.tensor([0.0, 0.0], dtype=torch.float64)
    found = minimize(lambda x: -x.sum() if x[0] < 1 else 100 + x.sum(), start, "sgd", lr=0.3, steps=20)
    assert start.tolist() == [0.0, 0.0]
    assert found.value == pytest.approx(-1.8)
    assert found.x == pytest.approx([0.9, 0.9])


def test_divergence_ends_the_search_with_the_best_so_far():
    found = minimize(lambda x: (x**4).sum(), [2.0], "sgd", lr=10.0)
    assert found.finished.startswith("diverged")
    assert found.value == 16.0
    assert found.x.tolist() == [2.0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: minimize(by_numpy, [0.0], "adam"), SpecError, "torch operations, or take a gradient-free"),
        (lambda: minimize(lambda x: np.sin(x).sum(), [0.0], "adam"), SpecError, "torch operations"),
        (lambda: minimize(shifted, [0.0], "adam", bounds=(0, 1)), SpecError, "Adam keeps no bounds"),
        (lambda: minimize(shifted, [0.0], "adam", lrr=1), SpecError, "Did you mean 'lr'"),
        (lambda: minimize(shifted, [0.0], torch.optim.SGD, lrr=1), SpecError, "Did you mean 'lr'"),
        (lambda: minimize(shifted, [0.0], "adm"), SpecError, "unknown optimizer 'adm'"),
        (lambda: minimize(shifted, [0.0], lambda p: None, lr=1), SpecError, "leave out lr"),
        (lambda: minimize(shifted, [math.nan], "adam"), DataError, "finite numbers"),
        (lambda: minimize(shifted, [[0.0]], "adam"), DataError, "vector"),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()

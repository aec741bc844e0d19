import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from steppe.core.errors import DataError, SpecError
from steppe.problems.function import check, register
from steppe.problems.functions import FAMILIES, FUNCTIONS, find_function

NAMES = sorted(FUNCTIONS)


def test_a_wrong_gradient_is_refused_with_its_coordinate():
    # as the note prints it: (2x, 100y) for x² + 5y²
    note = replace(
        FUNCTIONS["adam_note"],
        name="note_as_printed",
        gradient=lambda x: torch.stack((2 * x[0], 100 * x[1])),
    )
    with pytest.raises(
        DataError, match=r"gradient of 'note_as_printed' is wrong in coordinate 1: .*differentiating"
    ):
        register(note)
    assert "note_as_printed" not in FUNCTIONS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hessian": lambda x: torch.diag(torch.tensor([2.0, 11.0]).double())},
            r"Hessian .* in coordinate \(1, 1\)",
        ),
        ({"gradient": lambda x: x[:1]}, r"has shape \[1\], not \[2\]"),
        ({"minimum": -1.0}, "is 0 at .*, not its minimum -1"),
        ({"minima": [(0.0, 1.0)], "minimum": 5.0}, "gradient .* at its stated minimum"),
        ({"start": (1.0,)}, "a start of 1 numbers, but dim is 2"),
        ({"name": "bowl"}, "registered already"),
    ],
)
def test_wrong_statements_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        register(replace(FUNCTIONS["adam_note"], **{"name": "wrong", **change}))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_nearby_is_below_the_minimum(name):
    function = FUNCTIONS[name]
    low, high = function.bounds
    x = low + (high - low) * torch.rand(
        2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    near = torch.tensor(function.minima, dtype=torch.float64).repeat(50, 1)
    near = near + 1e-3 * torch.randn(
        near.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    values = function(torch.cat([x, near]))
    assert values.shape == (2000 + 50 * len(function.minima),)
    assert float(values.min()) >= function.minimum


@pytest.mark.parametrize("family", FAMILIES)
@given(dim=st.integers(2, 12))
@settings(max_examples=4, deadline=None)
def test_families_have_any_dimension(family, dim):
    function = FAMILIES[family](f"{family}-{dim}", dim)
    check(function)
    x = torch.randn(3, 4, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
    assert function(x).shape == (3, 4)
    assert function(x)[1, 2] == pytest.approx(float(function(x[1, 2])), rel=1e-12)


def test_published_values():
    def value(name, *x):
        return float(FUNCTIONS[name](torch.tensor(x, dtype=torch.float64)))

    assert value("rosenbrock", -1.5, 1.5) == 62.5
    assert value("himmelblau", 0.0, 0.0) == 170.0
    assert value("adam_article", 1.0, 1.0) == 4.0
    assert value("adam_note", 10.0, 10.0) == 600.0
    assert value("beale", 0.0, 0.0) == pytest.approx(1.5**2 + 2.25**2 + 2.625**2)
    assert value("rastrigin", 0.5, 0.5) == pytest.approx(40.5)
    assert value("ackley", 1.0, 1.0) == pytest.approx(20 * (1 - math.exp(-0.2)))
    assert len(FUNCTIONS["himmelblau"].minima) == 4


def test_the_ill_conditioned_quadratic_is_rotated():
    matrix = FUNCTIONS["ill_conditioned"].hessian(torch.zeros(2, dtype=torch.float64))
    curvatures = torch.linalg.eigvalsh(matrix)
    assert float(curvatures[-1] / curvatures[0]) == pytest.approx(1e6, rel=1e-6)
    assert abs(float(matrix[0, 1])) > 1e3


def test_names_are_found():
    assert find_function("rosenbrock-7").dim == 7
    assert find_function("rosenbrock-7") is find_function("rosenbrock-7")
    for wrong in ("himelblau", "rosenbrock-1", "himmelblau-3", "bowl-x"):
        with pytest.raises(SpecError, match=f"unknown function '{wrong}'"):
            find_function(wrong)

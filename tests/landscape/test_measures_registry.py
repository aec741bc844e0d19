"""What holds for every measure: scale, bits, cost, errors."""

import inspect
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from steppe.core.errors import SpecError
from steppe.core.seeding import generator
from steppe.landscape import Point
from steppe.landscape.measures import MEASURES, measure

from .points import factor

ALL = [key for key in MEASURES if not MEASURES[key].needs]


def relu(alpha=1.0):
    """A ReLU net, three batches; its first layer times alpha and its second over alpha: the same function."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        model[0].weight.mul_(alpha)
        model[0].bias.mul_(alpha)
        model[2].weight.div_(alpha)
    g = generator(1)
    x = torch.randn(12, 3, generator=g, dtype=torch.float64)
    y = torch.randn(12, 1, generator=g, dtype=torch.float64)
    batches = list(zip(x.split(4), y.split(4), strict=True))
    return Point(model, lambda m, b: F.mse_loss(m(b[0]), b[1]), batches)


def quick(key):
    """The arguments among these that the measure takes: enough for what does not hang on precision."""
    few = {"max_probes": 4, "max_pairs": 4, "steps": 8, "lines": 2, "pairs": 2, "blocks": 2}
    return {k: v for k, v in few.items() if k in inspect.signature(MEASURES[key].load()).parameters}


@pytest.mark.parametrize("key", ALL)
def test_only_invariant_measures_survive_rescaling_the_layers(key):
    one, two = (measure(key, relu(alpha), generator(2), **quick(key)).value for alpha in (1.0, 4.0))
    if MEASURES[key].invariant:
        assert two == pytest.approx(one, rel=1e-6)
    else:
        assert abs(two / one - 1) > 0.05
        assert MEASURES[MEASURES[key].partner].invariant


@pytest.mark.parametrize("key", ["basin_width", "worst_case_l2", "worst_case_linf"])
def test_what_makes_them_invariant(key):
    plain = {"normalise": "none"} if key == "basin_width" else {"adaptive": False, "rho": 0.1}
    one, two = (measure(key, relu(alpha), generator(2), **plain).value for alpha in (1.0, 4.0))
    assert abs(two / one - 1) > 0.05


@pytest.mark.parametrize("key", MEASURES)
def test_bits_weights_and_cost(key):
    point = relu()
    more = {"time_dispersion": {"blocks": 3}, "barrier": {"other": point.theta + 1}}.get(key, {})
    weights = [p.detach().clone() for p in point.params]
    state, before = torch.get_rng_state(), point.cost
    one, middle = measure(key, point, generator(3), **more), point.cost
    two = measure(key, point, generator(3), **more)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(point.params, weights, strict=True))
    assert all(p.grad is None for p in point.params)
    assert (one.value, one.converged, one.note) == (two.value, two.converged, two.note)
    spent, spec = middle - before, MEASURES[key]
    assert (one.cost.forward, one.cost.gradient) == pytest.approx((spent.forward, spent.gradient))
    if spec.random:
        assert spent.forward <= spec.cost.forward + 1e-9
        assert spent.gradient <= spec.cost.gradient + 1e-9
    else:
        assert (spent.forward, spent.gradient) == pytest.approx((spec.cost.forward, spec.cost.gradient))
    assert math.isfinite(one.value)


@pytest.mark.parametrize("key", ALL)
def test_on_the_recurrent_net_in_float32(key):
    point = factor(torch.float32, hidden=4)[0]
    found = measure(key, point, generator(4), **quick(key))
    assert math.isfinite(found.value)


@pytest.mark.parametrize("key", MEASURES)
def test_entries(key):
    spec = MEASURES[key]
    taken = inspect.signature(spec.load()).parameters
    assert list(taken)[:2] == ["point", "generator"]
    assert set(spec.hyper) <= set(taken)
    required = [
        name for name, p in taken.items() if p.default is p.empty and name not in ("point", "generator")
    ]
    assert list(spec.needs) == required
    assert spec.summary
    assert spec.cost.forward + spec.cost.gradient > 0
    assert spec.invariant or spec.partner or key == "barrier"


def test_what_is_wrong_is_named():
    point = relu()
    with pytest.raises(SpecError, match="Did you mean 'lambda_max'"):
        measure("lamda_max", point, generator(0))
    with pytest.raises(SpecError, match=r"argument of measure 'sam'.*Did you mean 'rho'"):
        measure("sam", point, generator(0), roh=1)
    with pytest.raises(SpecError, match="needs other"):
        measure("barrier", point, generator(0))
    with pytest.raises(SpecError, match="Did you mean 'linf'"):
        measure("worst_case_l2", point, generator(0), norm="inf")
    for key, name in [
        ("sam", "rho"),
        ("worst_case_l2", "steps"),
        ("epsilon_sharpness", "epsilon"),
        ("average_case", "rho"),
        ("pac_bayes", "tol"),
        ("local_entropy", "beta"),
        ("basin_width", "limit"),
    ]:
        with pytest.raises(SpecError, match=f"must be above 0: {name}"):
            measure(key, point, generator(0), **{name: 0})
    for key in ("pac_bayes", "basin_width"):
        with pytest.raises(SpecError, match="allowed rise"):
            measure(key, point, generator(0), rise=-1.0)

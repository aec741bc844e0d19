"""What the first-order optimizers promise: bounds, invariances, equivalences."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.core.spec import Spec
from steppe.optim import OPTIMIZERS, create
from steppe.optim.first_order import betas_at
from steppe.testing import Rig

FIRST = [key for key, spec in OPTIMIZERS.items() if spec.family == "first-order"]
GRADIENTS = st.lists(
    st.floats(1e-3, 1e3).flatmap(lambda size: st.sampled_from([size, -size])), min_size=1, max_size=30
)
EXAMPLES = settings(max_examples=40, deadline=None)


def positions(key: str, gradients: list[float], **hyper: object) -> list[float]:
    """The positions of one weight, from 0, that sees these gradients whatever it does."""
    p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = create(key, [p], **hyper)
    seen = [0.0]
    for gradient in gradients:
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        seen.append(p.item())
    return seen


def steps(key: str, gradients: list[float], **hyper: object) -> list[float]:
    seen = positions(key, gradients, **hyper)
    return [after - before for before, after in pairwise(seen)]


@pytest.mark.parametrize("key", ["adam", "classic_adam"])
@EXAMPLES
@given(GRADIENTS, st.sampled_from([(0.9, 0.999), (0.5, 0.9), (0.9, 0.95), (0.0, 0.999), (0.9, 0.9)]))
def test_adams_step_is_bounded(key: str, gradients: list[float], betas: tuple[float, float]) -> None:
    # section 2.1 states its bounds for long histories; this one, by Cauchy and Schwarz, holds at every step
    b1, b2 = betas
    alpha = 0.1
    for t, step in enumerate(steps(key, gradients, lr=alpha, betas=betas, eps=0.0), 1):
        weights = [(1 - b1) * b1 ** (t - s) / (1 - b1**t) for s in range(1, t + 1)]
        squares = [(1 - b2) * b2 ** (t - s) / (1 - b2**t) for s in range(1, t + 1)]
        sharp = math.sqrt(sum(w * w / q for w, q in zip(weights, squares, strict=True)))
        assert abs(step) <= alpha * sharp * (1 + 1e-9)


def test_adams_steps_reach_the_papers_bound_and_no_more() -> None:
    b1, b2 = 0.5, 0.99
    bound = (1 - b1) / math.sqrt(
        1 - b2
    )  # (1 - b1) > sqrt(1 - b2): the sparsest case, one after next to nothing
    step = steps("adam", [*[1e-12] * 2500, 1.0], lr=1.0, betas=(b1, b2), eps=0.0)[-1]
    assert abs(step) == pytest.approx(bound, rel=1e-9)
    for size in (1e-3, 1.0, 1e3):
        assert all(abs(s) <= 0.1 * (1 + 1e-9) for s in steps("adam", [size] * 50, lr=0.1, eps=0.0))


@pytest.mark.parametrize(
    ("key", "hyper"),
    [
        ("adam", {"eps": 0.0}),
        ("classic_adam", {"eps": 0.0}),
        ("classic_adam", {"eps": 0.0, "form": "efficient", "sqrt_decay": True, "beta_decay": 0.9}),
        ("rmsprop", {"eps": 0.0}),
        ("adagrad", {"eps": 0.0}),
    ],
)
@EXAMPLES
@given(GRADIENTS, st.integers(-8, 8))
def test_steps_do_not_depend_on_the_objectives_scale(
    key: str, hyper: dict, gradients: list[float], power: int
) -> None:
    scaled = [gradient * 10.0**power for gradient in gradients]
    one, other = (positions(key, g, lr=0.1, **hyper) for g in (gradients, scaled))
    assert one == pytest.approx(other, rel=1e-9, abs=1e-12)


@EXAMPLES
@given(GRADIENTS)
def test_adagrads_rates_never_rise(gradients: list[float]) -> None:
    taken = steps("adagrad", gradients, lr=0.1)
    rates = [abs(step / gradient) for step, gradient in zip(taken, gradients, strict=True)]
    # a step is a difference of positions: as good as their rounding
    slack = [2e-16 * 4 * len(gradients) / abs(gradient) for gradient in gradients]
    for at in range(1, len(rates)):
        assert rates[at] <= rates[at - 1] * (1 + 1e-9) + slack[at] + slack[at - 1]


@EXAMPLES
@given(GRADIENTS)
def test_adamaxs_step_is_bounded_by_alpha(gradients: list[float]) -> None:
    assert all(abs(step) <= 0.1 * (1 + 1e-9) for step in steps("adamax", gradients, lr=0.1))


@EXAMPLES
@given(st.floats(0.1, 3.0), st.floats(0.01, 0.2), st.floats(0.1, 0.95), st.floats(-2, 2))
def test_nag_is_its_look_ahead_form(curvature: float, lr: float, momentum: float, start: float) -> None:
    p = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = create("nag", [p], lr=lr, momentum=momentum)
    x, u = start, 0.0
    for _ in range(20):
        ahead = x - momentum * u
        assert p.item() == pytest.approx(ahead, rel=1e-9, abs=1e-12)
        u = momentum * u + lr * curvature * math.sin(ahead)
        x -= u
        p.grad = curvature * p.detach().sin()
        optimizer.step()


@EXAMPLES
@given(GRADIENTS)
def test_classic_adam_is_torchs_adam(gradients: list[float]) -> None:
    one, other = (positions(key, gradients, lr=0.1) for key in ("adam", "classic_adam"))
    assert one == pytest.approx(other, rel=1e-12, abs=1e-14)


def test_the_efficient_form_adds_eps_before_the_correction() -> None:
    (first,) = steps("classic_adam", [2.0], lr=0.1, eps=0.5, form="efficient")
    assert first == pytest.approx(-0.1 * math.sqrt(0.001) / 0.1 * 0.2 / (math.sqrt(0.001 * 4) + 0.5))
    (first,) = steps("classic_adam", [2.0], lr=0.1, eps=0.5)
    assert first == pytest.approx(-0.1 * 2 / 2.5)


def test_the_step_size_falls_with_the_root_of_t() -> None:
    taken = steps("classic_adam", [3.0] * 9, lr=0.1, eps=0.0, sqrt_decay=True)
    assert taken == pytest.approx([-0.1 / math.sqrt(t) for t in range(1, 10)])


def test_betas_decay_as_paper_and_note_say() -> None:
    assert betas_at(1, (0.9, 0.99), 0.5) == betas_at(1, (0.9, 0.99), 0.5, "note")
    assert betas_at(3, (0.8, 0.9), 0.5) == ((0.2, 0.9), (1 - 0.8**3, 1 - 0.9**3))
    assert betas_at(3, (0.8, 0.9), 0.5, "note") == ((0.2, 0.225), (1 - 0.2**3, 1 - 0.225**3))


@pytest.mark.parametrize(
    ("key", "hyper", "message"),
    [
        ("classic_adam", {"form": "fast"}, "form='fast', but it must be 'algorithm' or 'efficient'"),
        ("classic_adam", {"betas": (0.9, 1.0)}, "betas="),
        ("classic_adam", {"beta_decay": 0.0}, "beta_decay=0.0"),
        ("muon", {"adjust_lr_fn": "none"}, "adjust_lr_fn='none'"),
        ("gd", {"momentum": 0.9}, "unknown hyper-parameter"),
    ],
)
def test_errors_say_what_is_wrong(key: str, hyper: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        create(key, [nn.Parameter(torch.ones(2))], **hyper)


def test_a_missing_package_is_named() -> None:
    spec = Spec("no_such_package:Optimizer", "first-order", "", requires="no-such-package")
    assert "pip install 'no-such-package'" in spec.missing
    with pytest.raises(SpecError, match="pip install 'no-such-package'"):
        create(spec, [nn.Parameter(torch.ones(2))])
    assert not OPTIMIZERS["sgd"].missing


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest() -> None:
    if OPTIMIZERS["muon"].missing:
        pytest.skip(OPTIMIZERS["muon"].missing)
    rig, plain = (Rig(OPTIMIZERS["muon"], {"lr": 0.02}) for _ in range(2))
    matrices = [p for p in plain.model.parameters() if p.ndim == 2]
    others = [p for p in plain.model.parameters() if p.ndim != 2]
    pair = [
        torch.optim.Muon(matrices, lr=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.02, weight_decay=0.1),
    ]
    rig.train(5)
    for _ in range(5):
        plain.closure()
        for optimizer in pair:
            optimizer.step()
        plain.steps += 1
    for a, b in zip(rig.weights(), plain.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("key", FIRST)
def test_as_base_with_a_perturbation_of_zero_it_is_itself(key: str) -> None:
    if OPTIMIZERS[key].missing:
        pytest.skip(OPTIMIZERS[key].missing)

    def trained(spec: Spec, hyper: dict) -> list[Tensor]:
        rig = Rig(spec, hyper)
        rig.train(5)
        return rig.weights()

    demo = dict(OPTIMIZERS[key].demos[0])
    alone, wrapped = (
        trained(OPTIMIZERS[key], demo),
        trained(OPTIMIZERS["sam"], {"base": key, "rho": 0.0, **demo}),
    )
    for a, b in zip(alone, wrapped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)

"""What goes wrong in sharpness-aware optimizers elsewhere: each of these was seen in a library or an official code.

Most are held by a check of the conformance suite, which runs on every registered optimizer: `holds` runs it on a few
and makes sure that none is excused from it.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steppe.optim import ASAM, GSAM, OPTIMIZERS, SAM, create
from steppe.optim.registry import optimizer_class
from steppe.optim.sharpness.esam import sharpest
from steppe.optim.sharpness.gradients import bucketed
from steppe.optim.sharpness.gsam import rho_of_lr
from steppe.testing import CHECKS, SHARPNESS_CHECKS, Rig
from steppe.testing.rig import quiet, same

from .test_golden import CASES as GOLDEN_CASES
from .test_loops import EditsGradients
from .test_sharpness import gradients, parameter

FAMILY = {key: spec for key, spec in OPTIMIZERS.items() if spec.family == "sharpness-aware"}
OVER_SGD = [
    key
    for key, spec in FAMILY.items()
    if "base" in inspect.signature(optimizer_class(spec)).parameters and "base" not in spec.demos[0]
]
"""Those that have a base, and no other than SGD in their first demo."""


def holds(check: str, *keys: str) -> None:
    assert not [key for key, spec in FAMILY.items() if check in spec.xfail]
    for key in keys:
        {**CHECKS, **SHARPNESS_CHECKS}[check](FAMILY[key], FAMILY[key].demos[0])


def rig(key: str, **hyper: Any) -> Rig:
    return Rig(FAMILY[key], {**FAMILY[key].demos[0], **hyper})


def test_1_gradients_scaled_for_amp_are_stepped_with() -> None:
    holds("takes_a_scaler", "sam", "lookbehind")


def test_2_an_inf_in_the_first_pass_spoils_the_weights() -> None:
    holds("skips_what_is_not_finite", "asam", "sampa")


def test_3_an_exception_in_the_second_pass_leaves_the_weights_perturbed() -> None:
    holds("restores_after_exceptions", "gam", "lookbehind")


def test_4_a_gradient_missing_in_the_second_pass_leaves_its_weight_perturbed() -> None:
    holds("restores_without_later_gradients", "sam", "cr_sam")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_5_perturbations_of_half_weights_round_away(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(10_000, dtype=dtype))
    optimizer, g = SAM([p], rho=0.05, lr=0.0), torch.ones_like(p)
    with quiet():
        clean, perturbed = gradients(optimizer, {p: g}, {p: g})
    mean = (perturbed[0].float() - clean[0].float()).mean().item()
    assert mean == pytest.approx(0.05 / 10_000**0.5, rel=0.2)  # rounded to nearest it would be 0


def test_6_resuming_loses_the_momentum_of_the_base() -> None:
    holds("resumes_exactly", "sam", "sampa")
    trained = rig("sam")
    trained.train(1)
    assert "momentum_buffer" in trained.optimizer.state_dict()["state"][0]


@pytest.mark.parametrize("key", FAMILY)
def test_7_a_gradient_of_zero_makes_nan(key: str) -> None:
    trained, seen = rig(key), []

    def closure(p: Any = None) -> Tensor:
        seen.extend(trained.weights())
        loss = trained.closure(p)
        for param in trained.model.parameters():
            param.grad = torch.zeros_like(param)
        return loss

    trained.train(2, closure)
    assert all(bool(w.isfinite().all()) for w in [*seen, *trained.weights()])


def test_8_optimizers_cannot_be_copied() -> None:
    holds("copies_deeply", "gsam", "bsam")


def test_9_groups_cannot_be_added() -> None:
    holds("adds_param_groups", "ssam", "sampa")


def test_10_gsams_radius_is_negative_during_warm_up() -> None:
    for lr in (0.0, 0.01, 0.05):
        assert rho_of_lr(lr, rho=0.2, rho_min=0.1, lr_max=1.0, lr_min=0.1) == 0.1


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.5])
def test_11_esam_is_left_without_samples(form: str, samples: int, gamma: float) -> None:
    before, after = torch.zeros(samples), torch.arange(samples) / 2
    for rise in (after, torch.zeros(samples)):
        assert len(sharpest(before, rise, gamma, form)) >= 1


def test_12_a_step_without_gradients_raises() -> None:
    holds("stands_no_gradients", "sam", "msam")


def test_13_running_statistics_are_those_of_perturbed_weights() -> None:
    holds("keeps_statistics_clean", "sam", "gam")


def test_14_evaluation_and_checkpoints_see_perturbed_weights() -> None:
    # with a learning rate of 0 there is nothing else that could move them
    holds("obeys_schedulers", "msam", "sampa")

    class Averaging(torch.optim.SGD):
        evaluating = False

        def eval(self) -> None:
            self.evaluating = True

    optimizer = SAM([parameter(1.0)], base=Averaging, lr=0.1)
    optimizer.eval()
    assert optimizer.base.evaluating


@pytest.mark.parametrize(
    ("key", "passes"),
    {
        "sam": 40,
        "asam": 40,
        "gsam": 40,
        "gam": 80,
        "friendly_sam": 40,
        "looksam": 24,
        "late_sam": 24,
        "vasso": 40,
        "wsam": 40,
        "sampa": 40,
        "msam": 20,
        "cr_sam": 60,
        "lookbehind": 80,
        "sagm": 40,
        "bsam": 40,
        "usam": 40,
        "functional_sam": 40,
    }.items(),
)
def test_15_passes_are_taken_that_nobody_needs(key: str, passes: int) -> None:
    trained = rig(key, **({"tail_frac": 0.2, "total_steps": 20} if key == "late_sam" else {}))
    trained.train(20)
    assert trained.passes == passes


@pytest.mark.parametrize("key", FAMILY)
def test_16_a_backward_before_the_closure_counts_twice(key: str) -> None:
    plain, twice = rig(key), rig(key)
    for _ in range(2):
        plain.train(1)
        twice.backward()
        with quiet():
            twice.train(1)
    assert same(plain.weights(), twice.weights())


def test_17_bsam_does_not_restore_decays_wrongly_and_makes_too_little_noise() -> None:
    holds("restores_after_exceptions", "bsam")
    p = nn.Parameter(torch.ones(10_000, dtype=torch.float64))
    optimizer = create("bsam", [p], data_size=100, s_init=4.0, weight_decay=0.5, lr=1.0, betas=(0.9, 0.9))
    zero = torch.zeros_like(p)
    (noisy,), _ = gradients(optimizer, {p: zero}, {p: zero})
    assert (noisy - 1).std().item() == pytest.approx(1 / math.sqrt(100 * 4.0), rel=0.05)
    torch.testing.assert_close(
        optimizer.state[p]["m"], torch.full_like(p, 0.1 * 0.5)
    )  # of w, not of p · decay
    assert p[0].item() == pytest.approx(1 - 0.05 / 4)


@pytest.mark.parametrize(
    ("cls", "hyper"), [(SAM, {"adaptive": True}), (ASAM, {}), (GSAM, {"adaptive": True})]
)
def test_18_complex_weights_are_squared_without_modulus(cls: type, hyper: dict[str, Any]) -> None:
    moved = []
    for turn in (1, 1j):  # turning all weights turns the perturbation, and changes nothing else
        z = nn.Parameter(turn * torch.tensor([[3 + 4j, 1j, 2.0]], dtype=torch.complex128))
        g = turn * torch.tensor([[1j, 1 + 0j, 1 - 1j]], dtype=torch.complex128)
        clean, perturbed = gradients(cls([z], rho=1.0, lr=0.0, **hyper), {z: g}, {z: g})
        moved.append((perturbed[0] - clean[0]) / turn)
    torch.testing.assert_close(*moved)
    assert moved[0].abs().max() > 0.1


@pytest.mark.parametrize("key", FAMILY)
def test_19_a_loss_of_zero_skips_the_step_and_steps_are_not_saved(key: str) -> None:
    plain, zero = rig(key), rig(key)

    def closure(p: Any = None) -> float:
        zero.closure(p)
        return 0.0

    plain.train(2)
    zero.train(2, closure)
    assert same(plain.weights(), zero.weights())
    assert zero.optimizer.state_dict()["sharpness_aware"]["steps"] == 2


@pytest.mark.parametrize("key", OVER_SGD)
def test_20_a_base_that_edits_gradients_spoils_the_rule(key: str) -> None:
    plain, edited = rig(key), rig(key, base=EditsGradients)
    plain.train(3)
    edited.train(3)
    assert same(plain.weights(), edited.weights())


def test_21_groups_and_devices_have_norms_of_their_own() -> None:
    assert "sam-groups_sgd" in GOLDEN_CASES  # one norm over all groups, a rho for each
    params = [parameter(1.0), nn.Parameter(torch.ones(1, dtype=torch.float64, device="meta"))]
    for p in params:
        p.grad = torch.ones_like(p)
    buckets = bucketed(SAM(params).param_groups, lambda index, name, param: None)
    assert [str(bucket.params[0].device) for bucket in buckets] == ["cpu", "meta"]


@pytest.mark.parametrize("key", FAMILY)
def test_22_adam_finds_state_that_is_not_its_own_and_does_not_start(key: str) -> None:
    demos = [demo for demo in FAMILY[key].demos if demo.get("base") == "adamw"]
    trained = Rig(FAMILY[key], demos[0]) if demos else rig(key)
    held = []

    def closure(p: Any = None) -> Tensor:
        held.append(len(trained.optimizer.state))
        return trained.closure(p)

    trained.train(1, closure)
    assert held[0] == 0
    if demos:
        names = {name for values in trained.optimizer.state.values() for name in values}
        assert names == {"step", "exp_avg", "exp_avg_sq"}

"""Members that do not perturb every step: LookSAM, RST and G-RST, AE-SAM, late-phase SAM."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.core.spec import Spec
from steppe.optim import AESAM, GRST, RST, LateSAM, LookSAM, create
from steppe.optim.sharpness.rst import probability
from steppe.testing import Rig, checks_for

from . import oracles, oracles_cadence

BASES = {
    "sgd": ("sgd", {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}),
    "adamw": ("adamw", {"lr": 1e-2, "weight_decay": 1e-2}),
}
AE = {"rho": 0.1, "delta": 0.9, "lambda1": -1.0, "lambda2": 1.0, "total_steps": 24}
LATE = {"rho": 0.1, "total_steps": 24, "tail_frac": 0.5, "ramp": 4}
# ours beside the oracle's: key and hyper-parameters, hyper-parameters
VARIANTS: dict[str, tuple[str, dict, dict]] = {
    "looksam": ("looksam", {}, {"rho": 0.1, "k": 5, "alpha": 0.7}),
    "looksam-k3": ("looksam", {}, {"rho": 0.3, "k": 3, "alpha": 0.2}),
    "looksam-tensor": ("looksam", {"norms": "tensor"}, {"rho": 0.1, "k": 5, "alpha": 0.7}),
    "rst": ("rst", {"p": 0.5}, {"rho": 0.1}),
    "rst-linear": ("rst", {"p": 0.1, "schedule": "linear", "total_steps": 24}, {"rho": 0.1}),
    "rst-piecewise": ("rst", {"p": 0.9, "schedule": "piecewise", "total_steps": 24}, {"rho": 0.1}),
    "rst-trigonometric": ("rst", {"p": 1.0, "schedule": "trigonometric", "total_steps": 24}, {"rho": 0.1}),
    "g_rst": ("g_rst", {}, {"rho": 0.1, "gamma": 2.0}),
    "g_rst-half": ("g_rst", {}, {"rho": 0.1, "gamma": 0.5}),
    "ae_sam": ("ae_sam", {}, AE),
    "ae_sam-other": ("ae_sam", {}, {**AE, "delta": 0.5, "lambda1": 0.5, "lambda2": -0.5}),
    "late_sam": ("late_sam", {}, LATE),
    "late_sam-no-ramp": ("late_sam", {}, {**LATE, "ramp": 0, "tail_frac": 0.3}),
}


class Problem:
    """A random network, four batches that take turns, and its gradient as a function of a flat numpy vector."""

    def __init__(self, seed: int) -> None:
        stream = torch.Generator().manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.x = torch.randn(4, 6, 3, generator=stream, dtype=torch.float64)
        self.y = torch.randn(4, 6, 1, generator=stream, dtype=torch.float64)
        sizes = [p.numel() for p in self.net.parameters()]
        self.start = torch.randn(sum(sizes), generator=stream, dtype=torch.float64)
        nn.utils.vector_to_parameters(self.start.clone(), self.net.parameters())
        ends = np.cumsum([0, *sizes]).tolist()
        self.slices = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self.passes = 0

    def closure(self, optimizer: torch.optim.Optimizer, batch: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.passes += 1
            optimizer.zero_grad()
            loss = (self.net(self.x[batch]) - self.y[batch]).square().mean()
            loss.backward()
            return loss

        return closure

    def gradient(self, batch: int) -> oracles.Gradient:
        def gradient(w: np.ndarray) -> np.ndarray:
            leaf = torch.from_numpy(w).requires_grad_()
            named = {
                name: leaf[s].view(p.shape)
                for s, (name, p) in zip(self.slices, self.net.named_parameters(), strict=True)
            }
            value = (torch.func.functional_call(self.net, named, self.x[batch]) - self.y[batch]).square()
            return torch.autograd.grad(value.mean(), leaf)[0].numpy()

        return gradient

    def weights(self) -> np.ndarray:
        return nn.utils.parameters_to_vector(self.net.parameters()).detach().numpy()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_oracle(variant: str, base: str, seed: int) -> None:
    problem = Problem(seed)
    key, extra, hyper = VARIANTS[variant]
    base_key, base_hyper = BASES[base]
    optimizer = create(
        key, problem.net.named_parameters(), base=base_key, seed=seed, **hyper, **extra, **base_hyper
    )
    trajectory, perturbed = [], []
    for step in range(24):
        optimizer.step(problem.closure(optimizer, step % 4))
        perturbed.append(optimizer.diagnostics.perturbed)
        trajectory.append(problem.weights())
    assert problem.passes == 24 + sum(perturbed)
    if "rst" in key:
        hyper = {**hyper, "coins": perturbed}
    if "norms" in extra:
        hyper = {**hyper, "parts": problem.slices}
    oracle = getattr(oracles_cadence, key.removeprefix("g_"))
    w, memory, base_memory = problem.start.numpy().copy(), {}, {}
    for step, got in enumerate(trajectory):
        handed = oracle(memory, w, problem.gradient(step % 4), **hyper)
        w = getattr(oracles, base_key)(base_memory, w, handed, **base_hyper)
        np.testing.assert_allclose(got, w, rtol=0, atol=1e-10, err_msg=f"after step {step}")
    assert perturbed == memory.get("fired", perturbed)
    assert 0 < sum(perturbed) < 24


# -- conformance where the registered demos do not go: perturbed steps wherever a check looks ----------------------

DENSE = {
    "looksam": Spec(
        "steppe.optim.sharpness.looksam:LookSAM",
        "sharpness-aware",
        "",
        evals=27 / 20,
        demos=(
            {"lr": 0.05, "momentum": 0.9, "k": 3},
            {"lr": 0.05, "k": 3, "norms": "tensor"},
        ),
    ),
    "late_sam": Spec(
        "steppe.optim.sharpness.late_sam:LateSAM",
        "sharpness-aware",
        "",
        evals=2,
        demos=({"lr": 0.1, "total_steps": 9, "tail_frac": 1.0, "ramp": 5},),
    ),
    "ae_sam": Spec(
        "steppe.optim.sharpness.ae_sam:AESAM",
        "sharpness-aware",
        "",
        evals=2,
        demos=({"lr": 0.1, "total_steps": 50, "lambda1": -99.0, "lambda2": -99.0},),
    ),
}


CASES = [
    pytest.param(spec, check, demo, id=f"{key}-{number}-{name}")
    for key, spec in DENSE.items()
    for name, check in checks_for(spec).items()
    for number, demo in enumerate(spec.demos)
]


@pytest.mark.parametrize(("spec", "check", "demo"), CASES)
def test_conforms(spec: Spec, check: Any, demo: Mapping[str, Any]) -> None:
    check(spec, demo)


# -- each member's own points ---------------------------------------------------------------------------------------


def trained(key: str, steps: int = 7, **hyper: Any) -> list[Tensor]:
    rig = Rig(Spec(f"steppe.optim.sharpness.{key}", "", ""), {"base": "adamw", "lr": 0.05, **hyper})
    rig.train(steps)
    return rig.weights()


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


SAM_, LOOK, RST_, GRST_ = "sam:SAM", "looksam:LookSAM", "rst:RST", "rst:GRST"
LATE_ = "late_sam:LateSAM"


@pytest.mark.parametrize(
    ("member", "other"),
    [
        ((LOOK, {"k": 1, "rho": 0.05}), (SAM_, {})),
        ((LOOK, {"k": 1, "rho": 0.05, "norms": "tensor"}), (SAM_, {})),
        ((RST_, {"p": 1.0}), (SAM_, {})),
        ((RST_, {"p": 0.0}), (SAM_, {"rho": 0.0})),
        ((GRST_, {"p": 1.0, "gamma": 1.0}), (SAM_, {})),
        ((GRST_, {"p": 1.0, "gamma": 0.0}), (SAM_, {"rho": 0.0})),
        ((LATE_, {"total_steps": 7, "tail_frac": 1.0}), (SAM_, {})),
        ((LATE_, {"total_steps": 7, "tail_frac": 0.0}), (SAM_, {"rho": 0.0})),
        ((LOOK, {"rho": 0.0}), (SAM_, {"rho": 0.0})),
        ((LOOK, {"rho": 0.0, "norms": "tensor"}), (SAM_, {"rho": 0.0})),
    ],
)
def test_limits(member: tuple[str, dict], other: tuple[str, dict]) -> None:
    assert equal(trained(member[0], **member[1]), trained(other[0], **other[1]))


def one_step(optimizer: Any, *given: dict[nn.Parameter, Tensor]) -> None:
    passes = iter(given)

    def closure() -> float:
        for p, g in next(passes).items():
            p.grad = g.clone()
        return 0.0

    optimizer.step(closure)


@pytest.mark.parametrize("member", [LOOK, RST_, GRST_, LATE_])
def test_taking_the_perturbation_away_again(member: str) -> None:
    hyper = {"total_steps": 10} if member == LATE_ else {"p": 1.0} if member in (RST_, GRST_) else {}
    for a, b in zip(trained(member, **hyper), trained(member, restore="subtract", **hyper), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def vector(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("norms", ["global", "tensor"])
def test_looksam_uses_again_what_was_orthogonal(norms: str) -> None:
    w, single = nn.Parameter(vector(0.0, 0.0)), nn.Parameter(vector(0.0))
    optimizer = LookSAM([w, single], lr=1.0, alpha=0.5, k=2, norms=norms)
    zero = vector(0.0)
    one_step(optimizer, {w: vector(1.0, 0.0), single: zero}, {w: vector(2.0, 3.0), single: zero})
    torch.testing.assert_close(optimizer.memory["v"][0], vector(0.0, 1.0))
    one_step(optimizer, {w: vector(0.0, -4.0), single: zero})  # + 0.5 · 4 · (0, 1)
    torch.testing.assert_close(w.grad, vector(0.0, -2.0))
    torch.testing.assert_close(w.detach(), vector(-2.0, -1.0))


def test_looksam_by_tensor_has_nothing_for_a_single_number() -> None:
    w = nn.Parameter(vector(0.3))
    optimizer = LookSAM([w], lr=0.0, norms="tensor")
    one_step(optimizer, {w: vector(0.7)}, {w: vector(0.31)})
    assert optimizer.memory["v"][0].item() == 0.0


@pytest.mark.parametrize("norms", ["global", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_looksam_knows_a_parallel_gradient(norms: str, dtype: torch.dtype) -> None:
    g = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    w = nn.Parameter(torch.zeros(500, dtype=dtype))
    optimizer = LookSAM([w], lr=0.0, norms=norms)
    one_step(optimizer, {w: g}, {w: g * 2})
    assert not optimizer.memory["v"][0].any()
    assert optimizer.memory["v"][0].dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)


def test_looksam_keeps_v_where_g_was() -> None:
    rig = Rig(Spec("steppe.optim.sharpness.looksam:LookSAM", "", ""), {"lr": 0.1})
    at = []
    for _ in rig.optimizer.passes():
        rig.backward()
        at.append([p.grad.data_ptr() for p in rig.model.parameters()])
    rig.optimizer.step()
    assert [v.data_ptr() for v in rig.optimizer.memory["v"].values()] == at[0]
    assert [p.grad.data_ptr() for p in rig.model.parameters()] == at[1]


def test_looksam_frees_v_before_it_finds_a_new_one() -> None:
    rig = Rig(Spec("steppe.optim.sharpness.looksam:LookSAM", "", ""), {"lr": 0.1, "k": 2})
    rig.train(2)
    for p in rig.optimizer.passes():
        assert (p.number == 2) == (not rig.optimizer.memory["v"])
        rig.backward()


def test_looksam_gradient_that_comes_between() -> None:
    w, late = nn.Parameter(vector(0.0, 0.0)), nn.Parameter(vector(0.0, 0.0))
    optimizer = LookSAM([w, late], lr=1.0, alpha=1.0, k=3)
    one_step(optimizer, {w: vector(1.0, 0.0)}, {w: vector(0.0, 1.0)})
    g = vector(0.0, 1.0)
    one_step(optimizer, {w: g, late: g})
    torch.testing.assert_close(late.grad, g)  # has no v
    torch.testing.assert_close(w.grad, vector(0.0, 1 + 2**0.5))
    assert set(optimizer.memory["v"]) == {0}


def test_looksam_when_parameters_take_turns() -> None:
    first, second = nn.Parameter(vector(0.0, 0.0)), nn.Parameter(vector(0.0, 0.0))
    optimizer = LookSAM([first, second], lr=0.0, alpha=1.0, k=2)
    x, y = vector(1.0, 0.0), vector(0.0, 1.0)
    for p in (first, second):
        one_step(optimizer, {p: x}, {p: y})
        one_step(optimizer, {p: x})
        torch.testing.assert_close(p.grad, x + y)


def test_looksam_counts_passes() -> None:
    rig = Rig(Spec("steppe.optim.sharpness.looksam:LookSAM", "", ""), {"lr": 0.01})
    rig.train(20)
    assert rig.passes == 24


def test_a_coin_is_a_function_of_seed_and_step() -> None:
    def perturbed(seed: int) -> list[bool]:
        rig = Rig(Spec("steppe.optim.sharpness.rst:RST", "", ""), {"lr": 0.01, "p": 0.3, "seed": seed})
        seen = []
        for _ in range(200):
            rig.train(1)
            seen.append(rig.optimizer.diagnostics.perturbed)
        return seen

    first = perturbed(0)
    assert first == perturbed(0)
    assert first != perturbed(1)
    assert 40 < sum(first) < 80


@given(
    schedule=st.sampled_from(["constant", "linear", "piecewise", "trigonometric"]),
    p=st.floats(0, 1),
    end=st.none() | st.floats(0, 1),
    done=st.floats(0, 3),
)
@settings(deadline=None)
def test_probability_lies_between_its_ends(schedule: str, p: float, end: float | None, done: float) -> None:
    last = p if schedule == "constant" else 1 - p if end is None else end
    assert probability(schedule, 0.0, p, end) == p
    assert probability(schedule, 1.0, p, end) == pytest.approx(last)
    assert min(p, last) - 1e-12 <= probability(schedule, done, p, end) <= max(p, last) + 1e-12


def test_probability_of_each_schedule() -> None:
    assert probability("linear", 0.25, 0.0, 1.0) == 0.25
    assert probability("trigonometric", 0.5, 1.0) == pytest.approx(0.5)
    assert probability("trigonometric", 0.25, 1.0, 0.0) == pytest.approx((1 + 0.5**0.5) / 2)
    assert [probability("piecewise", x, 0.2, 0.6, switch=0.75) for x in (0.7, 0.75)] == [0.2, 0.6]


def test_ae_sam_decides_as_written() -> None:
    p = nn.Parameter(vector(0.0))
    optimizer = AESAM([p], lr=0.0, total_steps=4, lambda1=-1.0, lambda2=1.0, delta=0.5)
    # ‖g‖² = 4, then 1: mu 2, 1.5; sigma² 2, 1.125; c 1, 0.5
    one_step(optimizer, {p: vector(2.0)}, {p: vector(2.0)})
    assert optimizer.diagnostics.perturbed  # 4 >= 2 + √2
    one_step(optimizer, {p: vector(1.0)})  # 1 < 1.5 + 0.5 · 1.06
    assert not optimizer.diagnostics.perturbed
    assert optimizer.numbers == pytest.approx({"mu": 1.5, "sigma2": 1.125})
    one_step(optimizer, {p: vector(1.0)})  # mu 1.25, c 0
    assert not optimizer.diagnostics.perturbed
    one_step(optimizer, {p: vector(1.0)}, {p: vector(1.0)})  # c -0.5
    assert optimizer.diagnostics.perturbed


def test_ae_sam_remembers_only_completed_steps() -> None:
    p = nn.Parameter(vector(1.0))
    optimizer = AESAM([p], lr=0.1, total_steps=10)
    for asked in optimizer.passes():
        p.grad = vector(1.0)
        if asked.number == 2:
            break
    optimizer.zero_grad()
    assert optimizer.numbers == {}
    with pytest.warns(RuntimeWarning, match="not finite"):
        one_step(optimizer, {p: vector(float("inf"))})
    assert optimizer.numbers == {}


def test_ae_sam_asks_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    p = nn.Parameter(vector(1.0))
    optimizer = AESAM([p], lr=0.1, total_steps=10)
    monkeypatch.setattr(optimizer.module, "agreed", lambda value, device: value + 3.0)
    one_step(optimizer, {p: vector(1.0)}, {p: vector(1.0)})
    assert optimizer.numbers["mu"] == pytest.approx(0.4)


def test_late_sam_ramps() -> None:
    p = nn.Parameter(vector(0.0))
    optimizer = LateSAM([p], lr=0.0, rho=0.4, total_steps=5, tail_frac=0.6, ramp=2)
    seen = []
    for _ in range(7):
        one_step(optimizer, *[{p: vector(1.0)}] * 2)
        seen.append(optimizer.diagnostics.perturbation)
    np.testing.assert_allclose(seen, [np.nan, np.nan, 0.2, 0.4, 0.4, 0.4, 0.4])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: LookSAM(p, k=0), "k=0, but it must be a whole number >= 1"),
        (lambda p: LookSAM(p, k=2.5), "k=2.5, but it must be a whole number >= 1"),
        (lambda p: LookSAM(p, norms="layer"), "norms='layer', but it must be one of 'global', 'tensor'"),
        (lambda p: RST(p, schedule="linear"), "schedule='linear' needs total_steps"),
        (lambda p: RST(p, p=1.5), r"p=1.5, but it must be a number in \[0, 1\]"),
        (lambda p: GRST(p, gamma=-1), "gamma=-1"),
        (lambda p: AESAM(p, total_steps=0), "total_steps=0, but it must be a whole number >= 1"),
        (lambda p: AESAM(p, total_steps=3, lambda1="1"), "lambda1='1', but it must be a number"),
        (
            lambda p: LateSAM(p, total_steps=3, tail_frac=2),
            r"tail_frac=2, but it must be a number in \[0, 1\]",
        ),
    ],
)
def test_errors_say_what_to_do(build: Callable[[list], Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build([nn.Parameter(vector(1.0))])


def test_what_decides_for_all_groups_must_be_the_same_in_all() -> None:
    p, q = nn.Parameter(vector(1.0)), nn.Parameter(vector(1.0))
    optimizer = LookSAM([{"params": [p], "k": 2}, {"params": [q], "k": 3}])
    with pytest.raises(SpecError, match="k decides for all groups at once"):
        one_step(optimizer, {p: vector(1.0), q: vector(1.0)})

"""Construction, edges and each member's own points; what all of them share is in the conformance suite."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from steppe.core.errors import SpecError
from steppe.core.spec import Spec
from steppe.optim import (
    AESAM,
    ASAM,
    CRSAM,
    GAM,
    GNP,
    GRST,
    GSAM,
    OPTIMIZERS,
    SAGM,
    SAM,
    SSAM,
    USAM,
    WSAM,
    FriendlyGSAM,
    FriendlySAM,
    LateSAM,
    LookAGSAM,
    Lookbehind,
    LookSAM,
    SAMPa,
    SharpnessAware,
    VaSSO,
    create,
)
from steppe.optim.sharpness.gsam import rho_of_lr
from steppe.optim.sharpness.vectors import BLOCK, Bucket, Vector
from steppe.testing import ConformanceError, Rig, check_optimizer

HOMOGENEOUS = [
    SAM,
    ASAM,
    GSAM,
    GAM,
    FriendlySAM,
    VaSSO,
    WSAM,
    SSAM,
    SAMPa,
    CRSAM,
    Lookbehind,
    LookSAM,
    partial(LookSAM, k=1, norms="tensor"),
    partial(LookSAM, k=2, norms="tensor"),
    partial(GRST, p=1.0),
    partial(AESAM, total_steps=9),
    partial(LateSAM, total_steps=9, tail_frac=1.0),
    LookAGSAM,
    FriendlyGSAM,
]
"""A factor on all gradients is one on what the base gets."""
FAMILY = [*HOMOGENEOUS, SAGM, GNP, USAM]


def parameter(*values: float, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def gradients(optimizer: SharpnessAware, *passes: dict[nn.Parameter, Tensor | None]) -> list[list[Tensor]]:
    """One step with given gradients; returns the weights that each pass saw."""
    seen, given_next = [], iter(passes)

    def closure() -> float:
        seen.append([p.detach().clone() for group in optimizer.param_groups for p in group["params"]])
        for p, gradient in next(given_next).items():
            p.grad = None if gradient is None else gradient.clone()
        return 0.0

    optimizer.step(closure)
    return seen


# -- construction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["adamw", AdamW, "torch.optim:AdamW"])
def test_base_by_key_class_or_path(base: object) -> None:
    optimizer = SAM([parameter(1.0)], base=base, rho=0.1, lr=0.5)
    assert type(optimizer.base) is AdamW
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert repr(optimizer).startswith("SAM over AdamW (")


def test_ready_base_keeps_its_state_and_groups() -> None:
    p, q = parameter(1.0), parameter(2.0)
    ready = AdamW([{"params": [p], "rho": 0.3}, {"params": [q]}], lr=0.1)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    ready.step()
    groups, state = ready.param_groups, dict(ready.state)
    for params in (None, [p, q]):
        optimizer = SAM(params, base=ready)
        assert optimizer.param_groups is groups
        assert dict(optimizer.state) == state
        assert [group["rho"] for group in groups] == [0.3, 0.05]


def test_ready_base_admits_nothing_more() -> None:
    p = parameter(1.0)
    ready = SGD([p], lr=0.1)
    with pytest.raises(SpecError, match="set lr there"):
        SAM(None, base=ready, lr=0.2)
    with pytest.raises(SpecError, match="other parameters"):
        SAM([parameter(2.0)], base=ready)
    with pytest.raises(SpecError, match=r"rho=-1.*number >= 0"):
        SAM(None, base=ready, rho=-1)
    assert "rho" not in ready.param_groups[0]
    assert ready.param_groups[0]["params"] == [p]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: SAM(p, rh=0.1), "Did you mean 'rho'"),
        (lambda p: SAM(p, base=AdamW, weight_decai=0.1), "Did you mean 'weight_decay'"),
        (lambda p: SAM(p, rho=float("nan")), "rho=nan, but it must be a number >= 0"),
        (lambda p: SAM(p, rho=True), "rho=True"),
        (lambda p: SAM(p, rho="0.1"), "rho='0.1'"),
        (lambda p: GAM(p, alpha=1.5), r"alpha=1.5, but it must be a number in \[0, 1\]"),
        (lambda p: GAM(p, form="papers"), "form='papers', but it must be one of 'code', 'paper'"),
        (lambda p: GSAM(p, rho=0.1, rho_min=0.2, lr_max=1.0), r"rho_min=0.2.*\[0, rho=0.1\]"),
        (lambda p: GSAM(p, rho=0.1, rho_min=0.05), "lr_max must be a number"),
        (lambda p: SAM([{"params": p, "rho": -1.0}]), "rho=-1.0"),
        (lambda p: SAM(p, base=SAM), "cannot be a base"),
        (lambda p: SAM(p, base=torch.optim.LBFGS), "cannot be a base"),
        (lambda p: SAM(p, base=int), "neither an optimizer class"),
        (lambda p: SAM(p, base="adamww"), "Did you mean 'adamw'"),
        (lambda p: create("sma", p), "Did you mean 'sam'"),
        (lambda p: create("adamw", p, weigt_decay=0.1), "Did you mean 'weight_decay'"),
        (lambda p: create("adamw", p, base="sgd"), "AdamW has no base optimizer"),
        (lambda p: create("no.such.module:SAM", p), "cannot import"),
    ],
)
def test_errors_say_what_to_do(build: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build([parameter(1.0)])


def test_a_rejected_group_is_not_added() -> None:
    optimizer = SAM([parameter(1.0)])
    with pytest.raises(SpecError, match="rho"):
        optimizer.add_param_group({"params": [parameter(2.0)], "rho": -1.0})
    assert len(optimizer.param_groups) == 1


def test_create_takes_import_paths() -> None:
    optimizer = create("steppe.optim.sharpness.gsam:GSAM", [parameter(1.0)], base="adam", alpha=0.1)
    assert isinstance(optimizer, GSAM)
    assert optimizer.param_groups[0]["alpha"] == 0.1


def test_registry_does_not_import_torch() -> None:
    code = "import sys, steppe.optim.registry as r; list(r.OPTIMIZERS); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names() -> None:
    import steppe.optim

    assert all(hasattr(steppe.optim, name) for name in steppe.optim.__all__)
    source = Path(steppe.optim.__file__).read_text("utf-8")
    for name in steppe.optim.__all__:  # type checkers do not read the registries
        assert f" import {name}" in source or f" {name} as {name}" in source, f"{name} is not declared"
    with pytest.raises(AttributeError, match="no attribute 'SMA'"):
        steppe.optim.SMA


# -- steps ---------------------------------------------------------------------------------------------------------


@given(
    weights=st.lists(st.floats(-10, 10), min_size=2, max_size=6),
    cls=st.sampled_from([SAM, ASAM, FriendlySAM]),
    steps=st.integers(1, 4),
)
@settings(max_examples=30, deadline=None)
def test_rho_zero_is_the_base(weights: list[float], cls: type, steps: int) -> None:
    results = []
    for build in (
        lambda p: AdamW([p], lr=0.1),
        lambda p: cls([p], base=AdamW, rho=0.0, lr=0.1),
    ):
        p = parameter(*weights)
        optimizer = build(p)

        def closure(p: Tensor = p, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = (p.sin() * p).sum()
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.step(closure)
        results.append(p.detach())
    assert results[0].equal(results[1])


@given(
    power=st.integers(-8, 20),
    cls=st.sampled_from(HOMOGENEOUS),
    values=st.lists(st.floats(0.1, 9), min_size=3, max_size=3),
)
@settings(max_examples=30, deadline=None)
def test_gradient_scale_cancels_until_the_base(power: int, cls: type, values: list[float]) -> None:
    seen = []
    for factor in (1.0, 2.0**power):
        p = parameter(1.0, -2.0, 3.0)
        optimizer = cls([p], lr=0.0)
        stream = [torch.tensor(values, dtype=torch.float64).roll(k) * (k + 1) * factor for k in range(4)]
        points = gradients(optimizer, *({p: g} for g in stream))
        seen.append((torch.stack([point[0] for point in points]), p.grad / factor))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("cls", FAMILY)
def test_zero_gradient_perturbs_nothing(cls: type) -> None:
    p = parameter(1.0, -2.0)
    zero = torch.zeros_like(p)
    for point in gradients(cls([p], lr=0.1), *[{p: zero}] * 4):
        assert point[0].equal(torch.tensor([1.0, -2.0], dtype=torch.float64))
    assert p.detach().equal(torch.tensor([1.0, -2.0], dtype=torch.float64))


def test_gradient_that_comes_late_is_stepped_without_perturbation() -> None:
    p, q = parameter(1.0), parameter(1.0)
    one = torch.ones_like(p)
    points = gradients(SAM([p, q], lr=0.5, rho=0.25), {p: one, q: None}, {p: one, q: one})
    assert [w.item() for w in points[1]] == pytest.approx([1.25, 1.0])
    assert (p.item(), q.item()) == (0.5, 0.5)


def test_gradient_that_goes_missing_counts_as_zero() -> None:
    p, q = parameter(1.0), parameter(1.0)
    one = torch.ones_like(p)
    gradients(GSAM([p, q], lr=1.0, alpha=0.5), {p: one, q: one}, {p: one, q: None})
    # p = (1, 0), g = (1, 1): the part of g orthogonal to p is (0, 1)
    assert p.item() == pytest.approx(0.0, abs=1e-10)
    assert q.item() == pytest.approx(1.5, abs=1e-10)


def test_sparse_gradients() -> None:
    weights = []
    for sparse in (False, True):
        table = nn.Embedding(5, 2, sparse=sparse)
        with torch.no_grad():
            table.weight.copy_(torch.arange(10.0).view(5, 2) / 10)
        optimizer = SAM(table.parameters(), lr=0.1)
        for _ in range(3):
            for _ in optimizer.passes():
                table(torch.tensor([1, 3])).square().sum().backward()
            optimizer.step()
        weights.append(table.weight.detach())
    torch.testing.assert_close(*weights)


def test_only_one_loop_at_a_time() -> None:
    optimizer = SAM([parameter(1.0)])
    outer = optimizer.passes()
    next(outer)
    with pytest.raises(RuntimeError, match="still open"):
        next(optimizer.passes())
    outer.close()
    assert next(optimizer.passes()).number == 1


def test_a_loop_that_raises_restores() -> None:
    p = parameter(1.0)
    optimizer = SAM([p], lr=0.1)

    def loop() -> None:
        for number, _ in enumerate(optimizer.passes()):
            if number == 1:
                assert p.item() != 1.0
                raise ValueError
            p.square().sum().backward()

    with pytest.raises(ValueError):  # noqa: PT011
        loop()
    assert p.item() == 1.0


def test_an_abandoned_loop_leaves_the_next_one_whole() -> None:
    p = parameter(1.0)
    optimizer = SAM([p], lr=0.1)
    for _ in range(2):  # as GradScaler does when it finds inf: no step() after a completed loop
        for _ in optimizer.passes():
            p.square().sum().backward()
    optimizer.step()
    assert p.item() == pytest.approx(1 - 0.1 * 2 * 1.05)


def test_clipping_in_a_base_hook_sees_the_last_gradient_only() -> None:
    p = parameter(3.0, 4.0)
    optimizer = SAM([p], rho=0.5, lr=1.0)
    optimizer.base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_([p], 1.0) and None)
    g = torch.tensor([30.0, 40.0], dtype=torch.float64)
    points = gradients(optimizer, {p: g}, {p: g})
    torch.testing.assert_close(points[1][0] - points[0][0], torch.tensor([0.3, 0.4], dtype=torch.float64))
    torch.testing.assert_close(p.detach(), torch.tensor([2.4, 3.2], dtype=torch.float64), rtol=1e-5, atol=0)


def test_skips_silently_after_the_first_warning() -> None:
    p = parameter(1.0)
    optimizer = SAM([p], lr=0.1)
    bad = torch.full_like(p, float("inf"))
    with pytest.warns(RuntimeWarning, match="gradient of pass 1 is not finite"):
        gradients(optimizer, {p: bad})
    gradients(optimizer, {p: bad.neg()})
    for _ in optimizer.passes():
        p.grad = bad.clone()
    optimizer.step()
    assert optimizer.skipped == 3
    assert optimizer.state_dict()["sharpness_aware"]["skipped"] == 3
    assert p.item() == 1.0


def test_copies_under_a_scheduler() -> None:
    p = parameter(1.0)
    optimizer = SAM([p], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps step() of this very object
    copied = copy.deepcopy(optimizer)
    (q,) = copied.param_groups[0]["params"]
    gradients(copied, {q: torch.ones_like(q)}, {q: torch.ones_like(q)})
    assert (p.item(), q.item()) == (1.0, 0.9)


class Count(TorchDispatchMode):
    """Counts kernels; allocations and views are none."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.overloadpacket is not torch.ops.aten.empty_like and not func.is_view
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", FAMILY)
def test_launches_do_not_grow_with_the_number_of_tensors(cls: type) -> None:
    counts = []
    for number in (2, 30):
        params = [nn.Parameter(torch.ones(2, 2)) for _ in range(number)]
        optimizer = cls(params, foreach=True)  # the base too: some step it between their passes
        for _ in range(2):  # the second step has what the first one starts
            given = [[torch.full((2, 2), 1.0 + k + n) for n in range(number)] for k in range(4)]
            with Count() as count:
                for _ in optimizer.passes():
                    for p, gradient in zip(params, given.pop(), strict=True):
                        p.grad = gradient
            optimizer.step()
        counts.append(count.calls)
    assert counts[0] == counts[1]


# -- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.12), (torch.float16, 0.04)])
def test_perturbation_does_not_round_away(dtype: torch.dtype, tolerance: float) -> None:
    # 0.0016 is a fifth of bfloat16's unit in the last place of 1.0, and 1.6 of float16's
    p = nn.Parameter(torch.ones(1000, dtype=dtype))
    optimizer = SAM([p], rho=0.05, lr=0.0)
    g = torch.ones_like(p)
    moved = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(20):
            clean, perturbed = gradients(optimizer, {p: g}, {p: g})
            moved.append(perturbed[0].float() - clean[0].float())
            assert p.detach().equal(torch.ones(1000, dtype=dtype))
    assert abs(torch.stack(moved).mean() / (0.05 / 1000**0.5) - 1) < tolerance
    assert not moved[0].equal(moved[1])


def test_rounding_is_a_function_of_seed_and_step() -> None:
    points = []
    for seed in (0, 0, 1):
        p = nn.Parameter(torch.ones(1000, dtype=torch.float16))
        g = torch.ones_like(p)
        points.append(gradients(SAM([p], rho=0.05, lr=0.0, seed=seed), {p: g}, {p: g})[1][0])
    assert points[0].equal(points[1])
    assert not points[0].equal(points[2])


def test_a_length_that_rounding_changes_is_told_once() -> None:
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = SAM([p], rho=0.05, lr=0.0)
    g = torch.ones_like(p)
    with pytest.warns(RuntimeWarning, match="the perturbation 2..% as long as SAM asks for"):
        gradients(optimizer, {p: g}, {p: g})
    gradients(optimizer, {p: g}, {p: g})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_norm_is_taken_in_float32(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.zeros(4096, dtype=dtype))
    g = torch.full_like(p, 3000.0)  # its norm, 192000, is beyond float16
    points = gradients(SAM([p], rho=64.0, lr=0.0), {p: g}, {p: g})
    assert points[1][0].float().sub(1.0).abs().max() < 1e-2
    assert p.dtype == dtype


@pytest.mark.parametrize("cls", FAMILY)
def test_gradients_whose_squares_overflow_are_finite(cls: type) -> None:
    p = parameter(1.0, 1.0, dtype=torch.float32)
    optimizer = cls([p], lr=0.0, rho=0.5)
    g = torch.tensor([3e30, 4e30])
    points = gradients(optimizer, *[{p: g * (k + 1)} for k in range(4)])
    assert optimizer.skipped == 0
    if cls not in (GAM, SSAM, SAGM, USAM):  # they perturb by something else than rho in that direction
        torch.testing.assert_close(points[1][0] - points[0][0], torch.tensor([0.3, 0.4]))


@pytest.mark.parametrize("cls", FAMILY)
def test_mixed_dtypes_in_one_group(cls: type) -> None:
    params = [
        nn.Parameter(torch.full((3,), 0.25, dtype=d)) for d in (torch.float32, torch.float64, torch.bfloat16)
    ]
    optimizer = cls(params, lr=0.1, rho=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for step in range(3):
            gradients(optimizer, *[{p: p.detach() + k + step for p in params} for k in range(4)])
    assert all(p.isfinite().all() and (p != 0.25).all() for p in params)


def test_complex_adaptive_uses_the_modulus() -> None:
    z = nn.Parameter(torch.tensor([3 + 4j, 1j], dtype=torch.complex128))
    g = torch.tensor([1j, 1 + 0j], dtype=torch.complex128)
    points = gradients(SAM([z], rho=1.0, adaptive=True, lr=0.0), {z: g}, {z: g})
    size = torch.tensor([5.0, 1.0], dtype=torch.float64)
    want = size**2 * g / torch.linalg.vector_norm(size * g)
    torch.testing.assert_close(points[1][0] - points[0][0], want)


# -- members -------------------------------------------------------------------------------------------------------


def test_asam_goes_by_names_and_without_them_by_dimensions() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    named = ASAM(net.named_parameters())
    trait = named.ascent.trait
    assert [trait(0, name, p) for name, p in net.named_parameters()] == [True, False, True, False]
    assert [trait(0, None, p) for _, p in net.named_parameters()] == [True, False, False, False]
    assert named.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


@given(
    lr=st.floats(0, 2),
    lr_min=st.floats(0, 0.5),
    span=st.floats(0, 1),
    rho_min=st.floats(0, 0.1),
    more=st.floats(0, 1),
)
@settings(deadline=None)
def test_gsam_rho_stays_between_its_bounds(
    lr: float, lr_min: float, span: float, rho_min: float, more: float
) -> None:
    rho, lr_max = rho_min + more, lr_min + span
    value = rho_of_lr(lr, rho, rho_min, lr_max, lr_min)
    assert rho_min <= value <= rho * (1 + 1e-15)
    assert rho_of_lr(lr_max, rho, rho_min, lr_max, lr_min) == pytest.approx(rho)


def test_gsam_rho_follows_the_scheduler_and_is_clamped_in_warm_up() -> None:
    p = parameter(0.0)
    optimizer = GSAM([p], rho=0.2, rho_min=0.1, lr_max=1.0, lr_min=0.5, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (0.0, 0.75, 1.0, 0.5)[t])
    g = torch.zeros_like(p) + 1e-3
    moved = []
    for _ in range(4):
        points = gradients(optimizer, {p: g}, {p: g})
        moved.append((points[1][0] - points[0][0]).item())
        if len(moved) < 4:
            scheduler.step()
    assert moved == pytest.approx([0.1, 0.15, 0.2, 0.1])


def test_friendly_memory_is_apart_and_survives() -> None:
    p = parameter(1.0, 2.0)
    optimizer = FriendlySAM([p], base=AdamW, lmbda=0.5)
    g = torch.tensor([1.0, 1.0], dtype=torch.float64)
    gradients(optimizer, {p: g}, {p: g})
    gradients(optimizer, {p: 3 * g}, {p: g})
    assert optimizer.memory["m"][0].equal(2 * g)
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
    saved = optimizer.state_dict()
    other = FriendlySAM([parameter(1.0, 2.0)], base=AdamW)
    other.load_state_dict(saved)
    assert other.memory["m"][0].equal(2 * g)
    assert other.memory["m"][0].data_ptr() != optimizer.memory["m"][0].data_ptr()


def test_friendly_first_step_of_each_form() -> None:
    for form, sigma, moved in (("code", 1.0, 0.1), ("paper", 1.0, 0.0), ("paper", 0.5, 0.1)):
        p = parameter(1.0)
        g = torch.ones_like(p)
        points = gradients(FriendlySAM([p], rho=0.1, sigma=sigma, form=form), {p: g}, {p: g})
        assert (points[1][0] - points[0][0]).item() == pytest.approx(moved)


def test_load_refuses_what_does_not_fit_and_changes_nothing() -> None:
    p = parameter(1.0)
    friendly = FriendlySAM([p])
    with pytest.raises(SpecError, match="did not write it"):
        friendly.load_state_dict(SGD([p], lr=3.0).state_dict())
    with pytest.raises(SpecError, match="written by SAM; FriendlySAM cannot"):
        friendly.load_state_dict(SAM([p], lr=3.0).state_dict())
    wide = FriendlySAM([parameter(1.0, 2.0)], lr=3.0)
    wide.memory["m"][0] = torch.ones(2)
    with pytest.raises(SpecError, match="memory 'm' of parameter 0 has shape"):
        friendly.load_state_dict(wide.state_dict())
    assert friendly.param_groups[0]["lr"] == 1e-3
    assert friendly.memory == {"m": {}}


# -- the suite itself ----------------------------------------------------------------------------------------------


class Leaky(SAM):
    """Subtracts a perturbation it does not have to: weights do not come back."""

    def algorithm(self):
        g = yield
        for bucket, tensors in zip(self.buckets, g.tensors, strict=True):
            torch._foreach_add_(bucket.params, tensors, alpha=1e-3)
        yield


def test_check_optimizer_names_what_fails() -> None:
    spec = Spec(f"{__name__}:Leaky", "sharpness-aware", "", evals=2, demos=({"lr": 0.1},))
    with pytest.raises(ConformanceError, match=r"restores_after_exceptions.*an exception in pass 2 leaves"):
        check_optimizer(spec)


def test_check_optimizer_tells_of_an_xfail_that_holds() -> None:
    spec = Spec(
        "torch.optim:SGD", "first-order", "", evals=1, demos=({"lr": 0.1},), xfail={"pickles": "cannot"}
    )
    with pytest.raises(ConformanceError, match=r"pickles with .*: holds, though xfail says: cannot"):
        check_optimizer(spec)


def test_rig_is_always_the_same() -> None:
    spec = OPTIMIZERS["sgd"]
    assert all(a.equal(b) for a, b in zip(Rig(spec, {}).weights(), Rig(spec, {}).weights(), strict=True))


def test_a_norm_counts_every_number_once() -> None:
    shapes = [(3,), (BLOCK + 5,), (2, BLOCK - 2), (0,), (7, 11), (300, 500), (1,)]
    xs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    xs[5] = xs[5].t()
    vector = Vector([Bucket({}, xs, xs, list(range(len(xs))))], [xs])
    assert vector.norm == pytest.approx(torch.cat([x.reshape(-1) for x in xs]).norm().item(), rel=1e-12)

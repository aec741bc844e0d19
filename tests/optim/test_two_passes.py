"""Members that take two passes in every step: VaSSO, WSAM, SAGM, GNP, USAM, SAM-ON, SSAM."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from steppe.core.errors import SpecError
from steppe.optim import GNP, SAM, SAMON, SSAM, USAM, WSAM, Composed, VaSSO, create
from steppe.optim.sharpness.ssam import largest, regrown

from . import oracles, oracles_two_passes
from .test_cadence import BASES, Problem
from .test_sharpness import Count, gradients, parameter

NAMES = ["norm.weight", "norm.bias", "head.weight", "head.bias"]
"""For the parameters of `Problem`, so that SAM-ON finds the first two."""
FIXED = (np.arange(26) % 3 > 0).astype(float)

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vasso": ("vasso", {"rho": 0.1, "theta": 0.9}),
    "vasso-slow": ("vasso", {"rho": 0.2, "theta": 0.4}),
    "wsam": ("wsam", {"rho": 0.1, "gamma": 0.9, "decouple": True}),
    "wsam-light": ("wsam", {"rho": 0.1, "gamma": 0.3, "decouple": True}),
    "wsam-coupled": ("wsam", {"rho": 0.1, "gamma": 0.6, "decouple": False}),
    "wsam-coupled-heavy": ("wsam", {"rho": 0.05, "gamma": 0.9, "decouple": False}),
    "wsam-adaptive": ("wsam", {"rho": 0.5, "gamma": 0.7, "decouple": True, "adaptive": True}),
    "sagm": ("sagm", {"rho": 0.05, "alpha": 0.001}),
    "sagm-leaning": ("sagm", {"rho": 0.1, "alpha": 0.2}),
    "sagm-adaptive": ("sagm", {"rho": 0.5, "alpha": 0.05, "adaptive": True}),
    "gnp": ("gnp", {"rho": 0.1, "alpha": 0.8, "normalise": True}),
    "gnp-paper": ("gnp", {"rho": 0.1, "alpha": 0.6, "normalise": False}),
    "gnp-adaptive": ("gnp", {"rho": 0.5, "alpha": 1.3, "normalise": False, "adaptive": True}),
    "usam": ("usam", {"rho": 0.1, "lmbda": 0.0}),
    "usam-half": ("usam", {"rho": 0.1, "lmbda": 0.5}),
    "usam-sam": ("usam", {"rho": 0.1, "lmbda": 1.0}),
    "usam-1/t": ("usam", {"rho": 0.1, "lmbda": "1/t"}),
    "usam-1-1/t": ("usam", {"rho": 0.1, "lmbda": "1-1/t"}),
    "sam_on": ("sam_on", {"rho": 0.3}),
    "sam_on-adaptive": ("sam_on", {"rho": 0.5, "adaptive": True, "eta": 0.05}),
    "ssam-fixed": ("ssam", {"rho": 0.2, "sparsity": 0.2, "update_every": None}),
    "ssam": ("ssam", {"rho": 0.2, "sparsity": 0.5, "update_every": 3}),
    "ssam-sparse": ("ssam", {"rho": 0.2, "sparsity": 0.9, "update_every": 1}),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_oracle(variant: str, base: str, seed: int) -> None:
    problem = Problem(seed)
    key, hyper = VARIANTS[variant]
    base_key, base_hyper = BASES[base]
    params = list(problem.net.parameters())
    optimizer = create(
        key, list(zip(NAMES, params, strict=True)), base=base_key, seed=seed, **hyper, **base_hyper
    )
    if variant == "ssam-fixed":
        optimizer.ascent.set_masks(pieces(torch.from_numpy(FIXED), params))
        hyper = {**hyper, "mask": FIXED}
    if key == "wsam":
        hyper = {**hyper, "lr": base_hyper["lr"]}
    if key == "sam_on":
        size = params[0].numel(), params[0].numel() + params[1].numel()
        place = np.arange(problem.start.numel())
        hyper = {**hyper, "chosen": place < size[1], "is_weight": place < size[0]}
    w, memory, base_memory = problem.start.numpy().copy(), {}, {}
    for step in range(16):
        optimizer.step(problem.closure(optimizer, step % 4))
        handed = getattr(oracles_two_passes, key)(memory, w, problem.gradient(step % 4), **hyper)
        w = getattr(oracles, base_key)(base_memory, w, handed, **base_hyper) + memory.get("after", 0.0)
        np.testing.assert_allclose(problem.weights(), w, rtol=0, atol=1e-10, err_msg=f"after step {step}")
    assert problem.passes == 32


def pieces(flat: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    parts = flat.split([p.numel() for p in params])
    return [part.view(p.shape) for part, p in zip(parts, params, strict=True)]


def trained(build: Callable[[list], torch.optim.Optimizer], steps: int = 6) -> np.ndarray:
    problem = Problem(0)
    optimizer = build(list(problem.net.parameters()))
    for step in range(steps):
        optimizer.step(problem.closure(optimizer, step % 4))
    return problem.weights()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda p: VaSSO(p, lr=0.1, rho=0.2, theta=1.0), lambda p: SAM(p, lr=0.1, rho=0.2)),
        (lambda p: WSAM(p, AdamW, lr=0.1, gamma=0.5, decouple=False), lambda p: SAM(p, AdamW, lr=0.1)),
        (lambda p: WSAM(p, AdamW, lr=0.1, gamma=0.0), lambda p: AdamW(p, lr=0.1)),
        (lambda p: GNP(p, lr=0.1, rho=0.2, alpha=1.0), lambda p: SAM(p, lr=0.1, rho=0.2)),
        (lambda p: GNP(p, lr=0.1, rho=0.0), lambda p: SGD(p, lr=0.1)),
        (lambda p: USAM(p, lr=0.1, rho=0.2, lmbda=1), lambda p: SAM(p, lr=0.1, rho=0.2)),
        (lambda p: SSAM(p, lr=0.1, rho=0.0), lambda p: SGD(p, lr=0.1)),
    ],
)
def test_edges_are_other_optimizers(one: Callable, other: Callable) -> None:
    np.testing.assert_allclose(trained(one), trained(other), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: VaSSO(p, theta=1.5), r"theta=1.5, but it must be a number in \[0, 1\]"),
        (lambda p: WSAM(p, gamma=1.0), "take one below 1"),
        (lambda p: WSAM(p, gamma=1.5), "gamma=1.5"),
        (lambda p: WSAM(p, base=Plain), "this base has no lr"),
        (lambda p: USAM(p, lmbda="t"), r"lmbda='t', but it must be '1/t', '1-1/t' or a number in \[0, 1\]"),
        (lambda p: USAM(p, lmbda=2.0), "lmbda=2.0"),
        (lambda p: SSAM(p, mask="random"), "one of 'fisher', 'dynamic'"),
        (lambda p: SSAM(p, update_every=0), "None or a whole number >= 1"),
        (lambda p: SSAM(p, mask="dynamic"), "needs total_steps"),
        (lambda p: SSAM(p).ascent.set_masks([]), "one mask per parameter"),
        (
            lambda p: SSAM(p).ascent.set_masks([torch.ones(2, dtype=torch.bool)]),
            r"\[\(1,\)\], not \[\(2,\)\]",
        ),
        (lambda p: Composed(p, descent="wsam", cadence="looksam"), "set decouple=False"),
    ],
)
def test_errors_say_what_to_do(build: Callable, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build([parameter(1.0)])


class Plain(torch.optim.Optimizer):
    """A base without a learning rate."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


# -- WSAM ----------------------------------------------------------------------------------------------------------


class Editing(SGD):
    """Leaves nothing of the gradient that it gets."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.zero_()


@pytest.mark.parametrize("base", [SGD, Editing])
def test_wsam_steps_along_sharpness_beside_the_base(base: type) -> None:
    p = parameter(0.0)
    optimizer = WSAM([p], base, lr=1.0, momentum=0.5, gamma=0.75)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t == 0 else 0.1)
    one = torch.ones_like(p)
    gradients(optimizer, {p: one}, {p: 3 * one})
    assert p.item() == pytest.approx(-1 - 3 * 2)
    scheduler.step()
    gradients(optimizer, {p: one}, {p: 3 * one})  # no momentum but that of g
    assert p.item() == pytest.approx(-7 - 0.1 * 1.5 - 0.1 * 3 * 2)


def test_wsam_goes_with_a_cadence_that_looks_for_sharpness_if_coupled() -> None:
    p = parameter(1.0, 2.0)
    optimizer = Composed([p], descent="wsam", cadence="looksam", decouple=False, k=2, lr=0.1)
    g, h = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    gradients(optimizer, {p: g}, {p: h})
    gradients(optimizer, {p: g})
    assert optimizer.steps == 2
    with pytest.raises(SpecError, match="set decouple=False"):
        optimizer.add_param_group({"params": [parameter(1.0)], "decouple": True})


# -- SAM-ON --------------------------------------------------------------------------------------------------------


class ScaleNorm(nn.Module):
    """A layer that goes by its class's name only."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.ln_1 = nn.LayerNorm(4)
        self.normaliser = nn.Linear(4, 4)
        self.rest = nn.Sequential(ScaleNorm(), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.Linear(4, 2))


def perturbed_by(optimizer: SAMON, model: nn.Module) -> set[str]:
    """The names of the parameters that differ in the second pass."""
    params = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in params.items()}
    moved: set[str] = set()
    optimizer.zero_grad()
    for one in optimizer.passes():
        if one.number == 2:
            moved = {name for name, p in params.items() if not before[name].equal(p)}
        for p in params.values():
            p.grad = torch.ones_like(p)
    optimizer.step()
    return moved


def test_sam_on_finds_normalisation_layers() -> None:
    model = Layers()
    layers = {
        *("ln_1.weight", "ln_1.bias", "rest.0.scale"),
        *("rest.1.weight", "rest.1.bias", "rest.2.weight", "rest.2.bias"),
    }
    by_model = SAMON(model.parameters(), model=model)
    assert perturbed_by(by_model, model) == layers
    assert perturbed_by(*copy.deepcopy((by_model, model))) == layers
    compiled = torch.compile(model, backend="eager")
    assert perturbed_by(SAMON(model.parameters(), model=compiled), model) == layers
    named = {"normaliser.weight", "normaliser.bias"}
    assert perturbed_by(SAMON(model.named_parameters()), model) == named
    flat = {name for name, p in model.named_parameters() if p.ndim == 1}
    assert perturbed_by(SAMON(model.parameters()), model) == flat
    torch_like = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert perturbed_by(SAMON(torch_like.named_parameters()), torch_like) == {"0.bias", "1.weight", "1.bias"}


def test_sam_on_says_if_there_are_none() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    for optimizer, message in (
        (SAMON(model.named_parameters()), "have neither 'norm' nor 'bn'.*Give model="),
        (SAMON(model.named_parameters(), model=model), "hold none of these"),
    ):
        with pytest.raises(SpecError, match=message):
            perturbed_by(optimizer, model)


def test_sam_on_sorts_an_added_group() -> None:
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = SAMON([("norm.weight", weight)], rho=1.0)
    points = gradients(optimizer, *[{weight: torch.ones_like(weight)}] * 2)
    assert not points[1][0].equal(points[0][0])
    optimizer.add_param_group({"params": [("head.bias", bias)]})
    points = gradients(optimizer, *[{weight: torch.ones_like(weight), bias: torch.ones_like(bias)}] * 2)
    assert points[1][1].equal(points[0][1])


def test_sam_on_scales_as_asam_does() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([2.0, -3.0]))
    norm, bias = model[1].weight, model[1].bias
    given = {
        p: torch.full_like(p, float(k)) for k, p in enumerate(model.parameters(), 1)
    }  # of the layer: 3 and 4
    optimizer = SAMON(model.parameters(), model=model, rho=2.0, adaptive=True, eta=0.5, lr=0.0)
    points = gradients(optimizer, given, given)
    g = np.concatenate([given[norm].numpy(), given[bias].numpy()])
    t = np.array([2.5, 3.5, 1.0, 1.0])
    want = 2.0 * t**2 * g / np.sqrt(np.sum((t * g) ** 2))
    moved = torch.cat([a - b for a, b in zip(points[1], points[0], strict=True)][2:])
    np.testing.assert_allclose(moved, want, rtol=1e-12)


def test_sam_on_costs_nothing_for_the_others() -> None:
    counts = []
    for number in (2, 20):
        table = [("norm.weight", nn.Parameter(torch.ones(2)))]
        table += [(f"fc{n}.weight", nn.Parameter(torch.ones(3, 3))) for n in range(number)]
        optimizer = SAMON(table)
        for _ in range(2):
            with Count() as count:
                for one in optimizer.passes():
                    if one.number == 2:
                        saved = [values for values in optimizer._saved if values is not None]
                        assert sum(x.numel() for values in saved for x in values) == 2
                    for n, (_, p) in enumerate(table):
                        with torch.utils._python_dispatch._disable_current_modes():
                            p.grad = torch.full_like(p, n + 1.0)
            optimizer.step()
        counts.append(count.calls)
    assert counts[0] == counts[1]


# -- SSAM ----------------------------------------------------------------------------------------------------------


def masks(optimizer: SSAM) -> Tensor:
    return torch.cat([mask.reshape(-1) for mask in optimizer.memory["mask"].values()])


@given(number=st.integers(1, 60), percent=st.integers(0, 100), every=st.integers(1, 3), dynamic=st.booleans())
@settings(max_examples=40, deadline=None)
def test_ssam_density_is_exact(number: int, percent: int, every: int, dynamic: bool) -> None:
    first, second = nn.Parameter(torch.ones(number)), nn.Parameter(torch.ones(2, number))
    kind = {"mask": "dynamic", "total_steps": 5} if dynamic else {}
    optimizer = SSAM([first, second], sparsity=percent / 100, update_every=every, **kind)
    stream = torch.Generator().manual_seed(number)
    for _ in range(6):
        given = [{p: torch.randn(p.shape, generator=stream) for p in (first, second)} for _ in range(2)]
        gradients(optimizer, *given)
        held = masks(optimizer)
        assert held.dtype == torch.bool
        assert int(held.sum()) == 3 * number * (100 - percent) // 100


@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=30),
    rate=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=50, deadline=None)
def test_regrown_moves_the_smallest_ones(mask: list[bool], rate: float, seed: int) -> None:
    stream, before = torch.Generator().manual_seed(seed), torch.tensor(mask)
    scores, noise = torch.rand(2, len(mask), generator=stream)
    after = regrown(before, scores, rate, noise)
    assert after.sum() == before.sum()
    dropped, grown = before & ~after, after & ~before
    assert dropped.sum() == min(int(before.sum() * rate), int((~before).sum()))
    if dropped.any():
        assert scores[dropped].max() <= scores[before & after].min() if (before & after).any() else True
        assert noise[grown].min() >= noise[~before & ~after].max() if (~before & ~after).any() else True


def test_largest() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert largest(scores, 2).tolist() == [True, False, True, False]
    assert largest(scores, 0).tolist() == [False] * 4


def test_ssam_dynamic_masks_move_less_and_less() -> None:
    p = nn.Parameter(torch.zeros(1000))
    optimizer = SSAM([p], mask="dynamic", sparsity=0.5, update_every=1, drop_rate=0.4, total_steps=10)
    moved, before = [], None
    for step in range(12):
        g = torch.randn(1000, generator=torch.Generator().manual_seed(step))
        points = gradients(optimizer, {p: g}, {p: 2 * g.roll(1)})
        held = masks(optimizer)
        perturbed = points[1][0] != points[0][0]
        if before is not None:
            assert perturbed.equal(before)  # the step's own masks come after it
            dropped = before & ~held
            moved.append(int(dropped.sum()))
            if moved[-1]:
                assert g.roll(1).abs()[dropped].max() <= g.roll(1).abs()[before & held].min()
        before = held
    share = [0.4 * (1 + np.cos(np.pi * min(t / 10, 1))) / 2 for t in range(1, 12)]
    assert moved == [int(500 * s) for s in share]
    assert moved[-2:] == [0, 0]


def test_ssam_dynamic_masks_are_random_at_first() -> None:
    seen = []
    for seed in (0, 0, 1):
        p = nn.Parameter(torch.zeros(100))
        optimizer = SSAM([p], mask="dynamic", update_every=None, sparsity=0.3, seed=seed, lr=0.0)
        points = [gradients(optimizer, {p: torch.ones(100)}, {p: torch.ones(100)}) for _ in range(2)]
        moved = [point[1][0] != point[0][0] for point in points]
        assert moved[0].equal(moved[1])  # update_every=None: they stay
        assert moved[0].equal(masks(optimizer))
        seen.append(moved[0])
    assert int(seen[0].sum()) == 70
    assert seen[0].equal(seen[1])
    assert not seen[0].equal(seen[2])


def test_ssam_first_step_without_masks_is_not_perturbed() -> None:
    p = parameter(1.0, 2.0, 3.0, 4.0)
    optimizer = SSAM([p], rho=0.5, sparsity=0.5, update_every=2, lr=0.0)
    g = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    points = gradients(optimizer, {p: g}, {p: g.flip(0)})
    assert points[1][0].equal(points[0][0])
    assert not optimizer.diagnostics.perturbed
    points = gradients(optimizer, {p: g}, {p: g})
    want = 0.5 * g / torch.linalg.vector_norm(g) * torch.tensor([0.0, 0.0, 1.0, 1.0])  # not made longer
    torch.testing.assert_close(points[1][0] - points[0][0], want, rtol=1e-6, atol=0)
    assert optimizer.memory["mask"][0].tolist() == [False, False, True, True]  # until step 2
    gradients(optimizer, {p: g}, {p: g})
    assert optimizer.memory["mask"][0].tolist() == [True, True, False, False]


def test_ssam_without_masks_to_come_says_so() -> None:
    p = parameter(1.0)
    with pytest.raises(SpecError, match=r"set_masks\(\) or fisher\(\)"):
        gradients(SSAM([p], update_every=None), {p: torch.ones_like(p)})
    assert p.item() == 1.0


def regression() -> tuple[nn.Sequential, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    problem = Problem(3)
    net = nn.Sequential(*problem.net, nn.BatchNorm1d(1, dtype=torch.float64).eval())
    return net, problem.x[0], problem.y[0], lambda x, y: (net(x) - y).square().mean()


def test_ssam_fisher_is_the_mean_of_squared_gradients_of_samples() -> None:
    net, x, y, loss = regression()
    params = list(net.parameters())
    optimizer = SSAM(params, sparsity=0.5, update_every=None)
    total = [torch.zeros_like(p) for p in params]
    for sample, target in optimizer.ascent.fisher(zip(x.split(1), y.split(1), strict=True)):
        loss(sample, target).backward()
        for mine, p in zip(total, params, strict=True):
            mine += p.grad.square()
    assert all(p.grad is None for p in params)
    flat = torch.cat([mine.reshape(-1) for mine in total])
    kept = len(flat) - -(-len(flat) // 2)
    want = torch.zeros_like(flat, dtype=torch.bool)
    want[flat.argsort(descending=True)[:kept]] = True
    assert masks(optimizer).equal(want)
    resumed = SSAM(params, sparsity=0.5, update_every=None)
    resumed.load_state_dict(optimizer.state_dict())
    assert masks(resumed).equal(want)


def test_ssam_fisher_leaves_statistics_and_broken_loops_alone() -> None:
    net, x, y, loss = regression()
    norm = net[-1].train()
    optimizer = SSAM(net.parameters(), update_every=None, model=net)
    for sample, target in optimizer.ascent.fisher(zip(x.split(2), y.split(2), strict=True)):
        loss(sample, target).backward()
        break
    assert optimizer.memory["mask"] == {}
    for sample, target in optimizer.ascent.fisher(zip(x.split(2), y.split(2), strict=True)):
        loss(sample, target).backward()
    assert len(optimizer.memory["mask"]) == 6
    assert int(norm.num_batches_tracked) == 0
    assert norm.track_running_stats


def test_ssam_given_masks_last_until_the_next_update() -> None:
    g = torch.tensor([1.0, 5.0], dtype=torch.float64)
    for every, want in ((None, [True, False]), (2, [False, True])):
        p = parameter(1.0, 2.0)
        optimizer = SSAM([p], sparsity=0.5, update_every=every)
        optimizer.ascent.set_masks([torch.tensor([1.0, 0.0])])
        for _ in range(2):
            gradients(optimizer, {p: g}, {p: g})
            assert optimizer.memory["mask"][0].tolist() == [True, False]
        gradients(optimizer, {p: g}, {p: g})
        assert optimizer.memory["mask"][0].tolist() == want


def test_ssam_steps_that_do_not_complete_leave_masks_alone() -> None:
    g = torch.tensor([1.0, 5.0], dtype=torch.float64)
    for kind in ({}, {"mask": "dynamic", "total_steps": 9}):
        p = parameter(1.0, 2.0)
        optimizer = SSAM([p], sparsity=0.5, update_every=1, **kind)
        with pytest.warns(RuntimeWarning, match="pass 2 is not finite"):
            gradients(optimizer, {p: g}, {p: g / 0})
        assert optimizer.memory["mask"] == {}
        assert optimizer.numbers == {}

"""SAMPa, Momentum-SAM, CR-SAM and Lookbehind: exactness, edges, and what each of them promises."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.optim import CRSAM, MSAM, SAM, Lookbehind, SAMPa, SharpnessAware, create
from steppe.optim.sharpness.lookbehind import agreements
from steppe.optim.sharpness.vectors import Bucket, Vector

from . import oracles_own_passes as oracles
from .test_golden import GOLDEN, close, flat, network
from .test_sharpness import Count, gradients, parameter

BASES: dict[str, tuple[str, Callable[..., oracles.Base], dict[str, Any]]] = {
    "sgd": ("sgd", oracles.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}),
    "nesterov": ("sgd", oracles.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    "dampened": ("sgd", oracles.SGD, {"lr": 0.05, "momentum": 0.8, "dampening": 0.3}),
    "adamw": ("adamw", oracles.AdamW, {"lr": 1e-2, "weight_decay": 1e-1}),
    "plain": ("sgd", oracles.SGD, {"lr": 0.05, "weight_decay": 1e-2}),
}
VARIANTS = {
    "sampa": ("sampa", {"rho": 0.1, "lmbda": 0.2}),
    "sampa-0": ("sampa", {"rho": 0.2, "lmbda": 0.0}),
    "sampa-1": ("sampa", {"rho": 0.1, "lmbda": 1.0}),
    "msam": ("msam", {"rho": 0.3}),
    "msam-paper": ("msam", {"rho": 0.3, "form": "paper"}),
    "cr_sam": ("cr_sam", {"rho": 0.1, "gamma": 0.1, "beta": 0.01}),
    "cr_sam-large": ("cr_sam", {"rho": 0.3, "gamma": 0.5, "beta": 1.0}),
    "lookbehind": ("lookbehind", {"rho": 0.05, "k": 2, "alpha": 0.5}),
    "lookbehind-1": ("lookbehind", {"rho": 0.05, "k": 1, "alpha": 0.8}),
    "lookbehind-5": ("lookbehind", {"rho": 0.05, "k": 5, "alpha": 0.2}),
    "lookbehind-adaptive": ("lookbehind", {"rho": 0.1, "k": 3, "alpha": -1}),
}


class Batches:
    """Four batches of one regression problem, as closures for the optimizer and as functions for the oracle."""

    def __init__(self, seed: int) -> None:
        stream = torch.Generator().manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.x = torch.randn(4, 6, 3, generator=stream, dtype=torch.float64)
        self.y = torch.randn(4, 6, 2, generator=stream, dtype=torch.float64)
        self.params = list(self.net.parameters())
        self.start = torch.randn(sum(p.numel() for p in self.params), generator=stream, dtype=torch.float64)
        nn.utils.vector_to_parameters(self.start, self.params)

    def loss(self, batch: int) -> Tensor:
        return (self.net(self.x[batch]) - self.y[batch]).square().mean()

    def closure(self, batch: int) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.net.zero_grad()
            value = self.loss(batch)
            value.backward()
            return value

        return closure

    def gradient(self, batch: int) -> Callable[[np.ndarray], np.ndarray]:
        def gradient(w: np.ndarray) -> np.ndarray:
            here = self.weights
            nn.utils.vector_to_parameters(torch.from_numpy(w), self.params)
            grads = torch.autograd.grad(self.loss(batch), self.params)
            nn.utils.vector_to_parameters(torch.from_numpy(here), self.params)
            return torch.cat([grad.reshape(-1) for grad in grads]).numpy()

        return gradient

    @property
    def weights(self) -> np.ndarray:
        return nn.utils.parameters_to_vector(self.params).detach().clone().numpy()


# -- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restore", ["copy", "subtract"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_oracle(variant: str, base: str, restore: str) -> None:
    key, hyper = VARIANTS[variant]
    if key == "msam" and base == "plain":
        pytest.skip("Momentum-SAM needs momentum")
    base_key, base_class, base_hyper = BASES[base]
    problem, memory, state = Batches(0), {}, base_class(**base_hyper)
    optimizer = create(
        key, problem.net.named_parameters(), base=base_key, restore=restore, **hyper, **base_hyper
    )
    sizes = {"sizes": [p.numel() for p in problem.params]} if key == "lookbehind" else {}
    w = problem.weights
    for step in range(12):
        optimizer.param_groups[0]["lr"] = state.lr = base_hyper["lr"] * (1 - step / 20)  # as a scheduler does
        w = getattr(oracles, key)(memory, state, w, problem.gradient(step % 4), **hyper, **sizes)
        optimizer.step(problem.closure(step % 4))
        np.testing.assert_allclose(problem.weights, w, rtol=0, atol=1e-11, err_msg=f"after step {step}")
    assert optimizer.param_groups[0]["weight_decay"] == base_hyper.get("weight_decay", 0)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no shared/golden beside the repository")
@pytest.mark.parametrize("driver", ["closure", "loop"])
@pytest.mark.parametrize("key", ["sampa", "msam"])
def test_official_trajectory(key: str, driver: str) -> None:
    golden = json.loads((GOLDEN / f"{key}_sgd.json").read_text())
    hyper, expected = golden["hyperparameters"], golden["trajectory"]
    net = network(golden["problem"], expected["weights"][0])
    x = torch.tensor(golden["problem"]["inputs"], dtype=torch.float64)
    y = torch.tensor(golden["problem"]["targets"], dtype=torch.float64)
    own = {"rho": hyper["rho"], "lmbda": hyper["og"]} if key == "sampa" else {"rho": hyper["rho"]}
    optimizer = create(key, net.named_parameters(), **own, **golden["base"]["kwargs"])
    handed: list[Tensor] = []
    optimizer.base.register_step_pre_hook(
        lambda *_: handed.append(torch.cat([p.grad.reshape(-1) for p in net.parameters()]))
    )
    evaluated: list[Tensor] = []

    def closure() -> Tensor:
        net.zero_grad()
        evaluated.append(flat(net))
        loss = (net(x).squeeze(-1) - y).square().mean()
        loss.backward()
        return loss

    for t in range(golden["steps"]):
        if driver == "closure":
            optimizer.step(closure)
        else:
            for _ in optimizer.passes():
                closure()
            optimizer.step()
        close(handed[t], expected["base_grad"][t])
        close(flat(net), (golden["clean_weights"] if key == "msam" else expected["weights"])[t + 1])
    points = [point for step in expected["eval_weights"] for point in step]
    if (
        key == "sampa"
    ):  # official: x~ and y of each step; here x~ a step earlier, and none at first, where both are x
        assert points[0] == points[1]
        points, evaluated = points[1:], evaluated[:-1]
    assert len(evaluated) == len(points)
    for got, want in zip(evaluated, points, strict=True):
        close(got, want)


# -- SAMPa ---------------------------------------------------------------------------------------------------------


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sampa_looks_from_y_and_ahead() -> None:
    p = parameter(1.0, 1.0)
    optimizer = SAMPa([p], lr=0.5, rho=0.1, lmbda=0.25)
    d, ahead = vector(3.0, 4.0), vector(8.0, 0.0)
    first = gradients(optimizer, {p: d}, {p: ahead})
    assert first[0][0].equal(vector(1.0, 1.0))
    x = vector(1.0, 1.0) - 0.5 * d  # the base's own step
    torch.testing.assert_close(first[1][0], x + 0.1 * d / 5)
    assert p.detach().equal(x)
    second = gradients(optimizer, {p: vector(0.0, 4.0)}, {p: d})
    torch.testing.assert_close(second[0][0], x - 0.5 * d)  # y
    torch.testing.assert_close(p.detach(), x - 0.5 * vector(6.0, 1.0))
    assert optimizer.diagnostics.passes == 2


def test_sampa_takes_the_learning_rate_of_the_step() -> None:
    p = parameter(0.0)
    optimizer = SAMPa([p], lr=1.0)
    one = torch.ones_like(p)
    gradients(optimizer, {p: one}, {p: one})
    optimizer.param_groups[0]["lr"] = 0.25
    assert gradients(optimizer, {p: one}, {p: one})[0][0].item() == -1.25


def test_sampa_starts_afresh_with_what_had_no_gradient() -> None:
    p, q = parameter(0.0), parameter(0.0)
    optimizer = SAMPa([p, q], lr=1.0, lmbda=0.5)
    one = torch.ones_like(p)
    gradients(optimizer, {p: one, q: one}, {p: 3 * one, q: 3 * one})
    assert set(optimizer.memory["ahead"]) == {0, 1}
    gradients(optimizer, {p: one, q: None}, {p: 3 * one, q: None})
    assert set(optimizer.memory["d"]) == {0}
    before = q.item()
    points = gradients(optimizer, {p: one, q: 5 * one}, {p: one, q: one})
    assert (points[0][1].item(), q.item()) == (before, before - 5)


def test_sampa_keeps_d_from_bases_that_edit_gradients() -> None:
    p = parameter(1.0, 2.0)
    optimizer = SAMPa([p], lr=0.1)

    def edits(*_: object) -> None:
        p.grad.zero_()

    optimizer.base.register_step_pre_hook(edits)
    gradients(optimizer, {p: vector(3.0, 4.0)}, {p: vector(1.0, 1.0)})
    p.grad.zero_()
    assert optimizer.memory["d"][0].equal(vector(3.0, 4.0))
    assert optimizer.memory["ahead"][0].equal(vector(1.0, 1.0))


# -- Momentum-SAM --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "hyper"),
    [("sgd", {}), ("torch.optim:Adagrad", {}), ("torch.optim:RMSprop", {}), ("torch.optim:Adadelta", {})],
)
def test_msam_refuses_a_base_without_momentum(base: str, hyper: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="keeps none: take SGD with momentum > 0, Adam"):
        MSAM([parameter(1.0)], base=base, **hyper)
    optimizer = MSAM([parameter(1.0)], momentum=0.9)
    with pytest.raises(SpecError, match="keeps none"):
        optimizer.add_param_group({"params": [parameter(1.0)], "momentum": 0.0})


class Forgetful(torch.optim.Optimizer):
    """Has betas and remembers something else than a momentum."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"betas": (0.9, 0.99)})

    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["square"] = p.grad.square()


def test_msam_refuses_a_base_that_turns_out_to_have_none() -> None:
    p = parameter(1.0)
    optimizer = MSAM(None, base=Forgetful([p]))
    gradients(optimizer, {p: torch.ones_like(p)})
    with pytest.raises(SpecError, match="Forgetful as it is set keeps none"):
        gradients(optimizer, {p: torch.ones_like(p)})


@pytest.mark.parametrize("base", ["torch.optim:RMSprop", "torch.optim:NAdam", "torch.optim:Adamax", "adamw"])
def test_msam_finds_the_momentum_of_other_bases(base: str) -> None:
    p = parameter(1.0, -1.0)
    more = {"momentum": 0.9} if "RMS" in base else {}
    optimizer = MSAM([p], base=base, rho=0.5, lr=0.0, **more)
    gradients(optimizer, {p: vector(3.0, 0.0)})
    (point,) = gradients(optimizer, {p: vector(3.0, 0.0)})
    torch.testing.assert_close(point[0], vector(0.5, -1.0))


def test_msam_copies_nothing_when_it_subtracts() -> None:
    p = nn.Parameter(torch.ones(1000))
    optimizer = MSAM([p], momentum=0.9, restore="subtract", lr=0.1)
    gradients(optimizer, {p: torch.ones_like(p)})

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    g = torch.ones_like(p)
    with Largest() as largest:
        for _ in optimizer.passes():
            p.grad = g
    assert largest.elements <= 1
    optimizer.step()


def test_msam_evaluates_and_saves_clean_weights() -> None:
    problem = Batches(0)
    optimizer = MSAM(problem.net.named_parameters(), momentum=0.9, lr=0.05)
    seen = []

    def closure() -> Tensor:
        seen.append(problem.weights)
        return problem.closure(0)()

    optimizer.step(closure)
    clean = problem.weights
    optimizer.step(closure)
    assert np.linalg.norm(seen[1] - clean) == pytest.approx(0.3)
    assert set(optimizer.state_dict()["sharpness_aware"]["memory"]) == set()


def test_msam_moves_only_what_has_momentum() -> None:
    p, q = parameter(1.0), parameter(1.0)
    optimizer = MSAM([p, q], momentum=0.5, lr=0.0, rho=0.25, weight_decay=0.5)
    one = torch.ones_like(p)
    gradients(optimizer, {p: one, q: None})
    (point,) = gradients(optimizer, {p: one, q: one})
    assert (point[0].item(), point[1].item()) == pytest.approx((0.75, 1.0))
    # the decay pulls p back from 0.75, where its gradient was taken, and q from 1
    assert optimizer.state[p]["momentum_buffer"].item() == pytest.approx(0.5 * 1.5 + 1 + 0.5 * 0.75)
    assert optimizer.state[q]["momentum_buffer"].item() == pytest.approx(1.5)


def test_msam_over_sparse_momentum() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = MSAM(table.parameters(), momentum=0.9, lr=0.0, rho=1.0)
    before, points = table.weight.detach().clone(), []
    for _ in range(2):
        for _ in optimizer.passes():
            points.append(table.weight.detach().clone())
            table(torch.tensor([1])).sum().backward()
        optimizer.step()
    moved = torch.zeros(4, 2)
    moved[1] = -(0.5**0.5)
    torch.testing.assert_close(points[1] - before, moved)
    assert table.weight.equal(before)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_msam_launches_do_not_grow_with_the_number_of_tensors(base: str) -> None:
    counts = []
    for number in (2, 30):
        params = [nn.Parameter(torch.ones(2, 2)) for _ in range(number)]
        optimizer = MSAM(params, base=base, weight_decay=0.1, **({"momentum": 0.9} if base == "sgd" else {}))
        for _ in range(2):
            given = [torch.full((2, 2), 1.0 + n) for n in range(number)]
            with Count() as count:
                for _ in optimizer.passes():
                    for p, gradient in zip(params, given, strict=True):
                        p.grad = gradient
            optimizer.step()
        counts.append(count.calls)
    assert counts[0] == counts[1]


# -- CR-SAM --------------------------------------------------------------------------------------------------------


def test_cr_sam_on_a_parabola_sees_its_slope_only() -> None:
    # ∇L = A w: the second difference of the gradient vanishes, the first is 2 A e
    p, a = parameter(2.0, 1.0), vector(3.0, 1.0)
    optimizer = CRSAM([p], rho=0.5, gamma=0.7, beta=0.2, lr=1.0)
    start = p.detach().clone()

    def closure() -> Tensor:
        p.grad = a * p.detach()
        return (a * p.detach().square()).sum() / 2

    optimizer.step(closure)
    e = 0.5 * a * start / (a * start).norm()
    torch.testing.assert_close(p.detach(), start - a * (start + e) - 0.2 * 2 * a * e)


# -- Lookbehind ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_lookbehind_of_one_whole_round_is_sam(base: str) -> None:
    results = []
    for cls, hyper in ((SAM, {}), (Lookbehind, {"k": 1, "alpha": 1.0})):
        problem = Batches(1)
        optimizer = cls(problem.net.named_parameters(), base=base, rho=0.1, lr=0.05, **hyper)
        for step in range(4):
            optimizer.step(problem.closure(step))
        results.append(problem.weights)
    np.testing.assert_allclose(*results, rtol=0, atol=1e-12)


def test_lookbehind_that_goes_no_part_of_the_way_stays() -> None:
    problem = Batches(1)
    optimizer = Lookbehind(problem.net.named_parameters(), alpha=0.0, momentum=0.9, lr=0.1)
    before = problem.weights
    optimizer.step(problem.closure(0))
    assert (problem.weights == before).all()
    assert len(optimizer.state) == 4  # the base has stepped


def test_lookbehind_agrees_like_torch() -> None:
    stream = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(5, 3, generator=stream).double(), torch.randn(5, 3, generator=stream).double())]
    x, y = pairs[0]
    pairs += [(x, x), (x, -2 * x), (x, 0 * y), (1e-9 * x, y), (1e-9 * x, 1e-10 * x)]
    owners = [nn.Parameter(a) for a, _ in pairs]
    buckets = [Bucket({}, owners, owners, list(range(len(pairs))))]
    ((*got,),) = agreements(*(Vector(buckets, [list(side)]) for side in zip(*pairs, strict=True)))
    cosine = torch.nn.CosineSimilarity(dim=0)
    assert got == pytest.approx([(cosine(a.flatten(), b.flatten()).item() + 1) / 2 for a, b in pairs])


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"alpha": -0.5}, r"alpha=-0.5, but it must be a number in \[0, 1\], or -1"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"k": 0}, "k=0, but it must be a whole number >= 1"),
        ({"k": 1.5}, "k=1.5"),
    ],
)
def test_lookbehind_says_what_is_allowed(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Lookbehind([parameter(1.0)], **hyper)


# -- the base, stepped in mid-step ---------------------------------------------------------------------------------

STEPPING = [SAMPa, Lookbehind]


@pytest.mark.parametrize("restore", ["copy", "subtract"])
@pytest.mark.parametrize("cls", STEPPING)
def test_an_unfinished_step_is_taken_back_with_the_bases_state(
    cls: type[SharpnessAware], restore: str
) -> None:
    p, late = parameter(1.0, 2.0), parameter(5.0)
    optimizer = cls([p, late], base="adamw", lr=0.1, restore=restore)
    g = vector(1.0, -1.0)
    gradients(optimizer, *[{p: g, late: None}] * 4)
    weights = [p.detach().clone(), late.detach().clone()]
    state = {name: value.clone() for name, value in optimizer.state[p].items()}
    places = {name: value.data_ptr() for name, value in optimizer.state[p].items()}
    calls = 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        p.grad = g * calls
        late.grad = torch.ones_like(late) if calls > 1 else None
        if calls == optimizer.diagnostics.passes:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert p.equal(weights[0])
    assert late.equal(weights[1])
    assert set(optimizer.state) == {p}
    assert all(optimizer.state[p][name].equal(value) for name, value in state.items())
    assert {name: value.data_ptr() for name, value in optimizer.state[p].items()} == places


class Nesting(torch.optim.SGD):
    """A base with lists and numbers in its state and in its groups."""

    def step(self, closure: None = None) -> None:
        super().step()
        for group in self.param_groups:
            group["seen"] = group.get("seen", 0) + 1
            for p in group["params"]:
                self.state[p].setdefault("history", []).append(p.grad.clone())
                self.state[p]["history"][0] += 1
                self.state[p]["count"] = self.state[p].get("count", 0) + 1


@pytest.mark.parametrize("cls", STEPPING)
def test_nested_state_is_taken_back_too(cls: type[SharpnessAware]) -> None:
    p = parameter(1.0, 2.0)
    optimizer = cls([p], base=Nesting, lr=0.1)
    gradients(optimizer, *[{p: vector(1.0, -1.0)}] * 4)
    steps, first = optimizer.state[p]["count"], optimizer.state[p]["history"][0].clone()
    calls = iter([1.0, 2.0, 3.0, math.nan] if cls is Lookbehind else [1.0, math.nan])
    with pytest.warns(RuntimeWarning, match="not finite"):
        gradients(optimizer, *[{p: vector(value, 1.0)} for value in calls])
    assert (optimizer.state[p]["count"], optimizer.param_groups[0]["seen"]) == (steps, steps)
    assert len(optimizer.state[p]["history"]) == steps
    assert optimizer.state[p]["history"][0].equal(first)


@pytest.mark.parametrize("cls", STEPPING)
def test_an_error_in_the_bases_step_leaves_nothing_behind(cls: type[SharpnessAware]) -> None:
    p = parameter(1.0, 2.0)
    optimizer = cls([p], momentum=0.9, lr=0.1)
    g = vector(1.0, -1.0)
    gradients(optimizer, *[{p: g}] * 4)
    before, buffer = p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()

    def fails(*_: object) -> None:
        raise ArithmeticError

    hook = optimizer.base.register_step_post_hook(fails)
    with pytest.raises(ArithmeticError):
        gradients(optimizer, *[{p: g}] * 4)
    hook.remove()
    assert p.equal(before)
    assert optimizer.state[p]["momentum_buffer"].equal(buffer)
    gradients(optimizer, *[{p: g}] * 4)


@pytest.mark.parametrize("cls", STEPPING)
def test_clipping_belongs_into_a_hook_of_the_base(cls: type[SharpnessAware]) -> None:
    p = parameter(0.0, 0.0)
    optimizer = cls([p], lr=1.0, **({"alpha": 1.0, "k": 1} if cls is Lookbehind else {}))
    optimizer.base.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_([p], 1.0) and None)
    gradients(optimizer, *[{p: vector(30.0, 40.0)}] * 2)
    torch.testing.assert_close(p.detach(), vector(-0.6, -0.8), rtol=1e-5, atol=0)


@pytest.mark.parametrize("cls", [SAMPa, MSAM, CRSAM, Lookbehind])
def test_subtracting_drifts_by_rounding_only(cls: type[SharpnessAware]) -> None:
    results = []
    for restore in ("copy", "subtract"):
        problem = Batches(2)
        optimizer = cls(problem.net.named_parameters(), momentum=0.9, lr=0.05, restore=restore)
        for step in range(20):
            optimizer.step(problem.closure(step % 4))
        results.append(problem.weights)
    np.testing.assert_allclose(*results, rtol=0, atol=1e-12)

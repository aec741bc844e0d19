"""ESAM, ImbSAM and Functional-SAM: what looks at single samples, or at outputs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.optim import ESAM, OPTIMIZERS, SAM, Composed, FunctionalSAM, ImbSAM, create
from steppe.optim.sharpness.esam import sharpest
from steppe.testing import Rig

from . import oracles, oracles_samplewise
from .test_golden import GOLDEN, close, flat, network
from .test_oracles import BASES
from .test_sharpness import Count


class Masked(ESAM):
    """The tensors that take part in each step are given."""

    masks: list[list[bool]]

    def active(self, index, name, beta):
        return self.masks[self.steps][index]


class Problem:
    """A small network, four batches of six samples, and its twin in numpy."""

    def __init__(self, seed: int) -> None:
        stream = torch.Generator().manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.x = torch.randn(4, 6, 3, generator=stream, dtype=torch.float64)
        self.y = torch.randn(4, 6, 2, generator=stream, dtype=torch.float64)
        start = torch.randn(32, generator=stream, dtype=torch.float64)
        nn.utils.vector_to_parameters(start, self.net.parameters())
        self.masks = (torch.rand(12, 4, generator=stream) < 0.6).tolist()
        self.masks = [[True] * 4, *(mask if any(mask) else [True] * 4 for mask in self.masks[1:])]
        self.tails = torch.rand(12, 6, generator=stream) < 0.4
        self.twin, self.start = oracles_samplewise.Net(3, 5, 2), start.numpy().copy()

    def closure(self, optimizer, step: int, seen: list[Tensor] | None = None):
        x, y = self.x[step % 4], self.y[step % 4]

        def closure(p):
            optimizer.zero_grad()
            if seen is not None:
                seen.append(flat(self.net))
            outputs = self.net(x[p.samples])
            loss = p.mean((outputs - y[p.samples]).square().sum(dim=1), outputs)
            if p.gradient:
                loss.backward()
            return loss

        return closure


# -- golden ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no shared/golden beside the repository")
@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("esam_sgd", None),
        ("esam-beta0.6-gamma0.5_sgd", None),
        ("imbsam_sgd", True),
        ("imbsam_sgd", False),
    ],
)
def test_trajectory(name: str, whole: bool | None) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    hyper, expected = dict(golden["hyperparameters"]), golden["trajectory"]
    net = network(golden["problem"], expected["weights"][0])
    x = torch.tensor(golden["problem"]["inputs"], dtype=torch.float64)
    y = torch.tensor(golden["problem"]["targets"], dtype=torch.float64)
    tail = torch.zeros(16, dtype=torch.bool)
    if name.startswith("imbsam"):
        tail[hyper.pop("tail")] = True
        optimizer = ImbSAM(net.named_parameters(), whole=whole, **hyper, **golden["base"]["kwargs"])
    else:
        masks = hyper.pop("active_tensors", [[True] * 4] * 20)
        optimizer = Masked(net.named_parameters(), **hyper, **golden["base"]["kwargs"])
        optimizer.masks = masks
    handed: list[Tensor] = []
    optimizer.base.register_step_pre_hook(
        lambda *_: handed.append(torch.cat([p.grad.reshape(-1) for p in net.parameters()]))
    )
    seen: list[Tensor] = []

    def closure(p):
        optimizer.zero_grad()
        seen.append(flat(net))
        losses = (net(x[p.samples]).squeeze(-1) - y[p.samples]).square()
        loss = p.mean(losses)
        if p.gradient:
            loss.backward()
        return loss

    for t in range(golden["steps"]):
        seen.clear()
        if name.startswith("imbsam"):
            optimizer.tail = tail
        loss = optimizer.step(closure)
        if name.startswith("esam"):
            assert abs(loss.item() - expected["loss"][t]) < 1e-10
        clean, moved = expected["eval_weights"][t][:2]
        want = [clean, moved, clean] if name.startswith("imbsam") else expected["eval_weights"][t]
        if hyper.get("gamma") == 1:  # our second pass is left out: nothing is chosen
            want = want[:2]
        assert len(seen) == len(want)
        for got, point in zip(seen, want, strict=True):
            close(got, point)
        close(handed[-1], expected["base_grad"][t])
        close(flat(net), expected["weights"][t + 1])


# -- oracles ---------------------------------------------------------------------------------------------------------

VARIANTS = {
    "esam": ("esam", {"rho": 0.1, "beta": 1.0, "gamma": 1.0}),
    "esam-both": ("esam", {"rho": 0.1, "beta": 0.6, "gamma": 0.5}),
    "esam-gamma": ("esam", {"rho": 0.1, "beta": 1.0, "gamma": 0.7}),
    "esam-adaptive": ("esam", {"rho": 0.5, "beta": 0.6, "gamma": 0.5, "adaptive": True}),
    "esam-paper": ("esam", {"rho": 0.1, "beta": 0.5, "gamma": 0.5, "form": "paper"}),
    "esam-one": ("esam", {"rho": 0.1, "beta": 1.0, "gamma": 0.2}),
    "imbsam": ("imbsam", {"rho": 0.2, "tail_weight": 2.0}),
    "imbsam-parts": ("imbsam", {"rho": 0.2, "tail_weight": 1.0, "whole": False}),
    "functional": ("functional_sam", {"rho": 0.3}),
    "functional-adaptive": ("functional_sam", {"rho": 0.5, "adaptive": True}),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_oracle(variant: str, base: str, seed: int) -> None:
    problem = Problem(seed)
    key, hyper = VARIANTS[variant]
    base_key, base_hyper = BASES[base]
    optimizer = (Masked if key == "esam" else OPTIMIZERS[key].load())(
        problem.net.named_parameters(), base=base_key, **hyper, **base_hyper
    )
    drawn = key == "esam" and hyper["beta"] < 1
    optimizer.masks = problem.masks if drawn else [[True] * 4] * 12
    w, memory = problem.start, {}
    for step in range(12):
        x, y = problem.x[step % 4].numpy(), problem.y[step % 4].numpy()
        more = {k: v for k, v in hyper.items() if k != "whole"}
        if key == "esam":
            more["active"] = optimizer.masks[step]
        if key == "imbsam":
            optimizer.tail = problem.tails[step]
            more["tail"] = problem.tails[step].numpy()
        handed = getattr(oracles_samplewise, key)(problem.twin, w, x, y, **more)
        w = getattr(oracles, base_key)(memory, w, handed, **base_hyper)
        optimizer.step(problem.closure(optimizer, step))
        np.testing.assert_allclose(flat(problem.net), w, rtol=0, atol=1e-10, err_msg=f"after step {step}")


# -- ESAM ------------------------------------------------------------------------------------------------------------


def test_esam_passes_and_their_samples() -> None:
    problem = Problem(0)
    optimizer = ESAM(problem.net.named_parameters(), gamma=0.5)
    asked = []
    for p in optimizer.passes():
        asked.append(p)
        with torch.set_grad_enabled(p.gradient):
            value = problem.closure(optimizer, 0)(p)
        assert value.requires_grad == p.gradient
    optimizer.step()
    assert [p.gradient for p in asked] == [True, False, True]
    assert [p.perturbed for p in asked] == [False, True, True]
    assert len(asked[2].samples) == 2  # k = 3, and strictly more than the third largest
    told = optimizer.diagnostics
    assert told.passes == 2
    assert told.surrogate_gap == pytest.approx(float(asked[1].losses.mean() - asked[0].losses.mean()))


def test_esam_freezes_tensors_for_the_first_pass_only() -> None:
    problem = Problem(0)
    names = [name for name, _ in problem.net.named_parameters()]
    params = list(problem.net.parameters())
    params[3].requires_grad_(False)
    optimizer = Masked(problem.net.named_parameters(), beta=0.5, gamma=1.0, lr=0.1)
    optimizer.masks = [[True, False, False, True]] * 2
    asks = {}
    for p in optimizer.passes():
        asks[p.number] = [param.requires_grad for param in params]
        problem.closure(optimizer, 0)(p)
        asks[p.number, "grad"] = [
            name for name, param in zip(names, params, strict=True) if param.grad is not None
        ]
    assert asks[1] == [True, False, False, False]
    assert asks[1, "grad"] == names[:1]
    assert asks[2] == [True, True, True, False]
    assert asks[2, "grad"] == names[:3]
    optimizer.step()
    for _ in optimizer.passes():
        break
    assert [param.requires_grad for param in params] == [True, True, True, False]


def test_esam_leaves_out_what_it_cannot_freeze() -> None:
    """In a compiled module tensors are not frozen; the steps are the same."""
    weights = []
    for compiled in (None, "wrapped", "in place"):
        problem = Problem(1)
        model = problem.net
        if compiled == "wrapped":
            model = torch.compile(model, backend="eager")
        elif compiled == "in place":
            model[2].compile(backend="eager")
        optimizer = Masked(problem.net.named_parameters(), beta=0.6, rho=0.3, lr=0.1, model=model)
        optimizer.masks = problem.masks
        frozen = []
        for step in range(6):
            inner = problem.closure(optimizer, step)

            def closure(p, inner=inner, problem=problem, frozen=frozen):
                frozen.append(not all(param.requires_grad for param in problem.net.parameters()))
                return inner(p)

            optimizer.step(closure)
        assert any(frozen) is (compiled is None)
        weights.append(flat(problem.net))
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(weights[2], weights[0], rtol=0, atol=1e-14)


def test_esam_draws_by_name_with_probability_beta() -> None:
    params = [(f"layer{n}.weight", nn.Parameter(torch.ones(1))) for n in range(2000)]
    optimizer = ESAM(params, beta=0.3, seed=3)
    assert not optimizer._idle(0.3)  # the first step has all
    optimizer.steps = 7
    idle = optimizer._idle(0.3)
    assert len(idle) / 2000 == pytest.approx(0.7, abs=0.04)
    turned = ESAM(params[::-1], beta=0.3, seed=3)
    turned.steps = 7
    assert {1999 - index for index in turned._idle(0.3)} == set(idle)
    optimizer.steps = 8
    assert optimizer._idle(0.3) != idle
    optimizer.active = lambda *_: False  # a draw of nothing is one of all
    assert not optimizer._idle(0.3)


def test_esam_finds_nan_in_a_tensor_outside_the_ascent() -> None:
    problem = Problem(0)
    optimizer = Masked(problem.net.named_parameters(), gamma=1.0, lr=0.1)
    optimizer.masks = [[True, False, True, True]]
    inner = problem.closure(optimizer, 0)

    def closure(p):
        loss = inner(p)
        if p.number == 2:
            problem.net[0].bias.grad.fill_(math.nan)
        return loss

    before = flat(problem.net)
    with pytest.warns(RuntimeWarning, match="pass 2 is not finite"):
        optimizer.step(closure)
    assert flat(problem.net).equal(before)


@pytest.mark.parametrize(
    ("rises", "gamma", "code", "paper"),
    [
        ([1.0, 4.0, 3.0, 2.0], 0.5, [1], [1, 2]),  # k = 2
        ([1.0, 4.0, 3.0, 2.0], 0.75, [1, 2], [1, 2, 3]),
        ([1.0, 4.0, 3.0, 2.0], 0.98, [1, 2], [1, 2, 3]),
        ([1.0, 4.0, 3.0, 2.0], 0.25, [1], [1]),  # k = 1: the code would keep none
        ([1.0, 4.0, 3.0, 2.0], 0.1, [1], [1]),  # k = 0: the code would raise
        ([1.0, 4.0, 3.0, 2.0], 0.0, [1], [1]),
        ([5.0], 0.5, [0], [0]),
        ([4.0, 4.0, 4.0, 2.0], 0.5, [0, 1, 2], [0, 1, 2]),  # ties at the cut, nothing above
        ([5.0, 4.0, 4.0, 2.0], 0.5, [0], [0, 1, 2]),
        ([0.0, 0.0, 0.0, 0.0], 0.5, [0, 1, 2, 3], [0, 1, 2, 3]),  # rho = 0
        ([-3.0, -1.0, -2.0, -4.0], 0.5, [1], [1, 2]),
        ([1.0, math.nan, 3.0, 2.0], 0.5, [1, 2], [1, 2]),
        ([1.0, math.nan, 3.0, 2.0], 0.25, [0, 1, 2, 3], [0, 1, 2, 3]),
        ([1.0, math.inf, 3.0, 2.0], 0.25, [1], [1]),
    ],
)
def test_sharpest(rises: list[float], gamma: float, code: list[int], paper: list[int]) -> None:
    after = torch.tensor(rises, dtype=torch.float64)
    zeros = torch.zeros_like(after)
    if not math.isnan(sum(rises)) or gamma == 0.25:
        assert sharpest(zeros, after, gamma).tolist() == code
        assert sharpest(zeros, after, gamma, "paper").tolist() == paper


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.floats(0, 0.98))
@settings(deadline=None)
def test_sharpest_keeps_some_and_the_largest(rises: list[int], gamma: float) -> None:
    values = torch.tensor(rises, dtype=torch.float64)
    for form in ("code", "paper"):
        kept = sharpest(torch.zeros_like(values), values, gamma, form).tolist()
        assert kept == sorted(set(kept))
        assert kept
        lost = set(range(len(rises))) - set(kept)
        assert all(rises[i] > rises[j] for i in kept for j in lost)
        want = oracles_samplewise.kept_by_esam(values.numpy(), gamma, form)
        assert kept == np.flatnonzero(want).tolist()


def test_esam_says_that_it_needs_losses() -> None:
    problem = Problem(0)
    optimizer = ESAM(problem.net.named_parameters())

    def closure(p):
        optimizer.zero_grad()
        loss = problem.net(problem.x[0]).square().mean()
        if p.gradient:
            loss.backward()
        return loss

    before = flat(problem.net)
    with pytest.raises(RuntimeError, match=r"p\.mean\(losses\)"):
        optimizer.step(closure)
    assert flat(problem.net).equal(before)
    with pytest.raises(ValueError, match='reduction="none"'):
        next(optimizer.passes()).mean(torch.ones(2, 2))


# -- ImbSAM ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("tails", [0, 6])
def test_imbsam_with_one_kind_of_samples(tails: int, whole: bool) -> None:
    """Without tail samples it is the base, in one pass; without head samples it is SAM, in two."""
    results = []
    for kind in ("imbsam", "plain"):
        problem, seen = Problem(2), []
        params = problem.net.named_parameters()
        if kind == "imbsam":
            optimizer = ImbSAM(params, rho=0.3, tail_weight=1.0, whole=whole, lr=0.1, momentum=0.9)
        else:
            optimizer = SAM(params, rho=0.3 if tails else 0.0, lr=0.1, momentum=0.9)
        for step in range(4):
            optimizer.tail = torch.arange(6) < tails
            inner = problem.closure(optimizer, step, seen)
            if kind == "imbsam":
                optimizer.step(inner)
                continue
            for p in optimizer.passes():
                inner(p)
            optimizer.step()
        results.append(flat(problem.net))
        if kind == "imbsam":
            assert len(seen) == (4 if not tails else 8)
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_imbsam_takes_the_mask_and_asks_for_another() -> None:
    problem = Problem(0)
    optimizer = ImbSAM(problem.net.named_parameters(), lr=0.1)
    closure = problem.closure(optimizer, 0)
    with pytest.raises(SpecError, match=r"before each step set optimizer\.tail"):
        optimizer.step(closure)
    optimizer.tail = torch.tensor([0, 1, 0, 1, 0, 0])
    with pytest.raises(SpecError, match=r"torch.int64 of shape \(6,\), but it must be bool"):
        optimizer.step(closure)
    optimizer.tail = torch.tensor([False, True])
    with pytest.raises(ValueError, match=r"6 losses, but by optimizer\.tail 2 samples"):
        optimizer.step(closure)
    optimizer.tail = torch.tensor([False, True, False, False, False, False])
    optimizer.step(closure)
    assert optimizer.tail is None
    with pytest.raises(SpecError, match="before each step"):
        optimizer.step(closure)


@pytest.mark.parametrize("whole", [True, False])
def test_imbsam_statistics(whole: bool) -> None:
    """Of the whole batch at clean weights; where parts are run, of the head, which mostly is most of it."""
    stream = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=stream), torch.randn(8, 2, generator=stream)
    norm = nn.BatchNorm1d(3, momentum=1.0)
    net = nn.Sequential(norm, nn.Linear(3, 2))
    optimizer = ImbSAM(net.named_parameters(), model=net, whole=whole, lr=0.1)
    optimizer.tail = torch.arange(8) < 3

    def closure(p):
        optimizer.zero_grad()
        loss = p.mean((net(x[p.samples]) - y[p.samples]).square().sum(dim=1))
        loss.backward()
        return loss

    optimizer.step(closure)
    seen = x if whole else x[3:]
    torch.testing.assert_close(norm.running_mean, seen.mean(dim=0))
    torch.testing.assert_close(norm.running_var, seen.var(dim=0))
    assert int(norm.num_batches_tracked) == 1


def test_imbsam_whole_batches_normalise_as_one() -> None:
    """The official loop runs the whole batch: batch statistics must not depend on the split."""
    stream = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, generator=stream), torch.randn(8, 2, generator=stream)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    tail = torch.arange(8) < 1  # alone it has no variance
    optimizer = ImbSAM(net.named_parameters(), rho=0.1, lr=0.0)
    optimizer.tail = tail
    losses = (net(x) - y).square().sum(dim=1)
    params = list(net.parameters())
    head = torch.autograd.grad(losses[~tail].sum() / 8, params, retain_graph=True)
    g = torch.autograd.grad(2 * losses[tail].sum() / 8, params)
    norm = torch.cat([each.reshape(-1) for each in g]).norm()
    with torch.no_grad():
        for param, each in zip(params, g, strict=True):
            param += 0.1 * each / norm
    moved = torch.autograd.grad(2 * (net(x) - y).square().sum(dim=1)[tail].sum() / 8, params)
    with torch.no_grad():
        for param, each in zip(params, g, strict=True):
            param -= 0.1 * each / norm

    def closure(p):
        optimizer.zero_grad()
        loss = p.mean((net(x[p.samples]) - y[p.samples]).square().sum(dim=1))
        loss.backward()
        return loss

    optimizer.step(closure)
    for param, one, other in zip(params, head, moved, strict=True):
        torch.testing.assert_close(param.grad, one + other, rtol=1e-4, atol=1e-5)


# -- Functional-SAM --------------------------------------------------------------------------------------------------


def test_functional_sam_of_a_linear_model_is_the_base() -> None:
    """Outputs linear in the weights have the same Jacobian everywhere: the perturbation changes nothing."""
    stream = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, generator=stream), torch.randint(4, (6,), generator=stream)
    net = nn.Linear(3, 4)
    optimizer = FunctionalSAM(net.named_parameters(), rho=5.0, lr=0.0)

    def closure(p):
        optimizer.zero_grad()
        outputs = net(x[p.samples])
        loss = p.mean(nn.functional.cross_entropy(outputs, y, reduction="none"), outputs)
        loss.backward()
        return loss

    optimizer.step(closure)
    got = net.weight.grad.clone()
    net.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    torch.testing.assert_close(got, net.weight.grad)
    assert optimizer.diagnostics.surrogate_gap > 0.1  # of the loss, not of what backward was called on


def test_functional_sam_over_micro_batches() -> None:
    weights = []
    for parts in ([slice(None)], [slice(0, 2), slice(2, 6)]):
        problem = Problem(0)
        optimizer = FunctionalSAM(problem.net.named_parameters(), rho=0.5, lr=0.1)
        for step in range(3):
            x, y = problem.x[step], problem.y[step]
            for p in optimizer.passes():
                for part in parts:
                    outputs = problem.net(x[part])
                    losses = (outputs - y[part]).square().sum(dim=1)
                    (p.mean(losses, outputs) * len(losses) / 6).backward()
            optimizer.step()
        weights.append(flat(problem.net))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-12)


def test_functional_sam_says_what_it_needs() -> None:
    problem = Problem(0)
    optimizer = FunctionalSAM(problem.net.named_parameters())
    x = problem.x[0]
    with pytest.raises(ValueError, match=r"p\.mean\(losses, outputs\)"):
        optimizer.step(lambda p: p.mean(problem.net(x).square().sum(dim=1)))

    def closure(p):
        outputs = problem.net(x[p.number :])
        loss = p.mean(outputs.square().sum(dim=1), outputs)
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"shape \(4, 2\), but at the clean weights they had \(5, 2\)"):
        optimizer.step(closure)


def test_functional_sam_lends_its_descent() -> None:
    problem = Problem(0)
    optimizer = Composed(problem.net.named_parameters(), ascent="asam", descent="functional_sam", lr=0.1)
    assert optimizer.closure_takes_pass
    before = flat(problem.net)
    for step in range(2):
        optimizer.step(problem.closure(optimizer, step))
    assert not flat(problem.net).equal(before)


def test_functional_sam_in_half_precision_outputs() -> None:
    """Slopes are of the sum of losses: those of the mean would be lost below 6e-8."""
    net = nn.Linear(2, 2).to(torch.float16)
    net.weight.data.fill_(0.5)
    x = torch.ones(4096, 2, dtype=torch.float16)
    optimizer = FunctionalSAM(net.parameters(), rho=0.0, lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    for p in optimizer.passes(scaler):
        outputs = net(x)
        scaler.scale(p.mean(1e-4 * outputs.float().sum(dim=1), outputs)).backward()
    assert net.weight.grad.float().div(scaler.get_scale()).mean() == pytest.approx(1e-4, rel=2e-2)


# -- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["esam", "imbsam", "functional_sam"])
def test_subtracting_comes_back_to_rounding(key: str) -> None:
    weights = []
    for restore in ("copy", "subtract"):
        rig = Rig(OPTIMIZERS[key], {**OPTIMIZERS[key].demos[0], "restore": restore})
        rig.train(6)
        weights.append(torch.cat([w.reshape(-1) for w in rig.weights()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-12)


@pytest.mark.parametrize("key", ["esam", "imbsam", "functional_sam"])
def test_launches_do_not_grow_with_the_number_of_tensors(key: str) -> None:
    counts = []
    for number in (2, 30):
        params = [nn.Parameter(torch.ones(2, 2)) for _ in range(number)]
        more = {"gamma": 1.0, "adaptive": True} if key == "esam" else {}
        optimizer = create(key, params, **more)
        optimizer.steps = 1  # ESAM's first step has all tensors
        for _ in range(2):
            optimizer.tail = torch.tensor([False, True])
            with Count() as count:
                for k, _ in enumerate(optimizer.passes()):
                    for n, p in enumerate(params):
                        p.grad = NUMBERS[k + n]
            optimizer.step()
        counts.append(count.calls)
    assert counts[0] == counts[1]


NUMBERS = [torch.full((2, 2), 1.0 + n) for n in range(40)]


@pytest.mark.parametrize("key", ["esam", "imbsam", "functional_sam"])
def test_closures_are_told_of_the_pass(key: str) -> None:
    assert create(key, [nn.Parameter(torch.ones(2))]).closure_takes_pass

"""RWP and bSAM: what is drawn at random, and drawn again."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.optim import BSAM, OPTIMIZERS, RWP, Composed, create
from steppe.optim.sharpness.bsam import PrecisionMomentum
from steppe.optim.sharpness.composition import Parts
from steppe.optim.sharpness.noise import times_normal
from steppe.optim.sharpness.rwp import FilterNoise, MixedDescent, NoiseScale
from steppe.testing import Rig, check_optimizer

from . import oracles, oracles_noise
from .test_golden import GOLDEN, close, flat, network
from .test_oracles import BASES
from .test_sharpness import Count


def given_numbers(scales: Tensor, bucket, numbers: Tensor) -> Tensor:
    """scales ⊙ the part of `numbers`, one per weight in the order of parameters, that belongs to a bucket."""
    parts = numbers.split([param.numel() for param in bucket.group["params"]])
    return scales.mul_(torch.cat([parts[index] for index in bucket.indices]))


class GivenNoise(FilterNoise):
    def spread(self, scales, bucket):
        return given_numbers(scales, bucket, self.optimizer.numbers_of_step[self.optimizer.steps])


class GivenRWP(RWP):
    """The random numbers of each step are given: ``[steps, weights]``."""

    parts = Parts(ascent=GivenNoise, radius=NoiseScale, descent=MixedDescent)
    numbers_of_step: Tensor


class GivenBSAM(BSAM):
    """The random numbers of each step and part are given: ``[steps, parts, weights]``."""

    numbers_of_step: Tensor

    def spread(self, scales, bucket, part):
        return given_numbers(scales, bucket, self.numbers_of_step[self.steps][part])


class Problem:
    """A small network, four batches of six samples, random numbers, and gradients at flat weights for oracles."""

    def __init__(self, seed: int) -> None:
        stream = torch.Generator().manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.x = torch.randn(4, 6, 3, generator=stream, dtype=torch.float64)
        self.y = torch.randn(4, 6, 2, generator=stream, dtype=torch.float64)
        start = torch.randn(32, generator=stream, dtype=torch.float64)
        nn.utils.vector_to_parameters(start, self.net.parameters())
        self.z = torch.randn(12, 3, 32, generator=stream, dtype=torch.float64)
        self.start = start.numpy().copy()
        self.shapes = [tuple(param.shape) for param in self.net.parameters()]

    def gradient(self, step: int, samples: slice = slice(None)):
        names = [name for name, _ in self.net.named_parameters()]

        def gradient(w):
            whole = torch.from_numpy(w).requires_grad_()
            pieces = whole.split([math.prod(shape) for shape in self.shapes])
            weights = {n: p.view(s) for n, p, s in zip(names, pieces, self.shapes, strict=True)}
            got = torch.func.functional_call(self.net, weights, self.x[step % 4][samples])
            loss = (got - self.y[step % 4][samples]).square().sum(dim=1).mean()
            return torch.autograd.grad(loss, whole)[0].numpy()

        return gradient

    def closure(self, optimizer, step: int, seen: list[Tensor] | None = None):
        x, y = self.x[step % 4], self.y[step % 4]

        def closure(p=None):
            optimizer.zero_grad()
            if seen is not None:
                seen.append(flat(self.net))
            samples = slice(None) if p is None else p.samples
            losses = (self.net(x[samples]) - y[samples]).square().sum(dim=1)
            loss = losses.mean() if p is None else p.mean(losses)
            loss.backward()
            return loss

        return closure


# -- golden ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="no shared/golden beside the repository")
@pytest.mark.parametrize("restore", ["copy", "subtract"])
@pytest.mark.parametrize("name", ["rwp-mixed_sgd", "bsam_own"])
def test_trajectory(name: str, restore: str) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    hyper, expected = golden["hyperparameters"], golden["trajectory"]
    net = network(golden["problem"], expected["weights"][0])
    x = torch.tensor(golden["problem"]["inputs"], dtype=torch.float64)
    y = torch.tensor(golden["problem"]["targets"], dtype=torch.float64)
    if name == "bsam_own":
        optimizer = GivenBSAM(
            net.named_parameters(),
            data_size=hyper["Ndata"],
            lr=hyper["learningrate"],
            betas=(hyper["beta1"], hyper["beta2"]),
            weight_decay=hyper["wdecay"],
            restore=restore,
            **{key: hyper[key] for key in ("rho", "damping", "s_init")},
        )
        optimizer.numbers_of_step = torch.zeros(20, 1, 49, dtype=torch.float64)
    else:
        own = {key: hyper[key] for key in ("gamma", "alpha")}
        optimizer = GivenRWP(net.named_parameters(), restore=restore, **own, **golden["base"]["kwargs"])
        optimizer.numbers_of_step = torch.tensor(hyper["z"], dtype=torch.float64)
    seen: list[Tensor] = []

    def closure():
        optimizer.zero_grad()
        seen.append(flat(net))
        loss = (net(x).squeeze(-1) - y).square().mean()
        loss.backward()
        return loss

    for t in range(golden["steps"]):
        seen.clear()
        loss = optimizer.step(closure)
        assert abs(loss.item() - expected["loss"][t]) < 1e-10
        assert len(seen) == 2
        if "eval_weights" in expected:
            for got, want in zip(seen, expected["eval_weights"][t], strict=True):
                close(got, want)
        close(flat(net), expected["weights"][t + 1])


# -- oracles ---------------------------------------------------------------------------------------------------------

RWP_VARIANTS = {
    "mixed": {"gamma": 0.3, "alpha": 0.5},
    "mostly-clean": {"gamma": 0.3, "alpha": 0.2},
    "alone": {"gamma": 0.3, "alpha": 1.0},
    "halves": {"gamma": 0.3, "alpha": 0.6, "halves": True},
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("restore", ["copy", "subtract"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("variant", RWP_VARIANTS)
def test_rwp_agrees_with_the_oracle(variant: str, base: str, restore: str, seed: int) -> None:
    problem, hyper = Problem(seed), RWP_VARIANTS[variant]
    base_key, base_hyper = BASES[base]
    optimizer = GivenRWP(
        problem.net.named_parameters(), base=base_key, restore=restore, **hyper, **base_hyper
    )
    optimizer.numbers_of_step = problem.z[:, 0]
    halves = (slice(0, None, 2), slice(1, None, 2)) if "halves" in hyper else (slice(None), slice(None))
    w, memory = problem.start, {}
    for step in range(12):
        gradients = [problem.gradient(step, samples) for samples in halves]
        own = {"gamma": hyper["gamma"], "alpha": hyper["alpha"], "shapes": problem.shapes}
        handed = oracles_noise.rwp(w, problem.z[step, 0].numpy(), *gradients, **own)
        w = getattr(oracles, base_key)(memory, w, handed, **base_hyper)
        seen: list[Tensor] = []
        optimizer.step(problem.closure(optimizer, step, seen))
        np.testing.assert_allclose(flat(problem.net), w, rtol=0, atol=1e-10, err_msg=f"after step {step}")
        assert len(seen) == (1 if hyper["alpha"] == 1 else 2)


BSAM_VARIANTS = {
    "plain": {"rho": 0.05, "data_size": 100},
    "decay": {"rho": 0.01, "data_size": 50, "weight_decay": 0.3, "betas": (0.8, 0.9), "s_init": 0.5},
    "damped": {"rho": 0.1, "data_size": 20, "damping": 1.0, "betas": (0.0, 0.99)},
    "parts": {"rho": 0.05, "data_size": 100, "batch_split": 3},
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("restore", ["copy", "subtract"])
@pytest.mark.parametrize("variant", BSAM_VARIANTS)
def test_bsam_agrees_with_the_oracle(variant: str, restore: str, seed: int) -> None:
    problem, hyper = Problem(seed), {"lr": 0.05, **BSAM_VARIANTS[variant]}
    optimizer = GivenBSAM(problem.net.named_parameters(), restore=restore, **hyper)
    optimizer.numbers_of_step = problem.z
    parts = hyper.pop("batch_split", 1)
    whole = {"betas": (0.9, 0.999), "weight_decay": 10 / hyper["data_size"], "damping": 0.1, "s_init": 1.0}
    w, memory = problem.start, {}
    for step in range(12):
        gradients = [problem.gradient(step, slice(part, None, parts)) for part in range(parts)]
        zs = list(problem.z[step, :parts].numpy())
        w = oracles_noise.bsam(memory, w, gradients, zs, **{**whole, **hyper})
        optimizer.step(problem.closure(optimizer, step))
        np.testing.assert_allclose(flat(problem.net), w, rtol=0, atol=1e-10, err_msg=f"after step {step}")
    held = [optimizer.state[param] for param in problem.net.parameters()]
    assert all(set(state) == {"m", "s"} for state in held)
    for name in ("m", "s"):
        got = torch.cat([state[name].reshape(-1) for state in held])
        np.testing.assert_allclose(got, memory[name], rtol=0, atol=1e-10)


# -- what is drawn ---------------------------------------------------------------------------------------------------


def noise_of(optimizer) -> list[Tensor]:
    """The perturbation in a step of one pass, per parameter."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    for _ in optimizer.passes():
        return [param.detach() - old for param, old in zip(params, before, strict=True)]
    raise AssertionError


def test_rwp_noise_has_the_size_of_its_row() -> None:
    stream = torch.Generator().manual_seed(0)
    rows = torch.tensor([0.1, 1.0, 5.0]).view(3, 1, 1)
    wide = nn.Parameter(rows * torch.randn(3, 100, 200, generator=stream))
    same = nn.Parameter(torch.ones(2, 20000))
    flat_ = nn.Parameter(torch.full((20000,), 2.0))
    number = nn.Parameter(torch.tensor(3.0))
    optimizer = RWP([wide, same, flat_, number], gamma=0.2, alpha=1.0)
    noise = noise_of(optimizer)
    for row, values in zip(wide.detach(), noise[0], strict=True):
        assert values.std().item() == pytest.approx(0.2 * row.norm().item(), rel=0.02)
    assert noise[1].std(dim=1).tolist() == pytest.approx([0.2 * 20000**0.5] * 2, rel=0.02)
    assert noise[2].std().item() == pytest.approx(0.2 * 2 * 20000**0.5, rel=0.02)
    assert 0 < abs(noise[3].item()) < 0.2 * 3 * 5
    together = torch.stack([noise[0].view(3, -1)[0] / wide[0].norm(), noise[1][0] / same[0].norm()])
    assert abs(torch.corrcoef(together)[0, 1].item()) < 0.03  # rows of one length, drawn together


def test_bsam_noise_has_variance_one_over_n_s() -> None:
    """The pitfall: a standard deviation of 1/(N s)."""
    param = nn.Parameter(torch.zeros(2, 40000))
    optimizer = BSAM([param], data_size=400, s_init=4.0)
    assert noise_of(optimizer)[0].std().item() == pytest.approx(1 / math.sqrt(400 * 4), rel=0.02)
    param.grad = torch.ones_like(param)
    optimizer.base.step()
    optimizer.state[param]["s"][0], optimizer.state[param]["s"][1] = 1.0, 100.0
    assert noise_of(optimizer)[0].std(dim=1).tolist() == pytest.approx([1 / 20, 1 / 200], rel=0.02)


@pytest.mark.parametrize("key", ["rwp", "bsam"])
def test_noise_is_a_function_of_seed_and_step(key: str) -> None:
    own = {"alpha": 1.0} if key == "rwp" else {"data_size": 10}

    def drawn(seed: int, steps: int) -> Tensor:
        optimizer = create(
            key, [nn.Parameter(torch.ones(50, 2)), nn.Parameter(torch.ones(7))], seed=seed, **own
        )
        optimizer.steps = steps
        return torch.cat([each.reshape(-1) for each in noise_of(optimizer)])

    assert drawn(0, 3).equal(drawn(0, 3))
    for other in (drawn(1, 3), drawn(0, 4)):
        assert abs(torch.corrcoef(torch.stack([drawn(0, 3), other]))[0, 1].item()) < 0.4


def test_times_normal_is_normal_and_can_be_had_again() -> None:
    for dtype in (torch.float32, torch.complex64):
        one, other = (
            times_normal(torch.full((100001,), 3.0, dtype=dtype), torch.Generator().manual_seed(5))
            for _ in range(2)
        )
        assert one.equal(other)
        assert one.abs().square().mean().sqrt().item() == pytest.approx(3.0, rel=0.02)
    assert times_normal(torch.empty(0), torch.Generator()).shape == (0,)


@pytest.mark.parametrize("cls", [RWP, BSAM])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (1,), (4, 1), (2, 3, 2, 2)])
def test_every_shape_can_be_perturbed(cls: type, shape: tuple[int, ...]) -> None:
    params = [nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(5))]
    for more in ({"alpha": 1.0}, {"alpha": 0.5}) if cls is RWP else ({"data_size": 10},):
        optimizer = cls(params, lr=0.0, restore="subtract", **more)
        for _ in optimizer.passes():
            sum(param.square().sum() for param in params).backward()
        optimizer.step()
        for param in params:
            torch.testing.assert_close(param.detach(), torch.ones(param.shape))


def test_rwp_needs_no_gradient_to_perturb_and_leaves_unused_parameters() -> None:
    used, unused, frozen = (nn.Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = RWP([used, unused, frozen], alpha=1.0, gamma=0.5, lr=0.1, weight_decay=0.1)
    for p in optimizer.passes():
        assert p.perturbed
        assert not used.equal(torch.ones(3))
        assert frozen.equal(torch.ones(3))
        used.sum().backward()
    optimizer.step()
    assert unused.equal(torch.ones(3))
    torch.testing.assert_close(used.detach(), torch.full((3,), 1 - 0.1 * 1.1))


@pytest.mark.parametrize("cls", [RWP, BSAM])
def test_subtracting_holds_no_copy(cls: type) -> None:
    """Nothing of the size of the weights lives through the perturbed pass but what the docstring says."""
    param = nn.Parameter(torch.ones(1000, 1000))
    more = {"alpha": 1.0} if cls is RWP else {"data_size": 10}
    optimizer = cls([param], restore="subtract", **more)
    for _ in range(2):
        for p in optimizer.passes():
            held = [
                each
                for each in _tensors(optimizer._taken_away)
                if each.numel() >= param.numel() and each is not param
            ]
            assert len(held) == (
                1 if cls is BSAM and p.number == 2 else 0
            )  # the gradient at the noisy weights
            (param * 1e-3).square().sum().backward()
        optimizer.step()


def _tensors(taken_away) -> list[Tensor]:
    found: list[Tensor] = []
    for e in taken_away:
        for cell in e.direction._make.__closure__:
            value = cell.cell_contents
            for each in value.values() if isinstance(value, dict) else ():
                found += [each] if isinstance(each, Tensor) else each
    return found


@pytest.mark.parametrize("restore", ["copy", "subtract"])
@pytest.mark.parametrize("key", ["rwp", "rwp alone", "bsam"])
def test_launches_do_not_grow_with_the_number_of_tensors(key: str, restore: str) -> None:
    more = {"rwp": {}, "rwp alone": {"alpha": 1.0}, "bsam": {"data_size": 10}}[key]
    counts = []
    for number in (2, 30):
        params = [nn.Parameter(torch.ones(8, 8)) for _ in range(number)]
        optimizer = create(key.split()[0], params, restore=restore, **more)
        for _ in range(2):
            given = [[torch.full((8, 8), 1.0 + k + n) for n in range(number)] for k in range(2)]
            with Count() as count:
                for k, _ in enumerate(optimizer.passes()):
                    for p, gradient in zip(params, given[k], strict=True):
                        p.grad = gradient
            optimizer.step()
        counts.append(count.calls)
    assert counts[0] == counts[1]


# -- RWP -------------------------------------------------------------------------------------------------------------


def test_rwp_alone_conforms() -> None:
    spec = OPTIMIZERS["rwp"]
    check_optimizer(
        dataclasses.replace(
            spec,
            evals=1,
            demos=({"lr": 0.1, "alpha": 1.0}, {"base": "adamw", "lr": 0.05, "gamma": 0.1, "alpha": 1.0}),
        )
    )


def test_rwp_halves_need_two_samples() -> None:
    problem = Problem(0)
    problem.x, problem.y = problem.x[:, :1], problem.y[:, :1]
    optimizer = RWP(problem.net.named_parameters(), halves=True)
    before = flat(problem.net)
    with pytest.raises(ValueError, match="pass 2 has no samples: the batch is too small"):
        optimizer.step(problem.closure(optimizer, 0))
    assert flat(problem.net).equal(before)


def test_rwp_lends_its_parts() -> None:
    problem = Problem(0)
    optimizer = Composed(problem.net.named_parameters(), ascent="rwp", descent="gsam", lr=0.1)
    assert optimizer.param_groups[0]["gamma"] == 0.01
    optimizer.step(problem.closure(optimizer, 0))
    assert optimizer.diagnostics.perturbed
    halved = Composed(problem.net.named_parameters(), descent="rwp", halves=True, lr=0.1)
    assert halved.closure_takes_pass
    seen = []
    for p in halved.passes():
        seen.append(p.samples)
        problem.net(problem.x[0][p.samples]).sum().backward()
    assert seen == [slice(0, None, 2), slice(1, None, 2)]


# -- bSAM ------------------------------------------------------------------------------------------------------------


def test_bsam_in_parts_conforms() -> None:
    spec = OPTIMIZERS["bsam"]
    demos = ({"lr": 0.2, "data_size": 1000, "batch_split": 2},)
    check_optimizer(dataclasses.replace(spec, evals=4, demos=demos))


@pytest.mark.parametrize(
    ("hyper", "error", "message"),
    [
        ({}, TypeError, "data_size"),
        ({"data_size": 0}, SpecError, "data_size=0, but it must be a number >= 1"),
        ({"data_size": 10, "betas": (0.9, 1.0)}, SpecError, r"betas=\(0.9, 1.0\)"),
        (
            {"data_size": 10, "batch_split": 1.5},
            SpecError,
            "batch_split=1.5, but it must be a whole number >= 1",
        ),
        ({"data_size": 10, "s_init": 0.0}, SpecError, "s_init=0.0"),
        ({"data_size": 10, "momentum": 0.9}, SpecError, "unknown hyper-parameter of BSAM.*'momentum'"),
        ({"data_size": 10, "base": "sgd"}, SpecError, "BSAM has no base optimizer"),
    ],
)
def test_bsam_says_what_is_wrong(hyper: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        create("bsam", [nn.Parameter(torch.ones(2))], **hyper)


def test_bsam_default_decay_is_the_prior_of_the_official_runs() -> None:
    groups = [
        {"params": [nn.Parameter(torch.ones(2))]},
        {"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.5},
    ]
    optimizer = BSAM(groups, data_size=50000)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [10 / 50000, 0.5]


def test_bsam_momentum_decays_towards_zero_weights() -> None:
    """The pitfall: g · weight_decay in place of g + weight_decay · w."""
    param = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = BSAM([param], data_size=1e12, lr=1.0, betas=(0.0, 0.9), weight_decay=0.5, rho=0.0)
    for _ in optimizer.passes():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert param.item() == pytest.approx(2.0 - 0.5 * 2.0)
    assert optimizer.state[param]["s"].item() == pytest.approx(0.9 + 0.1 * (0.1 + 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bsam_keeps_float32_state_of_half_weights(dtype: torch.dtype) -> None:
    def trained(*steps: int) -> tuple[BSAM, nn.Parameter]:
        param = nn.Parameter(torch.linspace(-1, 1, 40).to(dtype))
        optimizer = BSAM([param], data_size=1000, lr=0.1)
        for number in steps:
            for _ in range(number):
                for _ in optimizer.passes():
                    param.grad = (param.detach() - 0.3) / 3
                optimizer.step()
            state, param = optimizer.state_dict(), nn.Parameter(param.detach().clone())
            optimizer = BSAM([param], data_size=1000, lr=0.1)
            optimizer.load_state_dict(state)
        return optimizer, param

    (once, straight), (twice, resumed) = trained(7), trained(4, 3)
    assert straight.dtype == dtype
    assert straight.equal(resumed)
    for name in ("m", "s"):
        assert once.state[straight][name].dtype == torch.float32
        assert once.state[straight][name].equal(twice.state[resumed][name])


def test_bsam_base_learns_precision_by_itself() -> None:
    param = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = PrecisionMomentum([param], lr=0.5, betas=(0.0, 0.9), damping=0.2, s_init=4.0)

    def closure() -> Tensor:
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 5.0
    assert param.tolist() == pytest.approx([1 - 0.5 * 2 / 4, -2 + 0.5 * 4 / 4])
    assert optimizer.state[param]["s"].tolist() == pytest.approx([3.6 + 0.1 * (2 * g + 0.2) for g in (2, 4)])


@pytest.mark.parametrize("key", ["rwp", "bsam"])
def test_subtracting_comes_back_to_rounding(key: str) -> None:
    weights = []
    for restore in ("copy", "subtract"):
        rig = Rig(OPTIMIZERS[key], {**OPTIMIZERS[key].demos[0], "restore": restore})
        rig.train(6)
        weights.append(torch.cat([w.reshape(-1) for w in rig.weights()]))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-12)

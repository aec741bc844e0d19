"""Loops as people write them: autocast, compiled models, clipping, accumulation, unusual bases and parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from steppe.optim import OPTIMIZERS, SAM, create
from steppe.optim.registry import optimizer_class
from steppe.optim.sharpness.modules import Module

FAMILY = [
    key for key, spec in OPTIMIZERS.items() if spec.family == "sharpness-aware" and "base" not in spec.xfail
]
PLAIN = [key for key in FAMILY if not optimizer_class(key).closure_takes_pass]
"""Those that need no more than the gradient of the batch."""


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    return model


X = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 2, generator=torch.Generator().manual_seed(2))


def loss_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    return (model(X.to(dtype)) - Y.to(dtype)).float().square().mean()


def demo(key: str) -> dict:
    return {**OPTIMIZERS[key].demos[0]}


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


# -- mixed precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", PLAIN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_scaler(key: str, dtype: torch.dtype) -> None:
    model = net()
    optimizer = create(key, model.named_parameters(), **demo(key))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)  # too large for float16: it has to come down
    first = loss_of(model).item()
    for _ in range(30):
        for p in optimizer.passes(scaler):
            with torch.autocast("cpu", dtype):
                loss = loss_of(model)
            p.loss = loss.detach()
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert loss_of(model).item() < first
    assert optimizer.skipped + optimizer.steps == 30
    assert (scaler.get_scale() < 2.0**20) == (optimizer.skipped > 0)
    assert optimizer.skipped == 20 - torch.tensor(scaler.get_scale()).log2()


def test_a_disabled_scaler_changes_nothing() -> None:
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", enabled=False)):
        model = net()
        optimizer = SAM(model.named_parameters(), lr=0.1)
        for _ in range(3):
            for _ in optimizer.passes(scaler):
                loss = loss_of(model)
                (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        results.append(weights(model))
    assert results[0].equal(results[1])


def test_a_scaler_that_passes_was_not_given_is_an_error() -> None:
    model = net()
    optimizer = SAM(model.named_parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for _ in optimizer.passes():
        scaler.scale(loss_of(model)).backward()
    with pytest.raises(RuntimeError, match=r"optimizer\.passes\(scaler\)"):
        scaler.step(optimizer)


@pytest.mark.parametrize("key", PLAIN)
@pytest.mark.filterwarnings("ignore:the weights' precision:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights(key: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    optimizer = create(key, model.named_parameters(), **demo(key))
    first = loss_of(model, dtype).item()
    for _ in range(10):
        for _ in optimizer.passes():
            loss_of(model, dtype).backward()
        optimizer.step()
    assert loss_of(model, dtype).item() < first
    assert all(p.dtype == dtype for p in model.parameters())


# -- around the passes ---------------------------------------------------------------------------------------------


def test_clipping_after_the_loop_clips_what_the_base_gets() -> None:
    model = net()
    before = weights(model)
    optimizer = SAM(model.named_parameters(), lr=1.0)
    for _ in optimizer.passes():
        (loss_of(model) * 100).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    assert float((weights(model) - before).norm()) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("key", PLAIN)
def test_a_compiled_model_trains_like_the_model(key: str) -> None:
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = nn.Sequential(net(), nn.BatchNorm1d(2))
        run = torch.compile(model, backend="eager") if compiled else model
        optimizer = create(key, model.named_parameters(), model=run, **demo(key))
        for _ in range(3):
            for _ in optimizer.passes():
                loss_of(run).backward()
            optimizer.step()
        results.append(weights(model))
        assert int(model[1].num_batches_tracked) == 3
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_running_statistics_are_those_of_the_clean_weights(kind: type, momentum: float | None) -> None:
    def build() -> nn.Sequential:
        norm = kind(8, momentum=momentum, track_running_stats=True) if kind is nn.BatchNorm1d else None
        return nn.Sequential(
            net()[0], norm or nn.InstanceNorm1d(8, momentum=momentum or 0.1, track_running_stats=True)
        )

    model, plain = build(), build()
    optimizer = create("gam", model.named_parameters(), model=model, lr=0.0)
    shape = (16, 8) if kind is nn.BatchNorm1d else (16, 8, 1)

    def loss(model: nn.Module) -> Tensor:
        hidden = model[0](X)
        return (
            model[1](hidden if kind is nn.BatchNorm1d else hidden.unsqueeze(-1).expand(-1, -1, 3))
            .square()
            .mean()
        )

    for _ in range(3):
        for _ in optimizer.passes():
            (loss(model) + 0 * torch.ones(shape).mean()).backward()
        optimizer.step()
        loss(plain)
    assert model[1].running_mean.equal(plain[1].running_mean)
    assert model[1].running_var.equal(plain[1].running_var)
    assert model[1].num_batches_tracked.equal(plain[1].num_batches_tracked)
    assert model[1].track_running_stats


def test_synchronised_statistics_are_frozen_too() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(3))
    seen = []
    module = Module("SAM", model, "every")
    for statistics in (True, False):
        with module.during(statistics=statistics, average=True):
            seen.append(model[0].track_running_stats)
    assert seen == [True, False]
    model.eval()  # in evaluation a layer that does not track would still use its statistics: nothing to freeze
    with module.during(statistics=False, average=True):
        assert model[0].track_running_stats


def test_an_exception_leaves_statistics_tracked() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = SAM(model.named_parameters(), lr=0.1, model=model)

    def fail() -> None:
        for p in optimizer.passes():
            if p.number == 2:
                raise KeyboardInterrupt
            model(X).square().mean().backward()

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert model[1].track_running_stats


# -- parameters and bases ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", PLAIN)
def test_frozen_parameters_stay(key: str) -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    optimizer = create(key, model.named_parameters(), **demo(key))
    for _ in range(3):
        for _ in optimizer.passes():
            assert model[0].weight.equal(before)
            loss_of(model).backward()
        optimizer.step()
    assert model[0].weight.equal(before)
    assert not model[2].weight.equal(net()[2].weight)


def test_muon_as_base() -> None:
    matrices = [p for p in net().parameters() if p.ndim == 2]
    optimizer = SAM(matrices, base=torch.optim.Muon, lr=0.01, weight_decay=0.0)
    before = [p.detach().clone() for p in matrices]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum((p.square() * (1 + p)).sum() for p in matrices)
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert not before[0].equal(matrices[0])


@pytest.mark.parametrize("key", ["sam", "gsam", "wsam", "looksam"])
def test_schedule_free_as_base(key: str) -> None:
    schedulefree = pytest.importorskip("schedulefree", reason="needs the package schedulefree")
    model = net()
    optimizer = create(key, model.parameters(), base=schedulefree.AdamWScheduleFree, lr=0.01)
    optimizer.train()
    first = loss_of(model).item()
    for _ in range(30):
        for _ in optimizer.passes():
            loss_of(model).backward()
        optimizer.step()
    training = weights(model)
    optimizer.eval()  # evaluates at the averaged weights
    assert not training.equal(weights(model))
    assert loss_of(model).item() < first
    optimizer.train()
    torch.testing.assert_close(weights(model), training)


def test_train_and_eval_are_there_only_with_a_base_that_has_them() -> None:
    optimizer = SAM(net().parameters(), lr=0.1)
    assert not hasattr(optimizer, "train")
    assert not hasattr(optimizer, "eval")


def test_soap_as_base() -> None:
    library = pytest.importorskip("pytorch_optimizer", reason="needs the package pytorch_optimizer")
    model = net()
    optimizer = create("gsam", model.parameters(), base=library.SOAP, lr=0.01)
    first = loss_of(model).item()
    for _ in range(20):
        for _ in optimizer.passes():
            loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < first


def test_a_hyper_parameter_that_the_base_has_too_is_apart() -> None:
    model = net()
    optimizer = create("gsam", model.parameters(), base=torch.optim.RMSprop, alpha=0.3, lr=0.01)
    (group,) = optimizer.param_groups
    assert (group["alpha"], group["sharpness_alpha"]) == (0.99, 0.3)  # RMSprop's smoothing, GSAM's gap
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert optimizer.param_groups[1]["sharpness_alpha"] == 0.3
    for _ in optimizer.passes():
        loss_of(model).backward()
    assert optimizer.hyper("alpha") == []
    optimizer.step()


class EditsGradients(SGD):
    """A base that leaves rubbish in .grad, as several do."""

    def step(self, closure: object = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.fill_(torch.nan)


@pytest.mark.parametrize("key", PLAIN)
def test_bases_may_edit_gradients(key: str) -> None:
    results = []
    for base in (SGD, EditsGradients):
        model = net()
        optimizer = create(
            key, model.named_parameters(), **{**demo(key), "base": base, "lr": 0.1, "momentum": 0.9}
        )
        for _ in range(4):
            for _ in optimizer.passes():
                loss_of(model).backward()
            optimizer.step()
        results.append(weights(model))
    assert results[0].equal(results[1])


# -- what it holds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", FAMILY)
def test_subtracting_instead_of_copying_agrees_to_rounding(key: str) -> None:
    from steppe.testing import Rig

    copied, subtracted = (Rig(OPTIMIZERS[key], {**demo(key), "restore": r}) for r in ("copy", "subtract"))
    copied.train(6)
    subtracted.train(6)
    for a, b in zip(copied.weights(), subtracted.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("key", FAMILY)
def test_swapping_instead_of_copying_has_the_same_bits(key: str) -> None:
    from steppe.testing import Rig
    from steppe.testing.rig import same

    copied, swapped = (Rig(OPTIMIZERS[key], {**demo(key), "restore": r}) for r in ("copy", "swap"))
    places = [p.data_ptr() for p in swapped.params.values()]
    copied.train(6)
    swapped.train(6)
    assert same(copied.weights(), swapped.weights())
    assert places == [p.data_ptr() for p in swapped.params.values()]


def test_swapped_weights_lie_elsewhere_only_in_perturbed_passes() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SAM([p], restore="swap", lr=0.0)
    seen, alias = [], p.detach()

    def closure() -> Tensor:
        seen.append((p.data_ptr() == alias.data_ptr(), p.equal(alias)))
        if len(seen) == 4:
            raise KeyboardInterrupt
        loss = p.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert seen == [(True, True), (False, False)] * 2
    assert p.data_ptr() == alias.data_ptr()
    assert p.equal(torch.ones(3))


def test_a_graph_from_before_a_swap_is_refused() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SAM([p], restore="swap", lr=0.1)
    for one in optimizer.passes():
        if one.number == 1:
            loss = p.square().sum()
            loss.backward(retain_graph=True)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            p.square().sum().backward()


def test_half_precision_is_copied_where_others_are_swapped() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = SAM([p], restore="swap", rho=1.0, lr=0.0)
    for one in optimizer.passes():
        assert p.equal(torch.ones_like(p)) == (one.number == 1)
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.equal(torch.ones_like(p))


def test_diagnostics_measure_what_is_applied() -> None:
    model = net(torch.float64)
    optimizer = SAM(model.named_parameters(), base=AdamW, rho=0.3, lr=1e-3)
    optimizer.diagnose = True
    points: list[Tensor] = []
    grads: list[Tensor] = []
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, torch.float64)
        loss.backward()
        points.append(weights(model))
        grads.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    told = optimizer.diagnostics
    assert (told.passes, told.perturbed) == (2, True)
    assert told.perturbation == pytest.approx(0.3)
    assert told.perturbation == pytest.approx(float((points[1] - points[0]).norm()))
    assert told.gradient_norm == pytest.approx(float(grads[0].norm()))
    assert told.cosine == pytest.approx(float(nn.functional.cosine_similarity(*grads, dim=0)))
    assert told.surrogate_gap == pytest.approx(losses[1] - losses[0])


def test_diagnostics_without_losses_or_measuring() -> None:
    model = net()
    optimizer = SAM(model.named_parameters(), rho=0.3, lr=1e-3)
    assert optimizer.diagnostics is None
    for _ in optimizer.passes():
        loss_of(model).backward()
    optimizer.step()
    told = optimizer.diagnostics
    assert told.perturbation == pytest.approx(0.3, rel=1e-5)  # known without measuring
    assert told.cosine != told.cosine
    assert told.surrogate_gap != told.surrogate_gap


def test_a_deep_copy_with_its_model_keeps_statistics_of_its_own() -> None:
    model = nn.Sequential(net(), nn.BatchNorm1d(2))
    optimizer = SAM(model.named_parameters(), lr=0.1, model=model)
    other_model, other = copy.deepcopy((model, optimizer))
    for _ in other.passes():
        loss_of(other_model).backward()
    other.step()
    assert int(model[1].num_batches_tracked) == 0
    assert int(other_model[1].num_batches_tracked) == 1


# -- what goes wrong silently elsewhere ----------------------------------------------------------------------------


def test_autocast_around_all_passes_sees_the_perturbed_weights() -> None:
    model = net()
    optimizer = SAM(model.named_parameters(), rho=5.0, lr=0.1)
    optimizer.diagnose = True
    with torch.autocast("cpu", torch.bfloat16):  # it keeps casts of weights from the first pass
        for p in optimizer.passes():
            loss = loss_of(model)
            p.loss = loss.detach()
            loss.backward()
    optimizer.step()
    assert optimizer.diagnostics.surrogate_gap > 0.1
    assert optimizer.diagnostics.cosine < 0.99


def test_step_after_a_loop_takes_the_closure_of_trainers_that_does_nothing() -> None:
    results = []
    for closure in (None, lambda: None):
        model = net()
        optimizer = SAM(model.named_parameters(), lr=0.1)
        for _ in range(2):
            for _ in optimizer.passes():
                loss_of(model).backward()
            optimizer.step(closure)
        results.append(weights(model))
    assert results[0].equal(results[1])
    for _ in optimizer.passes():
        loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"has taken this step's gradients"):
        optimizer.step(lambda: loss_of(model))


def test_gradients_accumulated_before_the_closure_are_told_of_once() -> None:
    model = net()
    optimizer = SAM(model.named_parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)  # what the step before left is no accumulation
    optimizer.zero_grad()
    loss_of(model).backward()
    with pytest.warns(RuntimeWarning, match="found gradients that backward had left"):
        optimizer.step(closure)
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step(closure)

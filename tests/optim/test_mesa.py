"""MESA against a slow oracle, the averaged model's handling, and resuming."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steppe.core.checkpoint import load_tree, save_tree
from steppe.core.errors import DataError, SpecError
from steppe.core.seeding import generator
from steppe.optim.sharpness.mesa import MESA

BATCH, CLASSES = 12, 3


def draw(*shape: int, name: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(0, "mesa", name), dtype=torch.float64)


def initialised(model: nn.Module, scale: float = 0.5) -> nn.Module:
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            p.copy_(scale * draw(*p.shape, name=number))
    return model


def network() -> nn.Module:
    """With batch normalisation and dropout, in float64."""
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, CLASSES)
    )
    return initialised(model.double())


def step(model: nn.Module, mesa: MESA, optimizer: torch.optim.Optimizer, number: int) -> float:
    """One step on a batch of its own, with dropout that depends on the number alone."""
    x, y = draw(BATCH, 4, name=100 + number), torch.arange(BATCH) % CLASSES
    with torch.random.fork_rng():
        torch.manual_seed(number)
        logits = model(x)
    loss = F.cross_entropy(logits, y) + mesa(logits, x)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    mesa.update()
    return loss.item()


def slow_loss(now, past, lmbda, temperature) -> float:
    total = 0.0
    for z, v in zip(now, past, strict=True):
        q, p = ([math.exp(a / temperature) for a in row] for row in (z, v))
        total += sum(
            a / sum(p) * (math.log(a / sum(p)) - math.log(b / sum(q))) for a, b in zip(p, q, strict=True)
        )
    return lmbda * temperature**2 * total / len(now)


# -- the value -----------------------------------------------------------------------------------------------------


def test_value_and_average_over_several_epochs():
    model = initialised(nn.Linear(4, CLASSES).double())
    mesa = MESA(model, decay=0.9, lmbda=0.6, temperature=2.0, start_epoch=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    weight, bias = (p.detach().numpy().copy() for p in model.parameters())
    for number in range(12):
        x = draw(BATCH, 4, name=100 + number)
        logits = model(x)
        loss = mesa(logits, x)
        want = slow_loss(logits.tolist(), x.numpy() @ weight.T + bias, 0.6, 2.0) if number >= 6 else 0
        assert loss.item() == pytest.approx(want, rel=1e-10)
        assert not number > 6 or want > 1e-4
        optimizer.zero_grad()
        (F.cross_entropy(logits, torch.arange(BATCH) % CLASSES) + loss).backward()
        optimizer.step()
        mesa.update()
        weight = 0.9 * weight + 0.1 * model.weight.detach().numpy()
        bias = 0.9 * bias + 0.1 * model.bias.detach().numpy()
        np.testing.assert_allclose(mesa.average.weight.numpy(), weight, rtol=1e-12)
        if number % 3 == 2:
            mesa.next_epoch()


def test_gradient_is_that_of_finite_differences():
    model = initialised(nn.Linear(4, CLASSES).double())
    mesa = MESA(model, start_epoch=0)
    mesa.next_epoch()
    x = draw(BATCH, 4, name=7)
    logits = draw(BATCH, CLASSES, name=8).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: mesa(z, x), logits)


def test_no_gradient_reaches_the_average():
    model = network()
    mesa = MESA(model, start_epoch=0)
    mesa.next_epoch()
    step(model, mesa, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    assert all(p.grad is None and not p.requires_grad for p in mesa.average.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_no_effect_and_no_forward_up_to_the_start_epoch():
    model = network()
    mesa = MESA(model, start_epoch=2)
    forwards = []
    mesa.average.register_forward_hook(lambda *_: forwards.append(mesa.epoch))
    x = draw(BATCH, 4)
    for epoch in range(5):
        logits = model(x)
        loss = mesa(logits, x)
        cross_entropy = F.cross_entropy(logits, torch.arange(BATCH) % CLASSES)
        assert torch.equal(cross_entropy + loss, cross_entropy) == (epoch <= 2)
        mesa.next_epoch()
    assert forwards == [3, 4]


def test_huge_logits_give_no_nan():
    model = initialised(nn.Linear(4, CLASSES), scale=1e6)
    mesa = MESA(model, start_epoch=0)
    mesa.next_epoch()
    x = draw(BATCH, 4).float()
    logits = (-1e3 * model(x).detach()).requires_grad_()
    loss = mesa(logits, x)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


# -- the averaged model --------------------------------------------------------------------------------------------


def test_average_is_in_eval_mode_and_buffers_are_averaged():
    model = network()
    mesa = MESA(model, decay=0.75)
    assert model.training
    assert not any(module.training for module in mesa.average.modules())
    mean = np.zeros(6)
    for number in range(4):
        step(model, mesa, torch.optim.SGD(model.parameters(), lr=0.1), number)
        mean = 0.75 * mean + 0.25 * model[1].running_mean.numpy()
        assert mesa.average[1].num_batches_tracked == model[1].num_batches_tracked == number + 1
    np.testing.assert_allclose(mesa.average[1].running_mean.numpy(), mean, rtol=1e-12)


def test_the_global_rng_is_not_touched_and_the_model_not_changed():
    model = network()
    mesa = MESA(model, start_epoch=0)
    mesa.next_epoch()
    x = draw(BATCH, 4)
    logits = model(x)
    before, rng = [t.clone() for t in model.state_dict().values()], torch.get_rng_state()
    mesa(logits, x)
    mesa.update()
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_averaged_in_float32(dtype):
    model = nn.Linear(4, CLASSES).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    mesa = MESA(model, decay=0.9998)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(2.0)
    for _ in range(2000):
        mesa.update()
    want = 2 - 0.9998**2000
    assert mesa.average.weight.dtype == dtype
    assert torch.allclose(mesa.average.weight.double(), torch.tensor(want).double(), rtol=2**-8)
    assert mesa.state_dict()["average"]["weight"].dtype == torch.float32


def test_tied_weights_are_averaged_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    model[1].weight = model[0].weight
    initialised(model)
    mesa = MESA(model, decay=0.5)
    old = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.mul_(3)
    mesa.update()
    assert mesa.average[1].weight is mesa.average[0].weight
    assert torch.allclose(mesa.average[0].weight, 2 * old)
    mesa.load_state_dict(mesa.state_dict())


def test_memory_is_one_copy():
    model = network()
    mesa = MESA(model)
    held = {t.data_ptr() for t in mesa.state_dict()["average"].values()}
    assert held == {t.data_ptr() for t in (*mesa.average.parameters(), *mesa.average.buffers())}


# -- training and resuming -----------------------------------------------------------------------------------------


def start() -> tuple[nn.Module, MESA, torch.optim.Optimizer]:
    model = network()
    return (
        model,
        MESA(model, decay=0.8, start_epoch=0),
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    )


def play(parts: tuple[nn.Module, MESA, torch.optim.Optimizer], first: int, last: int) -> list[float]:
    losses = []
    for number in range(first, last):
        losses.append(step(*parts, number))
        if number % 4 == 3:
            parts[1].next_epoch()
    return losses


@pytest.mark.parametrize("checkpoint", [0, 3, 6, 8])
def test_resume_to_the_same_bits(tmp_path, checkpoint):
    whole = start()
    losses = play(whole, 0, 14)
    killed = start()
    play(killed, 0, checkpoint)
    save_tree(tmp_path / "state", [part.state_dict() for part in killed])
    resumed = start()
    for part, state in zip(resumed, load_tree(tmp_path / "state"), strict=True):
        part.load_state_dict(state)
    assert play(resumed, checkpoint, 14) == losses[checkpoint:]
    for a, b in zip(whole[:2], resumed[:2], strict=True):
        a, b = ((m.average if isinstance(m, MESA) else m).state_dict() for m in (a, b))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_half_precision_resumes_from_the_float32_average():
    one, two = (MESA(initialised(nn.Linear(4, CLASSES)).bfloat16(), decay=0.99) for _ in range(2))
    with torch.no_grad():
        one.model.weight.add_(1)
        two.model.weight.add_(1)
    for _ in range(3):
        one.update()
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.average.weight, one.average.weight)
    for _ in range(20):
        one.update()
        two.update()
    assert torch.equal(two.average.weight, one.average.weight)


def test_training_descends_at_one_extra_forward_per_step():
    model = initialised(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double())
    mesa = MESA(model, decay=0.9, start_epoch=1)
    y = torch.arange(48) % 3
    x = F.one_hot(y, 3) + 0.4 * draw(48, 3)
    forwards, extra, losses = [0], [0], []
    model.register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    mesa.average.register_forward_hook(lambda *_: extra.__setitem__(0, extra[0] + 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(6):
        for index in torch.randperm(48, generator=generator(0, "batches", epoch)).split(12):
            logits = model(x[index])
            loss = F.cross_entropy(logits, y[index]) + mesa(logits, x[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mesa.update()
            losses.append(loss.item())
        mesa.next_epoch()
    assert forwards == [24]
    assert extra == [16]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.1}, r"decay=1.1, but it must be a number in \[0, 1\]"),
        ({"lmbda": -1}, "lmbda=-1"),
        ({"lmbda": math.inf}, "lmbda=inf"),
        ({"temperature": 0}, "temperature=0"),
        ({"start_epoch": -1}, "start_epoch=-1"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(SpecError, match=message):
        MESA(nn.Linear(2, 2), **options)


def test_bad_batches():
    mesa = MESA(nn.Linear(4, CLASSES).double(), start_epoch=0)
    x = draw(BATCH, 4)
    with pytest.raises(DataError, match=r"MESA: .* expected floating point \[batch, classes >= 2\]"):
        mesa(torch.zeros(BATCH, 1), x)  # a regression
    mesa.next_epoch()
    with pytest.raises(DataError, match=r"gives \[12, 3\] for these inputs, the logits are \[6, 3\]"):
        mesa(torch.zeros(6, CLASSES), x)
    bad = torch.zeros(BATCH, CLASSES, dtype=torch.float64)
    bad[0, 0] = math.nan
    assert math.isnan(mesa(bad, x))
    with torch.no_grad():
        mesa.average.weight[0, 0] = math.nan
    assert math.isnan(mesa(torch.zeros(BATCH, CLASSES), x))


def test_models_that_return_something_else():
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    mesa = MESA(Pair(4, CLASSES).double(), start_epoch=0)
    mesa.next_epoch()
    with pytest.raises(DataError, match="gives tuple for these inputs"):
        mesa(torch.zeros(BATCH, CLASSES), draw(BATCH, 4))


def test_states_of_other_models_are_refused():
    mesa = MESA(nn.Linear(4, CLASSES))
    kept = mesa.average.weight.clone()
    with pytest.raises(SpecError, match=r"weight is \[3, 5\] in the state, \[3, 4\] in the model"):
        mesa.load_state_dict(MESA(nn.Linear(5, CLASSES)).state_dict())
    with pytest.raises(SpecError, match=r"bias is absent in the state, \[3\] in the model"):
        mesa.load_state_dict(MESA(nn.Linear(4, CLASSES, bias=False)).state_dict())
    assert torch.equal(mesa.average.weight, kept)

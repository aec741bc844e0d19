"""SAF against a slow oracle, its bank's edges, and resuming after a kill."""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from steppe.core.checkpoint import load_tree, save_tree
from steppe.core.errors import DataError, SpecError
from steppe.core.seeding import generator
from steppe.optim import SAM
from steppe.optim.sharpness.saf import SAF
from steppe.optim.sharpness.trajectory_loss import trajectory_kl

SAMPLES, CLASSES = 10, 4


def softmax(z: list[float], temperature: float) -> list[float]:
    exponentials = [math.exp((value - max(z)) / temperature) for value in z]
    return [value / sum(exponentials) for value in exponentials]


def slow_loss(now, past, *, lmbda=0.3, temperature=5.0) -> float:
    """lmbda T² / |B| Σ_i KL(softmax(past_i / T) ‖ softmax(now_i / T)); a past of None adds nothing."""
    total = 0.0
    for z, reference in zip(now, past, strict=True):
        if reference is not None:
            p, q = softmax(list(reference), temperature), softmax(list(z), temperature)
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)
    return lmbda * temperature**2 * total / len(now)


def random_logits(*names: int, rows: int = SAMPLES, classes: int = CLASSES) -> Tensor:
    drawn = torch.randn(rows, classes, generator=generator(0, "logits", *names), dtype=torch.float64)
    return (3 * drawn).requires_grad_()


def bank(tmp_path, where: str, **options) -> SAF:
    if where == "disk":
        options |= {"path": tmp_path / "bank", "memory_limit": 0}
    return SAF(SAMPLES, CLASSES, **{"epochs_back": 2, "start_epoch": 0, **options})


everywhere = pytest.mark.parametrize("where", ["memory", "disk"])


# -- the value -----------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_value_over_shuffled_epochs_with_dropped_samples(tmp_path, where, dtype, tolerance):
    saf = bank(tmp_path, where, dtype=dtype, start_epoch=3, epochs_back=3, lmbda=0.7, temperature=2.0)
    seen: dict[tuple[int, int], np.ndarray] = {}
    compared = 0
    for epoch in range(9):  # twice around the ring of four
        order = torch.randperm(SAMPLES, generator=generator(0, "order", epoch))[: SAMPLES - epoch % 3]
        for batch, index in enumerate(order.split(3)):
            logits = random_logits(epoch, batch, rows=len(index))
            z = logits.detach().numpy()
            past = [seen.get((epoch - 3, int(i))) for i in index] if epoch > 3 else [None] * len(index)
            loss = saf(logits, index)
            want = slow_loss(z, past, lmbda=0.7, temperature=2.0)
            assert loss.item() == pytest.approx(want, rel=tolerance, abs=tolerance / 10)
            compared += sum(p is not None for p in past)
            seen |= {(epoch, int(i)): row for i, row in zip(index, z, strict=True)}
        saf.next_epoch()
    assert compared > 35


@settings(max_examples=60)
@given(
    epochs_back=st.integers(1, 4),
    start_epoch=st.integers(0, 3),
    epochs=st.lists(st.lists(st.lists(st.integers(0, 5), max_size=5), max_size=4), max_size=8),
)
def test_the_first_evaluation_in_an_epoch_is_what_is_read_later(epochs_back, start_epoch, epochs):
    saf = SAF(6, 3, epochs_back=epochs_back, start_epoch=start_epoch)
    first: dict[tuple[int, int], np.ndarray] = {}
    for epoch, batches in enumerate(epochs):
        for number, batch in enumerate(batches):
            logits = random_logits(epoch, number, rows=len(batch), classes=3)
            active = epoch > start_epoch
            past = [first.get((epoch - epochs_back, i)) if active else None for i in batch]
            loss = saf(logits, torch.tensor(batch, dtype=torch.int64))
            want = slow_loss(logits.detach().numpy(), past) if batch else 0.0
            assert loss.item() == pytest.approx(want, rel=1e-5, abs=1e-6)
            for i, row in zip(batch, logits.detach().numpy(), strict=True):
                first.setdefault((epoch, i), row)
        saf.next_epoch()


def after_one_epoch(dtype: torch.dtype = torch.float32, logits: Tensor | None = None) -> SAF:
    saf = SAF(SAMPLES, CLASSES, epochs_back=1, start_epoch=0, dtype=dtype)
    saf(random_logits(0) if logits is None else logits, torch.arange(SAMPLES))
    saf.next_epoch()
    return saf


def test_gradient_is_that_of_finite_differences_and_the_softmax_formula():
    saf, index = after_one_epoch(), torch.tensor([3, 1, 8])
    logits = random_logits(1, rows=3)
    assert torch.autograd.gradcheck(lambda z: saf(z, index), logits)
    loss = saf(logits, index)
    loss.backward()
    p = F.softmax(random_logits(0)[index] / 5, 1)
    assert torch.allclose(logits.grad, 0.3 * 5 / 3 * (F.softmax(logits / 5, 1) - p).detach(), atol=1e-6)


def test_no_effect_up_to_the_start_epoch_but_logits_are_kept():
    saf = SAF(SAMPLES, CLASSES, start_epoch=2, epochs_back=1)
    losses = []
    for epoch in range(4):
        logits = random_logits(epoch)
        loss = saf(logits, torch.arange(SAMPLES))
        losses.append(loss.item())
        assert loss.requires_grad == (epoch > 2)
        cross_entropy = F.cross_entropy(logits, torch.zeros(SAMPLES, dtype=torch.int64))
        assert torch.equal(cross_entropy + loss, cross_entropy) == (epoch <= 2)
        saf.next_epoch()
    assert losses[:3] == [0, 0, 0]
    assert losses[3] > 0


# -- what is remembered --------------------------------------------------------------------------------------------


def test_no_gradient_reaches_the_bank():
    weight = torch.ones(1, requires_grad=True)
    saf, index = SAF(SAMPLES, CLASSES, epochs_back=1, start_epoch=0), torch.arange(SAMPLES)
    saf(weight * random_logits(0).detach(), index)
    saf.next_epoch()
    saf(random_logits(1), index).backward()
    assert weight.grad is None
    assert not saf.state_dict()["logits"].requires_grad


def test_later_evaluations_of_an_epoch_and_those_without_gradient_are_not_remembered():
    saf, index = SAF(SAMPLES, CLASSES, epochs_back=1, start_epoch=0), torch.arange(SAMPLES)
    with torch.no_grad():
        saf(1 * random_logits(7), index)
    saf(random_logits(0), index)
    saf(random_logits(8), index)  # the perturbed pass
    saf.next_epoch()
    want = slow_loss(random_logits(1).tolist(), random_logits(0).tolist())
    for _ in range(2):
        assert saf(random_logits(1), index).item() == pytest.approx(want, rel=1e-5)


def test_rows_that_are_not_finite_are_not_remembered_and_the_loss_says_so():
    logits = random_logits(0).detach()
    logits[0, 1], logits[1, 2], logits[2, 3] = math.nan, math.inf, -math.inf
    saf = after_one_epoch(logits=logits.requires_grad_())
    want = slow_loss(random_logits(1)[2:].tolist(), [[*logits[2, :3].tolist(), -1e30], *logits[3:].tolist()])
    loss = saf(random_logits(1), torch.arange(SAMPLES))
    assert loss.item() == pytest.approx(want * 8 / 10, rel=1e-5)
    bad = random_logits(2).detach()
    bad[3, 0] = math.nan
    assert math.isnan(saf(bad, torch.arange(SAMPLES)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [1e3, 1e5, 1e36])
def test_huge_logits_give_no_nan(dtype, size):
    past = (random_logits(0).detach() * size).to(torch.float32).requires_grad_()
    saf = after_one_epoch(dtype, past)
    logits = (random_logits(1).detach() * size / 10).to(torch.float32).requires_grad_()
    loss = saf(logits, torch.arange(SAMPLES))
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 0
    assert torch.isfinite(logits.grad).all()


def test_underflowing_probabilities_and_half_logits():
    z, past = torch.tensor([[0.0, 1e6, -1e6]]), torch.tensor([[0.0, -1e6, 1e6]])
    assert float(trajectory_kl(z, past, 2.0)) == pytest.approx(4 * 1e6)
    assert float(trajectory_kl(z, z, 2.0)) == 0
    assert trajectory_kl(z.half().clamp(-60000, 60000), past, 2.0).dtype == torch.float32
    assert torch.isnan(trajectory_kl(z, torch.full_like(z, math.nan), 2.0)).all()


def test_a_masked_class_has_logit_minus_infinity():
    z = torch.tensor([[0.0, 1.0, -math.inf]], requires_grad=True)
    for past in (torch.tensor([[1.0, 0.0, -math.inf]]), torch.tensor([[1.0, 0.0, -65504.0]])):
        loss = trajectory_kl(z, past, 1.0)
        assert loss.item() == pytest.approx(slow_loss([[0.0, 1.0]], [[1.0, 0.0]], lmbda=1, temperature=1))
        assert torch.isfinite(torch.autograd.grad(loss.sum(), z)[0]).all()


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "index", "message"),
    [
        (torch.zeros(2, CLASSES), torch.tensor([0, SAMPLES]), r"index 10 is outside .* \(0 \.\.\. 9\)"),
        (torch.zeros(2, CLASSES), torch.tensor([-1, 0]), "index -1 is outside"),
        (torch.zeros(2, CLASSES), torch.tensor([0]), r"shape \[1\], expected integers \[2\]"),
        (torch.zeros(2, CLASSES), torch.tensor([0.0, 1.0]), "index is torch.float32"),
        (torch.zeros(2, CLASSES), torch.tensor([True, False]), "index is torch.bool"),
        (
            torch.zeros(2, CLASSES + 1),
            torch.tensor([0, 1]),
            r"shape \[2, 5\], expected floating point \[batch, 4\]",
        ),
        (torch.zeros(2), torch.tensor([0, 1]), r"shape \[2\], expected"),
        (torch.zeros(2, CLASSES, 3), torch.tensor([0, 1]), "flatten further dimensions"),
        (torch.zeros(2, CLASSES, dtype=torch.int64), torch.tensor([0, 1]), "logits are torch.int64"),
    ],
)
def test_bad_batches(logits, index, message):
    saf = SAF(SAMPLES, CLASSES)
    if logits.is_floating_point():
        logits.requires_grad_()
    with pytest.raises(DataError, match=message):
        saf(logits, index)
    assert not saf.state_dict()["written"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0, but it must be an integer >= 1"),
        ({"classes": 1}, "classes=1, but it must be an integer >= 2"),
        ({"lmbda": -1.0}, "lmbda=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"epochs_back": 0}, "epochs_back=0"),
        ({"start_epoch": 1.5}, "start_epoch=1.5"),
        ({"dtype": torch.bfloat16}, "dtype=torch.bfloat16"),
        ({"samples": 1000, "memory_limit": 63999}, "takes 64000 bytes, above memory_limit=63999.*path="),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(SpecError, match=message):
        SAF(**{"samples": SAMPLES, "classes": CLASSES, **options})


# -- the bank ------------------------------------------------------------------------------------------------------


def test_size_is_known_in_advance_and_decides_where_the_bank_is(tmp_path):
    size = 4 * SAMPLES * CLASSES * 4
    assert SAF(SAMPLES, CLASSES).nbytes == size
    assert SAF(SAMPLES, CLASSES, dtype=torch.float16).nbytes == size // 2
    assert f"{size} bytes in memory" in repr(SAF(SAMPLES, CLASSES, path=tmp_path, memory_limit=size))
    assert str(tmp_path) in repr(SAF(SAMPLES, CLASSES, path=tmp_path, memory_limit=size - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_have_their_size_from_the_start_and_are_a_ring(tmp_path, dtype):
    saf = bank(tmp_path, "disk", dtype=dtype)
    for epoch in range(7):
        saf(random_logits(epoch)[:1], torch.tensor([epoch]))
        files = sorted((tmp_path / "bank").iterdir())
        assert [file.name for file in files] == [
            f"logits-{e:06d}.npy" for e in range(max(0, epoch - 2), epoch + 1)
        ]
        for file in files:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
            assert array.nbytes == SAMPLES * CLASSES * dtype.itemsize == saf.nbytes // 3
            assert file.stat().st_size == array.nbytes + 128
            assert file.stat().st_blocks * 512 >= array.nbytes  # no hole that a full disk could not fill
        saf.next_epoch()


def test_a_full_disk_is_an_error_not_a_signal(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    saf = bank(tmp_path, "disk")
    with pytest.raises(DataError, match="no room for the 288 bytes"):
        saf(random_logits(0), torch.arange(SAMPLES))
    assert not list((tmp_path / "bank").iterdir())


# -- resuming ------------------------------------------------------------------------------------------------------


def play(saf: SAF, start: tuple[int, int], stop: tuple[int, int]) -> list[float]:
    """Call `saf` with the batches from `start` up to, and without, `stop`, both (epoch, batch); five per epoch."""
    losses = []
    for epoch in range(start[0], stop[0] + 1):
        order = torch.randperm(SAMPLES, generator=generator(1, "order", epoch))
        for batch, index in enumerate(order.split(2)):
            if start <= (epoch, batch) < stop:
                losses.append(saf(random_logits(epoch, batch, rows=2), index).item())
        if (epoch, 5) < stop:
            saf.next_epoch()
    return losses


END = (12, 5)


@everywhere
@pytest.mark.parametrize("checkpoint", [(0, 0), (4, 0), (4, 3), (4, 5)])
@pytest.mark.parametrize("crash", [0, 1, 4])
def test_resume_to_the_same_bits(tmp_path, where, checkpoint, crash):
    whole = play(bank(tmp_path / "whole", where), (0, 0), END)
    assert min(whole[5 * 3 :]) > 0
    saf = bank(tmp_path, where)
    head = play(saf, (0, 0), checkpoint)
    save_tree(tmp_path / "state", saf.state_dict())
    play(saf, checkpoint, (checkpoint[0] + crash, 4))  # further training, lost in the crash
    if where == "disk":  # the crash left rubbish in every row that the checkpoint does not claim
        written = load_tree(tmp_path / "state")["written"].numpy()
        for file in (tmp_path / "bank").iterdir():
            epoch = int(file.stem.removeprefix("logits-"))
            rows = written[epoch % 3] if epoch <= checkpoint[0] else np.zeros(SAMPLES, bool)
            np.load(file, mmap_mode="r+")[~rows] = np.nan
    resumed = bank(tmp_path, where)
    resumed.load_state_dict(load_tree(tmp_path / "state"))
    assert head + play(resumed, checkpoint, END) == whole


def test_every_checkpoint_can_be_resumed_until_the_next_is_written(tmp_path):
    whole = play(bank(tmp_path / "whole", "disk"), (0, 0), END)
    saf, done, head = bank(tmp_path, "disk"), (0, 0), []
    for checkpoint in [(1, 2), (3, 0), (8, 1), (9, 4)]:  # unevenly spaced
        head += play(saf, done, checkpoint)
        before = saf.state_dict() if checkpoint == (3, 0) else None
        save_tree(tmp_path / "state", saf.state_dict())
        done = checkpoint
        play(saf, done, END)  # lost
        saf = bank(tmp_path, "disk")
        saf.load_state_dict(before or load_tree(tmp_path / "state"))
    assert head + play(saf, done, END) == whole
    assert len(list((tmp_path / "bank").iterdir())) <= 2 * 3


def test_a_checkpoint_whose_files_are_gone_is_refused(tmp_path):
    saf = bank(tmp_path, "disk")
    play(saf, (0, 0), (3, 2))
    old = copy.deepcopy(saf.state_dict())
    play(saf, (3, 2), (9, 0))
    saf.state_dict()
    play(saf, (9, 0), (10, 0))
    new = bank(tmp_path, "disk")
    with pytest.raises(DataError, match="logits of epoch 1 cannot be read"):
        new.load_state_dict(old)
    assert new.epoch == 0


def test_states_of_other_banks_are_refused(tmp_path):
    saf = bank(tmp_path, "memory")
    play(saf, (0, 0), (3, 2))
    state = saf.state_dict()
    with pytest.raises(SpecError, match="bank in memory"):
        bank(tmp_path, "disk").load_state_dict(state)
    with pytest.raises(SpecError, match="float32"):
        bank(tmp_path, "memory", dtype=torch.float16).load_state_dict(state)
    with pytest.raises(SpecError, match=r"\(3, 10\)"):
        bank(tmp_path, "memory", epochs_back=3).load_state_dict(state)
    on_disk = bank(tmp_path, "disk")
    play(on_disk, (0, 0), (3, 2))
    with pytest.raises(SpecError, match="bank on disk"):
        bank(tmp_path, "memory").load_state_dict(on_disk.state_dict())
    with pytest.raises(DataError, match="expected float16"):
        bank(tmp_path, "disk", dtype=torch.float16).load_state_dict(on_disk.state_dict())


# -- training ------------------------------------------------------------------------------------------------------


def train(folder, stop=(9, 0), *, save_at=None, kill_at=None, make_saf=True):
    """Train a small network on three noisy blobs; go on from ``folder/checkpoint`` if it is there."""
    draw = generator(0, "blobs")
    y = torch.arange(48) % 3
    x = F.one_hot(y, 3) + 0.4 * torch.randn(48, 3, generator=draw)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=draw))
    passes = [0]
    model.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saf = SAF(48, 3, lmbda=1.0, start_epoch=3, path=folder / "bank", memory_limit=0) if make_saf else None
    start = (0, 0)
    if (folder / "checkpoint").exists():
        tree = load_tree(folder / "checkpoint")
        model.load_state_dict(tree["model"])
        optimizer.load_state_dict(tree["optimizer"])
        saf.load_state_dict(tree["saf"])
        start = tree["next"]
    losses = []
    for epoch in range(start[0], stop[0]):
        order = torch.randperm(48, generator=generator(0, "batches", epoch))
        for batch, index in enumerate(order.split(10)[:4]):  # the last, smaller batch is dropped
            if (epoch, batch) < start:
                continue
            if (epoch, batch) == save_at:
                tree = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "saf": saf.state_dict(),
                }
                save_tree(folder / "checkpoint", {**tree, "next": (epoch, batch)})
            if (epoch, batch) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

            def closure(index=index):
                optimizer.zero_grad()
                logits = model(x[index])
                loss = F.cross_entropy(logits, y[index])
                if saf is not None:
                    loss = loss + saf(logits, index)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
        if saf is not None:
            saf.next_epoch()
    return model, losses, passes[0]


def test_training_descends_at_one_pass_per_step_and_feels_the_loss(tmp_path):
    model, losses, passes = train(tmp_path)
    assert passes == len(losses) == 36
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    plain, plain_losses, plain_passes = train(tmp_path, make_saf=False)
    assert plain_passes == passes
    assert losses[:16] == plain_losses[:16]
    assert losses[16:] != plain_losses[16:]
    assert not torch.equal(model[0].weight, plain[0].weight)


def test_under_sam_the_clean_pass_is_remembered(tmp_path):
    saf = SAF(SAMPLES, 3, epochs_back=1, start_epoch=0)
    model = nn.Linear(2, 3).double()
    x, index = random_logits(0, classes=2).detach(), torch.arange(SAMPLES)
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1)
    past = None
    for _ in range(4):
        clean = model(x).tolist()
        for number, _ in enumerate(optimizer.passes()):
            logits = model(x)
            loss = saf(logits, index)
            if past is not None:
                assert loss.item() == pytest.approx(slow_loss(logits.tolist(), past), rel=1e-4, abs=1e-8)
            (F.cross_entropy(logits, index % 3) + loss).backward()
            assert (logits.tolist() == clean) == (number == 0)
        optimizer.step()
        saf.next_epoch()
        past = clean


def test_killed_and_resumed_training_ends_with_the_same_bits(tmp_path):
    whole, losses, _ = train(tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    options = {"save_at": (5, 2), "kill_at": (8, 3)}
    child = multiprocessing.get_context("spawn").Process(
        target=train, args=(tmp_path / "killed",), kwargs=options
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    resumed, tail, _ = train(tmp_path / "killed")
    assert losses[-len(tail) :] == tail
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)

"""What each of two ranks does, run by torchrun (gloo, CPU): ``ranks.py CASE`` fails with a message or is silent."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed as dist, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from steppe.core.checkpoint import load_tree, save_tree
from steppe.core.errors import SpecError
from steppe.optim import create

STEPS = 4
X = torch.randn(STEPS, 8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randn(STEPS, 8, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
MEMBERS: dict[str, dict[str, object]] = {
    "sam": {},
    "asam": {},
    "gsam": {},
    "gam": {},
    "friendly_sam": {},
    "vasso": {},
    "looksam": {"k": 2},
    "rst": {},
    "ae_sam": {"total_steps": STEPS},
    "msam": {},
    "wsam": {},
    "lookbehind": {},
    "cr_sam": {},
    "rwp": {},
}
"""What is tried over ranks, with a base of momentum."""


def network(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 5), nn.BatchNorm1d(5) if norm else nn.Identity(), nn.Tanh(), nn.Linear(5, 2)]
    return nn.Sequential(*layers).double()


def build(key: str, net: nn.Module, /, **more: object) -> torch.optim.Optimizer:
    return create(key, net.named_parameters(), base="sgd", lr=0.1, momentum=0.9, **MEMBERS[key], **more)


def loss(model: nn.Module, step: int, part: slice = slice(None)) -> Tensor:
    return (model(X[step, part]) - Y[step, part]).square().mean()


def mine() -> slice:
    return slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)


def train(optimizer, model: nn.Module, part: slice, steps: range = range(STEPS)) -> None:
    for step in steps:
        for _ in optimizer.passes():
            loss(model, step, part).backward()
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


def near(got: Tensor, want: Tensor, what: str) -> None:
    error = (got - want).abs().max().item()
    assert error < 1e-10, f"{what}: off by {error:.3g}"


def alike(model: nn.Module, what: str) -> None:
    """All ranks hold the same bits."""
    weights = flat(model)
    other = weights.clone()
    dist.broadcast(other, 0)
    assert weights.equal(other), f"{what}: ranks differ"


def ddp_every() -> None:
    """Perturbed alike, two ranks with half a batch each are one process with the whole batch."""
    for view in (False, True):
        for key in MEMBERS:
            single = network()
            train(build(key, single), single, slice(None))
            model = DistributedDataParallel(network(), gradient_as_bucket_view=view)
            train(build(key, model, model=model), model, mine())
            near(flat(model), flat(single), f"{key}, gradient_as_bucket_view={view}")
            alike(model, key)


def note(model: nn.Module, to: list[Tensor]) -> Callable[..., None]:
    """A hook that keeps what the base gets."""
    return lambda *_: to.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))


def ddp_last() -> None:
    """Each rank perturbs by its own gradient: what the base gets is the mean of what single processes would hand it."""
    for key in MEMBERS:
        handed: list[Tensor] = []
        for rank in range(2):
            single = network()
            optimizer = build(key, single)
            half = slice(4 * rank, 4 * rank + 4)
            if key == "rwp":  # its noise is another one on each rank
                break
            for _ in optimizer.passes():
                loss(single, 0, half).backward()
            optimizer.base.register_step_pre_hook(note(single, handed))
            if key in ("ae_sam", "lookbehind"):
                break  # decide together; step the base within the step
            optimizer.step()
        model = DistributedDataParallel(network())
        optimizer = build(key, model, model=model, sync="last")
        got: list[Tensor] = []
        optimizer.base.register_step_pre_hook(note(model, got))
        train(optimizer, model, mine(), range(1))
        if len(handed) == 2:
            near(got[0], (handed[0] + handed[1]) / 2, key)
        train(optimizer, model, mine(), range(1, STEPS))
        alike(model, key)


def ddp_last_skips_together() -> None:
    """A gradient that is not finite on one rank makes all ranks skip, and nobody waits for anybody."""
    model = DistributedDataParallel(network())
    optimizer = build("sam", model, model=model, sync="last")
    before = flat(model)
    for p in optimizer.passes():
        value = loss(model, 0, mine())
        (value * float("inf") if dist.get_rank() == 1 and p.number == 1 else value).backward()
    optimizer.step()
    assert optimizer.skipped == 1, "not skipped"
    assert flat(model).equal(before), "the weights changed"
    train(optimizer, model, mine())
    alike(model, "after the skipped step")


def clean_statistics() -> None:
    """BatchNorm in a wrapped model counts one batch per step, on every rank."""
    for sync in ("every", "last"):
        model = DistributedDataParallel(network(norm=True))
        optimizer = build("gsam", model, model=model, sync=sync)
        train(optimizer, model, mine())
        counted = int(model.module[1].num_batches_tracked)
        assert counted == STEPS, f"sync={sync!r}: {counted} batches in {STEPS} steps"


def fsdp() -> None:
    """Sharded parameters train like whole ones, norms included, and resume to the same bits."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for key in MEMBERS:
        single = network()
        train(build(key, single), single, slice(None))

        def sharded() -> nn.Module:
            model = network()
            fully_shard(model[0], mesh=mesh)
            return fully_shard(model, mesh=mesh)

        model = sharded()
        optimizer = build(key, model)
        train(optimizer, model, mine(), range(2))
        state, weights = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
        train(optimizer, model, mine(), range(2, STEPS))
        if key != "rwp":  # each shard draws noise of its own
            near(flat(model), flat(single), key)
        resumed = sharded()
        resumed.load_state_dict(weights)
        again = build(key, resumed)
        again.load_state_dict(state)
        train(again, resumed, mine(), range(2, STEPS))
        assert flat(resumed).equal(flat(model)), f"{key}: resuming gives other bits"


def fsdp_cannot_perturb_by_rank() -> None:
    model = fully_shard(network(), mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    told = ""
    try:
        build("sam", model, model=model, sync="last")
    except SpecError as error:
        told = str(error)
    assert "only perturb it together" in told


def ddp_resumes() -> None:
    """Rank 0 writes, all ranks read: the bits of a run that was not interrupted."""
    for sync in ("every", "last"):
        model = DistributedDataParallel(network())
        optimizer = build("gsam", model, model=model, sync=sync)
        train(optimizer, model, mine(), range(2))
        with tempfile.TemporaryDirectory() as folder:
            place = [folder]
            dist.broadcast_object_list(place, 0)
            file = Path(place[0]) / "checkpoint.safetensors"
            if dist.get_rank() == 0:
                save_tree(file, {"optimizer": optimizer.state_dict(), "model": model.state_dict()})
            dist.barrier()
            saved = load_tree(file)
            dist.barrier()
        resumed = DistributedDataParallel(network())
        resumed.load_state_dict(saved["model"])
        again = build("gsam", resumed, model=resumed, sync=sync)
        again.load_state_dict(saved["optimizer"])
        train(optimizer, model, mine(), range(2, STEPS))
        train(again, resumed, mine(), range(2, STEPS))
        assert flat(resumed).equal(flat(model)), f"sync={sync!r}: resuming gives other bits"


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (
        ddp_every,
        ddp_last,
        ddp_last_skips_together,
        ddp_resumes,
        clean_statistics,
        fsdp,
        fsdp_cannot_perturb_by_rank,
    )
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for name in sys.argv[1:] or CASES:
            CASES[name]()
            if dist.get_rank() == 0:
                print("passed", name, flush=True)
    finally:
        dist.destroy_process_group()

"""What each of two ranks does with rules that look at samples or draw noise; run by torchrun (gloo, CPU)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed as dist, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from ranks import STEPS, X, Y, alike, flat, mine, near, network

from steppe.optim import BSAM, ESAM, RWP, FunctionalSAM, ImbSAM
from steppe.optim.sharpness.composition import Parts
from steppe.optim.sharpness.rwp import FilterNoise, MixedDescent, NoiseScale

TAIL = torch.tensor([True, False, True, False, False, False, False, False])  # none on the second rank


class Masked(ESAM):
    """Another tensor is left out in each step."""

    def active(self, index, name, beta):
        return index != self.steps


class Ones(FilterNoise):
    """z = 1, so that shards draw what the whole would."""

    def spread(self, scales, bucket):
        return scales


class EvenRWP(RWP):
    parts = Parts(ascent=Ones, radius=NoiseScale, descent=MixedDescent)


class EvenBSAM(BSAM):
    def spread(self, scales, bucket, part):
        return scales


SGD = {"lr": 0.1, "momentum": 0.9}
BUILD: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "esam": lambda p, **more: Masked(p, rho=0.3, beta=0.5, gamma=1.0, **SGD, **more),
    "imbsam": lambda p, **more: ImbSAM(p, rho=0.3, **SGD, **more),
    "functional_sam": lambda p, **more: FunctionalSAM(p, rho=0.3, **SGD, **more),
    "rwp": lambda p, **more: EvenRWP(p, gamma=0.3, **SGD, **more),
    "rwp alone": lambda p, **more: EvenRWP(p, gamma=0.3, alpha=1.0, **SGD, **more),
    "bsam": lambda p, **more: EvenBSAM(p, data_size=50, rho=0.1, lr=0.1, **more),
}


def train(optimizer, model: nn.Module, part: slice, steps: int = STEPS) -> None:
    for step in range(steps):
        optimizer.tail = TAIL[part]
        for p in optimizer.passes():
            x, y = X[step, part][p.samples], Y[step, part][p.samples]
            with torch.set_grad_enabled(p.gradient):
                outputs = model(x)
                loss = p.mean((outputs - y).square().sum(dim=1), outputs)
            if p.gradient:
                loss.backward()
        optimizer.step()


def ddp_every() -> None:
    """Two ranks with half a batch each are one process with the whole batch; here tensors cannot be frozen."""
    for key, build in BUILD.items():
        single = network()
        train(build(single.named_parameters()), single, slice(None))
        model = DistributedDataParallel(network())
        train(build(model.module.named_parameters(), model=model), model, mine())
        near(flat(model), flat(single), key)
        alike(model, key)


def ddp_last() -> None:
    """Each rank by itself: ranks stay alike, also where each keeps other samples or draws other noise."""
    more: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "esam, selecting": lambda p, **rest: ESAM(p, rho=0.3, **SGD, **rest),
        "rwp, drawing": lambda p, **rest: RWP(p, gamma=0.3, **SGD, **rest),
        "bsam, drawing": lambda p, **rest: BSAM(p, data_size=50, lr=0.1, **rest),
    }
    for key, build in {**BUILD, **more}.items():
        model = DistributedDataParallel(network())
        train(build(model.module.named_parameters(), model=model, sync="last"), model, mine())
        alike(model, key)


def bsam_over_ranks_is_m_sharpness() -> None:
    """Two ranks that perturb by themselves are one process that takes the batch in two parts."""
    single = network()
    optimizer = EvenBSAM(single.named_parameters(), data_size=50, rho=0.1, lr=0.1, batch_split=2)
    train(optimizer, single, slice(None))
    model = DistributedDataParallel(network())
    apart = slice(dist.get_rank(), None, 2)
    train(BUILD["bsam"](model.module.named_parameters(), model=model, sync="last"), model, apart)
    near(flat(model), flat(single), "bsam")
    alike(model, "bsam")


def noise_is_apart_where_ranks_are() -> None:
    """The same for ranks that perturb together, another one on each rank or shard otherwise."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for kind, expected in (("every", 1.0), ("last", 0.0), ("sharded", 0.0)):
        weight = nn.Linear(40, 20, bias=False)
        nn.init.ones_(weight.weight)
        model: nn.Module = fully_shard(weight, mesh=mesh) if kind == "sharded" else weight
        if kind != "sharded":
            model = DistributedDataParallel(weight)
        more = {} if kind == "sharded" else {"model": model, "sync": kind}
        optimizer = RWP(model.parameters(), gamma=0.1, alpha=1.0, **more)
        for _ in optimizer.passes():
            (param,) = model.parameters()
            noise = (param.to_local() if kind == "sharded" else param).detach().reshape(-1) - 1
            break
        size = noise.numel()
        every = [torch.empty(size) for _ in range(2)]
        dist.all_gather(every, noise)
        found = torch.corrcoef(torch.stack(every))[0, 1].item()
        assert abs(found - expected) < 0.2, f"{kind}: correlation {found:.2f}"


def fsdp() -> None:
    """Sharded parameters train like whole ones: norms of rows and biases too."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for key, build in BUILD.items():
        single = network()
        train(build(single.named_parameters()), single, slice(None))
        model = network()
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(build(model.named_parameters()), model, mine())
        near(flat(model), flat(single), key)


def all_ranks_need_the_same_passes() -> None:
    """No rank has tail samples: nobody is perturbed, and all take all passes."""
    model = DistributedDataParallel(network())
    optimizer = BUILD["imbsam"](model.module.named_parameters(), model=model)
    optimizer.tail = torch.zeros(4, dtype=torch.bool)
    asked: list[Tensor] = []
    for p in optimizer.passes():
        loss = p.mean((model(X[0, mine()]) - Y[0, mine()]).square().sum(dim=1))
        loss.backward()
        asked.append(flat(model))
    optimizer.step()
    assert len(asked) == 3
    assert asked[0].equal(asked[1])
    alike(model, "imbsam")


CASES: dict[str, Callable[[], None]] = {
    case.__name__: case
    for case in (
        ddp_every,
        ddp_last,
        bsam_over_ranks_is_m_sharpness,
        noise_is_apart_where_ranks_are,
        fsdp,
        all_ranks_need_the_same_passes,
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

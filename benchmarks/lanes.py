"""Contenders in processes of their own, timed in turns; and how much memory one takes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from peers import LR, Build
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

Shapes: TypeAlias = Sequence[tuple[int, ...]]


class Sample(NamedTuple):
    """Means over the steps of a sample, seconds."""

    step: float
    passes: float
    faults: float


class Idle(Optimizer):
    """A base optimizer that does nothing, so that only what wraps it counts."""

    def __init__(self, params: Any, lr: float = LR, momentum: float = 0.9, **_: Any) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


class Rolling(Idle):
    """One that has a momentum, for those that look at it."""

    def __init__(self, params: Any, lr: float = LR, **_: Any) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.randn_like(p)


class Momentum(SGD):
    """SGD as it is mostly used."""

    def __init__(
        self, params: Any, lr: float = LR, momentum: float = 0.9, foreach: bool | None = None
    ) -> None:
        super().__init__(params, lr, momentum, foreach=foreach)


@dataclass(frozen=True)
class Entry:
    """A contender: what it takes steps with, gradients in one of them at most, steps that are timed together."""

    name: str
    build: Build
    passes: int
    cycle: int = 2
    base: type[Optimizer] = Idle


# -- timing ----------------------------------------------------------------------------------------------------------


class Contender(Protocol):
    """Takes samples when asked."""

    def run(self, samples: int) -> list[Sample]: ...

    def close(self) -> None: ...


class Lane:
    """A contender in a forked process: no heap, no cache and no allocator shared with the others.

    Args:
        make: called there, gives what takes one sample.
        keep: whether the allocator is told to keep what is freed, instead of giving it back to the system.
    """

    def __init__(self, make: Callable[[], Callable[[], Sample]], keep: bool = False) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, keep), daemon=True)
        self._process.start()
        there.close()

    def run(self, samples: int) -> list[Sample]:
        self._pipe.send(samples)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(0)
        self._process.join()


def _serve(pipe: Any, make: Callable[[], Callable[[], Sample]], keep: bool) -> None:
    if keep:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing outside the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap never shrinks
    sample = make()
    while samples := pipe.recv():
        pipe.send([sample() for _ in range(samples)])


def sampler(entry: Entry, source: Tensor, shapes: Shapes) -> Callable[[], Sample]:
    """What takes one sample of a contender, the mean over some steps, and over as many passes without it.

    Gradients are handed over in memory that stays: written anew before each step, outside of what is timed, because
    some algorithms write over them. So all memory that a step allocates is the contender's own.
    """
    device = source.device
    params = weights(source, shapes)
    given = [[torch.empty(shape, device=device) for shape in shapes] for _ in range(entry.passes)]
    kept = [_views(source, shapes, 97 * number) for number in range(entry.passes)]
    taken = 0

    def backward(p: Any = None) -> Any:
        nonlocal taken
        if p is None or p.gradient:
            for param, grad in zip(params, given[taken], strict=True):
                param.grad = grad
            taken += 1
        return 0.0 if p is None else losses_of(p)

    step = entry.build(params, entry.base)

    def sample() -> Sample:
        nonlocal taken
        total = own = faults = 0.0
        for _ in range(entry.cycle):
            for fresh, values in zip(given, kept, strict=True):
                torch._foreach_copy_(fresh, values)
            taken, before = 0, _faults()
            total += _timed(lambda: step(backward), device)
            faults += _faults() - before
            count, taken = taken, 0
            own += _timed(lambda count=count: [backward() for _ in range(count)], device)
            for param in params:
                param.grad = None
        return Sample(total / entry.cycle, own / entry.cycle, faults / entry.cycle)

    return sample


def mover(
    make: Callable[[list[nn.Parameter]], Callable[[], None]], source: Tensor, shapes: Shapes
) -> Callable[[], Sample]:
    """What takes one sample of two moves there and back."""
    params = weights(source, shapes)
    for param, grad in zip(params, _views(source, shapes, 0), strict=True):
        param.grad = grad.clone()
    move = make(params)

    def sample() -> Sample:
        before = _faults()
        seconds = _timed(lambda: (move(), move()), source.device)
        return Sample(seconds / 2, 0.0, (_faults() - before) / 2)

    return sample


def bound(source: Tensor, numbers: int) -> Callable[[], Sample]:
    """What times 8 accesses to all weights in flat memory: a norm, a copy, w + a·g in place, a copy back."""
    gradient = source[:numbers]
    values, saved = gradient * 50, gradient.clone()

    def sweep() -> None:
        torch.linalg.vector_norm(gradient)
        saved.copy_(values)
        values.add_(gradient, alpha=1e-3)
        values.copy_(saved)

    return lambda: Sample(_timed(sweep, source.device), 0.0, 0.0)


def measured(lanes: Mapping[str, Contender], rounds: int, samples: int) -> dict[str, list[list[Sample]]]:
    """The samples of each round, contenders in turns, so that whatever else the machine does hits all alike."""
    try:
        for lane in lanes.values():
            lane.run(1)
        taken: dict[str, list[list[Sample]]] = {name: [] for name in lanes}
        for _ in range(rounds):
            for name, lane in lanes.items():
                taken[name].append([Sample(*each) for each in lane.run(samples)])
    finally:
        for lane in lanes.values():
            lane.close()
    return taken


@dataclass
class Times:
    """Seconds per step beyond the passes, from the samples of all rounds."""

    rounds: list[list[Sample]]

    @property
    def by_round(self) -> list[float]:
        return [statistics.median(one.step - one.passes for one in taken) for taken in self.rounds]

    @property
    def best(self) -> float:
        return min(one.step - one.passes for taken in self.rounds for one in taken)

    @property
    def middle(self) -> float:
        return statistics.median(self.by_round)

    @property
    def faults(self) -> float:
        return statistics.median(one.faults for taken in self.rounds for one in taken)

    def over(self, other: Times) -> float:
        """The ratio to another contender: the median over rounds, in each of which the two were neighbours."""
        return statistics.median(a / b for a, b in zip(self.by_round, other.by_round, strict=True))


# -- memory ----------------------------------------------------------------------------------------------------------


def footprint(
    build: Build, base: type[Optimizer], source: Tensor, shapes: Shapes, steps: int
) -> tuple[int, int]:
    """Bytes at the peak of `steps` steps and after them, weights, gradients and the base's state included."""
    cuda = source.device.type == "cuda"

    def backward(p: Any = None) -> Any:
        if p is None or p.gradient:
            for number, param in enumerate(params):
                param.grad = kept[number].clone()
        return 0.0 if p is None else losses_of(p)

    kept = _views(source, shapes, 0)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with (
        _quiet(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=not cuda
        ) as prof,
    ):
        params = weights(source, shapes)
        step = build(params, base)
        for _ in range(steps):
            step(backward)
    if cuda:
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, held


# -- common ----------------------------------------------------------------------------------------------------------

SAMPLES = 8


def weights(source: Tensor, shapes: Shapes) -> list[nn.Parameter]:
    """Parameters some tens of times as large as the gradients."""
    return [nn.Parameter(values * 50) for values in _views(source, shapes, 500)]


def losses_of(p: Any) -> Tensor:
    """The losses of a tiny model, for those that look at them."""
    with torch.enable_grad():
        outputs = torch.arange(2.0 * SAMPLES).reshape(SAMPLES, 2).requires_grad_()[p.samples]
        return p.mean(outputs.square().sum(dim=1), outputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's profiler says of itself, past Python, on standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _views(source: Tensor, shapes: Shapes, start: int) -> list[Tensor]:
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = source[start : start + sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _timed(call: Callable[[], Any], device: torch.device) -> float:
    """Processor time, which other processes do not lengthen; on a GPU the time until it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - started
    started = time.process_time()
    call()
    return time.process_time() - started

"""Other people's sharpness-aware optimizers, each as ``build(params, base) -> step(backward)``.

``backward()`` leaves fresh gradients in ``.grad``. What else a user of that library has to call stands in its step, so
that all do the same: two passes, gradients zeroed before each, base step.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Step = Callable[[Callable[[], Any]], Any]
Build = Callable[[list[nn.Parameter], type[Optimizer]], Step]

RHO, LR = 0.05, 1e-3


class Davda54(Optimizer):
    """The rule of davda54/sam at 3c3afdb: kernel for kernel, tensor by tensor, weights put back by their pointer."""

    def __init__(self, params: list[nn.Parameter], base: type[Optimizer], rho: float = RHO) -> None:
        super().__init__(params, {"rho": rho})
        self.base = base(self.param_groups)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def length(self) -> Tensor:
        """ρ / ‖g‖; where it is not adaptive, that code multiplies by 1.0."""
        norms = [(1.0 * p.grad).norm(p=2) for group in self.param_groups for p in group["params"]]
        return self.param_groups[0]["rho"] / (torch.norm(torch.stack(norms), p=2) + 1e-12)

    @torch.no_grad()
    def perturb(self, length: Tensor) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(1.0 * p.grad * length)

    def restore(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]

    def run(self, backward: Callable[[], Any]) -> None:
        self.zero_grad()
        backward()
        self.perturb(self.length())
        self.zero_grad()
        backward()
        self.restore()
        self.base.step()


def davda54(params: list[nn.Parameter], base: type[Optimizer]) -> Step:
    return Davda54(params, base).run


def bare_foreach(params: list[nn.Parameter], base: type[Optimizer]) -> Step:
    """SAM as one would write it for a single list of plain tensors: no checks, no groups, exact restore."""
    optimizer, saved = base(params), [torch.empty_like(p) for p in params]

    @torch.no_grad()
    def step(backward: Callable[[], Any]) -> None:
        optimizer.zero_grad()
        backward()
        grads = [p.grad for p in params]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))).item()
        torch._foreach_copy_(saved, params)
        torch._foreach_add_(params, grads, alpha=RHO / (norm + 1e-12))
        optimizer.zero_grad()
        backward()
        torch._foreach_copy_(params, saved)
        optimizer.step()

    return step


def move_davda54(params: list[nn.Parameter]) -> Callable[[], None]:
    """There and back along ``.grad``."""
    optimizer = Davda54(params, torch.optim.SGD)
    length = optimizer.length()

    def move() -> None:
        optimizer.perturb(length)
        optimizer.restore()

    return move


def move_bare_foreach(params: list[nn.Parameter]) -> Callable[[], None]:
    """The same as one would write it for plain tensors."""
    saved, grads = [torch.empty_like(p) for p in params], [p.grad for p in params]

    @torch.no_grad()
    def move() -> None:
        torch._foreach_copy_(saved, params)
        torch._foreach_add_(params, grads, alpha=1e-3)
        torch._foreach_copy_(params, saved)

    return move


def plain(params: list[nn.Parameter], base: type[Optimizer]) -> Step:
    """The base optimizer alone."""
    optimizer = base(params)

    def step(backward: Callable[[], Any]) -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    return step


PYTORCH_OPTIMIZER = ("sam", "gsam", "wsam", "friendly_sam", "looksam")
"""What pytorch_optimizer has of the family, by our keys."""


def pytorch_optimizer(method: str, foreach: bool) -> Build:
    """A class of pytorch_optimizer, called as its documentation does."""

    def build(params: list[nn.Parameter], base: type[Optimizer]) -> Step:
        import pytorch_optimizer as library

        if method == "gsam":
            schedule = SimpleNamespace(step=lambda: RHO)
            gsam = library.GSAM(params, base(params), nn.Identity(), schedule, foreach=foreach)
            return lambda backward: gsam.step(lambda: (gsam.base_optimizer.zero_grad(), backward()))
        if method == "wsam":
            wsam = library.WSAM(nn.Identity(), params, base, foreach=foreach, lr=LR)

            def two(backward: Callable[[], Any]) -> None:
                wsam.zero_grad()
                wsam.step(backward)

            return two
        cls, hyper = {
            "sam": (library.SAM, {}),
            "friendly_sam": (library.FriendlySAM, {}),
            "looksam": (library.LookSAM, {"k": 5}),
        }[method]
        optimizer = cls(params, base, foreach=foreach, lr=LR, **hyper)

        def step(backward: Callable[[], Any]) -> None:
            optimizer.zero_grad()
            backward()
            if method == "looksam" and optimizer.get_step() % optimizer.k:
                optimizer.first_step()  # its step(closure) would take the same gradient a second time
                optimizer.second_step()
            else:
                optimizer.step(backward)

        return step

    return build


class Optax:
    """optax.contrib.sam in the interpreter that has it, as a lane (see `lanes.Lane`)."""

    def __init__(self, python: str, shapes: Sequence[Sequence[int]]) -> None:
        script = Path(__file__).with_name("optax_peer.py")
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [python, script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._ask(shapes)

    def run(self, samples: int) -> list[tuple[float, float, float]]:
        """Seconds of each step; handing over gradients costs nothing there."""
        return [(seconds, 0.0, faults) for seconds, faults in self._ask(samples)]

    def close(self) -> None:
        self._process.communicate()

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

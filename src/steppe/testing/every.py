"""What every optimizer has to hold: torch's own contract."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.core.spec import Spec
from steppe.testing.rig import Check, ConformanceError, Rig, quiet, require, same

__all__ = ["CHECKS"]


def descends(spec: Spec, demo: Mapping[str, Any]) -> None:
    """Training lowers the loss."""
    rig = Rig(spec, demo)
    first = float(rig.train(1))
    rig.train(41)
    last = float(rig.train(1))
    require(last < first, f"after 42 steps the loss of the first batch went from {first:.4g} to {last:.4g}")


def returns_the_first_loss(spec: Spec, demo: Mapping[str, Any]) -> None:
    """step(closure) returns the loss of its first pass and runs the closure with autograd on."""
    rig = Rig(spec, demo)
    rig.train(2)
    enabled: list[bool] = []
    losses: list[Tensor] = []

    def closure(p: Any = None) -> Tensor:
        enabled.append(torch.is_grad_enabled() or (p is not None and not p.gradient))
        with torch.set_grad_enabled(p is None or p.gradient):
            losses.append(rig.closure(p))
        return losses[-1]

    with torch.no_grad():
        got = rig.train(1, closure)
    require(float(got) == float(losses[0]), f"step(closure) returned {got}, its first loss is {losses[0]}")
    require(all(enabled), "the closure ran without autograd: call it under torch.enable_grad()")


def counts_passes(spec: Spec, demo: Mapping[str, Any]) -> None:
    """The closure is called as often as the spec says."""
    rig = Rig(spec, demo)
    rig.train(20)
    if spec.random:
        require(20 <= rig.passes <= 40, f"20 steps called the closure {rig.passes} times")
        return
    require(
        rig.passes == round(20 * spec.evals),
        f"20 steps called the closure {rig.passes} times; the spec says {spec.evals:g} per step",
    )


def obeys_schedulers(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A learning rate of 0 leaves the weights bit-identical; a scheduler's value is the one that is used."""
    rig = Rig(spec, demo)
    scheduler = torch.optim.lr_scheduler.LambdaLR(rig.optimizer, lambda t: float(t >= 2))
    before = rig.weights()
    for _ in range(2):
        rig.train(1)
        scheduler.step()
        require(same(before, rig.weights()), "lr = 0 changed the weights")
    rig.train(1)
    require(not same(before, rig.weights()), "the scheduler's learning rate is not used")
    group = rig.optimizer.param_groups[0]
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        rig.optimizer,
        max_lr=0.05,
        total_steps=4,
        cycle_momentum=bool(group.get("momentum") or group.get("betas")),  # where there is one to cycle
    )
    for _ in range(3):
        rig.train(1)
        cycle.step()
    require(
        rig.optimizer.param_groups[0]["lr"] == cycle.get_last_lr()[0], "OneCycleLR does not reach the groups"
    )


def resumes_exactly(spec: Spec, demo: Mapping[str, Any]) -> None:
    """Training that is saved, loaded and continued has the bits of training that was not; all of it is plain data."""
    straight, saved, resumed = Rig(spec, demo), Rig(spec, demo), Rig(spec, demo)
    straight.train(7)
    saved.train(4)
    state = saved.optimizer.state_dict()
    _require_plain(state, "state_dict()")
    buffer = io.BytesIO()
    torch.save([state, saved.model.state_dict()], buffer)
    buffer.seek(0)
    state, weights = torch.load(buffer, weights_only=True)
    resumed.model.load_state_dict(weights)
    resumed.optimizer.load_state_dict(state)
    resumed.steps = 4
    resumed.train(3)
    require(
        same(straight.weights(), resumed.weights()),
        "weights after resuming differ: something is missing in state_dict()",
    )


def _require_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            require(isinstance(key, str | int), f"{where}: key {key!r} is neither a string nor an integer")
            _require_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_plain(item, f"{where}[{index}]")
    else:
        plain = value is None or isinstance(value, str | int | float | bool | Tensor)
        require(
            plain,
            f"{where} is a {type(value).__name__}; only numbers, strings, tensors, lists and dicts can be stored",
        )


def copies_deeply(spec: Spec, demo: Mapping[str, Any]) -> None:
    """copy.deepcopy of a model and its optimizer trains on like the original, and apart from it."""
    rig = Rig(spec, demo)
    rig.train(3)
    _trains_like(rig, copy.deepcopy(rig), "a deep copy")


def pickles(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A pickled model and optimizer train on like the original."""
    rig = Rig(spec, demo)
    rig.train(3)
    _trains_like(rig, pickle.loads(pickle.dumps(rig)), "an unpickled optimizer")


def _trains_like(rig: Rig, other: Rig, what: str) -> None:
    before = rig.weights()
    other.train(3)
    require(same(before, rig.weights()), f"{what} changes the original's weights")
    rig.train(3)
    require(same(rig.weights(), other.weights()), f"{what} trains differently from the original")


def adds_param_groups(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A group added during training is trained, with the defaults of what it does not set."""
    rig = Rig(spec, demo)
    rig.train(2)
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    rig.optimizer.add_param_group({"params": [("extra", extra)]})
    old, new = rig.optimizer.param_groups
    require(old.keys() == new.keys(), f"the new group lacks {sorted(old.keys() ^ new.keys())}")

    def closure(p: Any = None) -> Tensor:
        loss = rig.closure(p)
        if extra.requires_grad and (p is None or p.gradient):
            extra.square().sum().backward()
        return loss

    rig.train(3, closure)
    require(
        not extra.detach().equal(torch.ones(3, dtype=torch.float64)), "the added parameter was not trained"
    )
    state = rig.optimizer.state_dict()
    rig.optimizer.load_state_dict(state)


def takes_groups(spec: Spec, demo: Mapping[str, Any]) -> None:
    """Two groups with the same hyper-parameters are one group."""
    one, two = Rig(spec, demo), Rig(spec, demo, split=2)
    one.train(3)
    two.train(3)
    for a, b in zip(one.weights(), two.weights(), strict=True):
        require(torch.allclose(a, b, rtol=1e-9, atol=1e-12), "two groups train differently from one")


def leaves_unused_parameters(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A parameter whose gradient is None stays as it is, also when only some steps have none."""
    rig = Rig(spec, demo)
    bias = rig.params["2.bias"]

    def closure(p: Any = None) -> Tensor:
        loss = rig.closure(p)
        bias.grad = None
        return loss

    rig.train(2)
    before = bias.detach().clone()
    rig.train(2, closure)
    require(same([before], [bias.detach()]), "a parameter without a gradient was changed")
    rig.train(2)
    require(not same([before], [bias.detach()]), "a parameter that has a gradient again is not trained")


def stands_no_gradients(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A step in which no parameter has a gradient changes nothing, and zero gradients do no harm."""
    rig = Rig(spec, demo)
    before = rig.weights()

    def nothing(p: Any = None) -> Tensor:
        rig.optimizer.zero_grad()
        return torch.tensor(0.0)

    def zeros(p: Any = None) -> Tensor:
        rig.closure(p)
        for param in rig.model.parameters():
            param.grad = torch.zeros_like(param)
        return torch.tensor(0.0)

    rig.train(1, nothing)
    require(same(before, rig.weights()), "a step without any gradient changed the weights")
    rig.train(2, zeros)
    require(
        all(bool(w.isfinite().all()) for w in rig.weights()), "zero gradients made the weights not finite"
    )


def takes_dtypes(spec: Spec, demo: Mapping[str, Any]) -> None:
    """float32, bfloat16 and complex weights are trained in their own dtype and stay finite."""
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        rig = Rig(spec, demo, dtype)
        before = rig.weights()
        with quiet():
            rig.train(4)
        require(all(w.dtype == dtype for w in rig.weights()), f"{dtype} weights changed their dtype")
        require(not same(before, rig.weights()), f"{dtype} weights are not trained")
        require(all(bool(w.isfinite().all()) for w in rig.weights()), f"{dtype} weights are not finite")


def leaves_the_global_rng(spec: Spec, demo: Mapping[str, Any]) -> None:
    """Neither construction nor steps draw from torch's global generator."""
    before = torch.get_rng_state()
    Rig(spec, demo).train(3)
    require(
        before.equal(torch.get_rng_state()),
        "the global generator was used: hold a torch.Generator of your own",
    )


def keeps_memory_in_place(spec: Spec, demo: Mapping[str, Any]) -> None:
    """Weights stay where they are in memory, in every pass: views of them, and CUDA graphs, depend on it."""
    rig = Rig(spec, demo)
    before = [param.data_ptr() for param in rig.model.parameters()]

    def closure(p: Any = None) -> Tensor:
        require(
            before == [param.data_ptr() for param in rig.model.parameters()],
            "a pass sees the weights at another address",
        )
        return rig.closure(p)

    rig.train(2, closure)
    require(before == [param.data_ptr() for param in rig.model.parameters()], "the weights moved in memory")


def runs_hooks(spec: Spec, demo: Mapping[str, Any]) -> None:
    """Step hooks run once per step; state_dict hooks run."""
    rig = Rig(spec, demo)
    seen: list[str] = []
    rig.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    rig.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    rig.optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    rig.optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    rig.train(1)
    rig.optimizer.load_state_dict(rig.optimizer.state_dict())
    require(seen == ["before", "after", "saved", "loaded"], f"hooks ran as {seen}")
    require(type(rig.optimizer).__name__ in repr(rig.optimizer), "repr() does not name the optimizer")


def rejects_unknown_names(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A hyper-parameter that does not exist is an error that names it."""
    try:
        Rig(spec, {**demo, "learning_rat": 0.1})
    except (SpecError, TypeError) as error:
        require("learning_rat" in str(error), f"the error does not name the hyper-parameter: {error}")
    else:
        raise ConformanceError("an unknown hyper-parameter was accepted")


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        descends,
        returns_the_first_loss,
        counts_passes,
        obeys_schedulers,
        resumes_exactly,
        copies_deeply,
        pickles,
        adds_param_groups,
        takes_groups,
        leaves_unused_parameters,
        stands_no_gradients,
        takes_dtypes,
        leaves_the_global_rng,
        keeps_memory_in_place,
        runs_hooks,
        rejects_unknown_names,
    )
}
"""What every optimizer has to hold: name -> check(spec, demo)."""

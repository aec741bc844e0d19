"""What a sharpness-aware optimizer has to hold besides."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from steppe.core.spec import Spec
from steppe.optim.registry import create
from steppe.testing.rig import Check, ConformanceError, Rig, passes_of_a_step, require, same

__all__ = ["SHARPNESS_CHECKS"]


def shares_groups_and_state(spec: Spec, demo: Mapping[str, Any]) -> None:
    """Wrapper and base hold the same groups and state, always, and the base starts like a plain one."""
    rig = Rig(spec, demo)

    def require_shared(when: str) -> None:
        shared = rig.optimizer.param_groups is rig.optimizer.base.param_groups
        require(
            shared and rig.optimizer.state is rig.optimizer.base.state,
            f"groups or state are two objects {when}",
        )

    require_shared("after construction")
    require(not rig.optimizer.state, "there is state before the first step: Adam would not initialise itself")
    rig.train(2)
    plain = nn.Parameter(torch.ones(2, dtype=torch.float64))
    base = type(rig.optimizer.base)(
        [plain], **{k: v for k, v in demo.items() if k in rig.optimizer.base.defaults}
    )
    plain.grad = torch.ones_like(plain)
    base.step()
    want = set(base.state[plain])
    for param in rig.model.parameters():
        held = set(rig.optimizer.state[param])
        require(held == want, f"state[p] holds {sorted(held)}, with the base alone {sorted(want)}")
    rig.optimizer.load_state_dict(rig.optimizer.state_dict())
    require_shared("after load_state_dict")
    rig.optimizer = copy.deepcopy(rig.optimizer)
    require_shared("after deepcopy")


def loops_like_closures(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A loop over passes() gives the bits of step(closure); several backward calls in it accumulate."""
    closed, loop, parts = Rig(spec, demo), Rig(spec, demo), Rig(spec, demo)
    closed.train(4)
    for rig in (loop, parts):
        for _ in range(4):
            rig.tell()
            for p in rig.optimizer.passes():
                with torch.set_grad_enabled(p.gradient):
                    if rig is loop or rig.takes_pass:
                        rig.backward(p)
                    else:
                        rig.backward(part=slice(1))
                        rig.backward(part=slice(1, None))
            rig.optimizer.step()
            rig.steps += 1
    require(
        same(closed.weights(), loop.weights()), "the loop over passes() trains differently from step(closure)"
    )
    for a, b in zip(closed.weights(), parts.weights(), strict=True):
        require(torch.allclose(a, b, rtol=1e-9, atol=1e-12), "accumulated gradients train differently")


def restores_after_exceptions(spec: Spec, demo: Mapping[str, Any]) -> None:
    """An exception in any pass, or a break, leaves weights and memory as if the step had never begun."""
    straight = Rig(spec, demo)
    straight.train(5)
    for number in range(1, len(passes_of_a_step(spec, demo)) + 1):
        for driver in ("closure", "break"):
            rig = Rig(spec, demo)
            rig.train(3)
            before, calls = rig.weights(), 0

            def closure(p: Any = None, rig: Rig = rig, number: int = number) -> Tensor:
                nonlocal calls
                calls += 1
                if calls == number:
                    raise KeyboardInterrupt
                return rig.closure(p)

            rig.tell()
            if driver == "closure":
                with suppress(KeyboardInterrupt):
                    rig.optimizer.step(closure)
            else:
                for p in rig.optimizer.passes():
                    if p.number == number:
                        break
                    with torch.set_grad_enabled(p.gradient):
                        rig.backward(p)
            where = f"an exception in pass {number}" if driver == "closure" else f"break in pass {number}"
            require(same(before, rig.weights()), f"{where} leaves the weights changed")
            rig.train(2)
            require(same(straight.weights(), rig.weights()), f"{where} leaves a trace in what is remembered")


def skips_what_is_not_finite(spec: Spec, demo: Mapping[str, Any]) -> None:
    """inf or nan in the gradient of any pass skips the step, leaves no trace, warns once and is counted."""
    straight = Rig(spec, demo)
    straight.train(5)
    for number in (p.number for p in passes_of_a_step(spec, demo) if p.gradient):
        for value in (float("nan"), float("inf")):
            rig = Rig(spec, demo)
            rig.train(3)
            before, calls = rig.weights(), itertools.count(1)

            def closure(
                p: Any = None, rig: Rig = rig, calls: Any = calls, number: int = number, value: float = value
            ) -> Tensor:
                loss = rig.closure(p)
                if next(calls) == number:
                    rig.params["0.weight"].grad = torch.full((4, 3), value, dtype=torch.float64)
                return loss

            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                rig.tell()
                rig.optimizer.step(closure)
            require(same(before, rig.weights()), f"{value} in pass {number} changed the weights")
            require(rig.optimizer.skipped == 1, f"skipped is {rig.optimizer.skipped} after one skipped step")
            require(len(caught) == 1, f"{len(caught)} warnings for the first skipped step; one is due")
            rig.train(2)
            require(same(straight.weights(), rig.weights()), f"{value} in pass {number} leaves a trace")


def restores_without_later_gradients(spec: Spec, demo: Mapping[str, Any]) -> None:
    """Parameters that get their gradient in only some passes come back from the perturbation too."""
    for number in range(1, len(passes_of_a_step(spec, demo, after=0)) + 1):
        rig = Rig(spec, demo)
        for group in rig.optimizer.param_groups:
            group["lr"] = 0.0
        before, calls = rig.weights(), itertools.count(1)

        def closure(p: Any = None, rig: Rig = rig, calls: Any = calls, number: int = number) -> Tensor:
            loss = rig.closure(p)
            if next(calls) == number:
                rig.params["0.weight"].grad = None
            return loss

        rig.train(1, closure)
        require(
            same(before, rig.weights()), f"a gradient of None in pass {number} leaves the weights changed"
        )


def ignores_the_gradient_scale(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A constant factor on all gradients does not move the points at which gradients are taken."""
    points: list[list[Tensor]] = []
    for factor in (1.0, 1024.0):
        rig = Rig(spec, demo)
        for group in rig.optimizer.param_groups:
            group["lr"] = 0.0

        def closure(p: Any = None, rig: Rig = rig, factor: float = factor) -> Tensor:
            points.append(rig.weights())
            loss = rig.closure(p)
            for param in rig.model.parameters():
                if param.grad is not None:
                    param.grad *= factor
            return loss

        rig.train(3, closure)
    half = len(points) // 2
    for one, other in zip(points[:half], points[half:], strict=True):
        for a, b in zip(one, other, strict=True):
            require(
                torch.allclose(a, b, rtol=1e-9, atol=1e-7), "the perturbation depends on the gradient's scale"
            )


def takes_a_scaler(spec: Spec, demo: Mapping[str, Any]) -> None:
    """passes(scaler) trains like an unscaled loop; inf in any pass skips the step and lowers the scale once."""
    plain, scaled = Rig(spec, demo), Rig(spec, demo)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for rig in (plain, scaled):
        for _ in range(5):
            _scaled_step(rig, scaler if rig is scaled else None)
    for a, b in zip(plain.weights(), scaled.weights(), strict=True):
        require(torch.allclose(a, b, rtol=1e-9, atol=1e-12), "training with a GradScaler differs")
    for p in passes_of_a_step(spec, demo):
        if not p.gradient:
            continue
        rig, scaler = Rig(spec, demo), torch.amp.GradScaler("cpu", init_scale=1024.0)
        rig.train(3)
        before = rig.weights()
        _scaled_step(rig, scaler, spoilt=p.number)
        require(same(before, rig.weights()), f"inf in pass {p.number} changed the weights")
        require(
            scaler.get_scale() == 512.0,
            f"inf in pass {p.number}: the scale is {scaler.get_scale()}, not half",
        )
    rig, scaler = Rig(spec, demo), torch.amp.GradScaler("cpu", init_scale=1024.0)
    rig.closure(passes_of_a_step(spec, demo, after=0)[0])
    scaler.scale(torch.zeros(()))  # starts its lazy state
    try:
        scaler.step(rig.optimizer, rig.closure)
    except RuntimeError as error:
        require("passes(scaler)" in str(error), f"the error does not tell what to do: {error}")
    else:
        raise ConformanceError(
            "scaler.step(optimizer, closure) was accepted: it would step with scaled gradients"
        )


def _scaled_step(rig: Rig, scaler: torch.amp.GradScaler | None, spoilt: int = 0) -> None:
    rig.tell()
    for p in rig.optimizer.passes(scaler):
        with torch.set_grad_enabled(p.gradient):
            rig.backward(p)
        for param in rig.model.parameters():
            if param.grad is not None and scaler is not None:
                param.grad *= scaler.get_scale()
                if p.number == spoilt:
                    param.grad.fill_(math.inf)
    if scaler is None:
        rig.optimizer.step()
    else:
        scaler.scale(torch.zeros(()))
        scaler.step(rig.optimizer)
        scaler.update()
    rig.steps += 1


def keeps_statistics_clean(spec: Spec, demo: Mapping[str, Any]) -> None:
    """With model=, normalisation layers update running statistics once per step: in its first pass."""
    rig = Rig(spec, demo)
    norm = nn.BatchNorm1d(4, dtype=torch.float64)
    rig.model.insert(1, norm)
    rig.optimizer = create(spec, rig.model.named_parameters(), **{**demo, "model": rig.model})
    seen: list[Tensor] = []

    def closure(p: Any = None) -> Tensor:
        before = norm.running_mean.clone()  # type: ignore[union-attr]
        loss = rig.closure(p)
        if not before.equal(norm.running_mean):  # type: ignore[arg-type]
            seen.append(before)
        return loss

    rig.train(3, closure)
    require(len(seen) == 3, f"running statistics changed {len(seen)} times in 3 steps")
    require(int(norm.num_batches_tracked) == 3, "the counter of batches is not 3 after 3 steps")  # type: ignore[arg-type]
    require(norm.track_running_stats, "the layer does not track statistics after the step")


def diagnoses(spec: Spec, demo: Mapping[str, Any]) -> None:
    """diagnostics tells of the last step, and measuring them changes no bits."""
    plain, watched = Rig(spec, demo), Rig(spec, demo)
    watched.optimizer.diagnose = True
    for _ in range(4):
        plain.train(1)
        watched.train(1)
        told, cheap = watched.optimizer.diagnostics, plain.optimizer.diagnostics
        require(
            (told.passes, told.perturbed) == (cheap.passes, cheap.perturbed), "diagnose changes the passes"
        )
        if told.perturbed:
            require(told.perturbation > 0, f"the perturbation's length is {told.perturbation}")
            require(
                math.isfinite(told.surrogate_gap) or told.clean_loss is None, "the surrogate gap is not known"
            )
    require(same(plain.weights(), watched.weights()), "diagnose changes the weights")


def explains_a_missing_loop(spec: Spec, demo: Mapping[str, Any]) -> None:
    """step() without a closure and without a completed loop is an error, also inside the loop."""
    rig = Rig(spec, demo)
    rig.train(1)
    for inside in (False, True):
        rig.tell()
        try:
            for _ in rig.optimizer.passes() if inside else (None,):
                rig.optimizer.step()
        except RuntimeError as error:
            require("passes()" in str(error), f"the error does not tell what to do: {error}")
        else:
            raise ConformanceError("step() without gradients from passes() was accepted")


SHARPNESS_CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        shares_groups_and_state,
        loops_like_closures,
        restores_after_exceptions,
        skips_what_is_not_finite,
        restores_without_later_gradients,
        ignores_the_gradient_scale,
        takes_a_scaler,
        keeps_statistics_clean,
        diagnoses,
        explains_a_missing_loop,
    )
}
"""What a sharpness-aware optimizer has to hold besides."""

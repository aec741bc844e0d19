"""The one base class of sharpness-aware optimizers."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe.core.errors import SpecError
from steppe.optim.sharpness.ascent import Perturbation
from steppe.optim.sharpness.construction import Base, Interval, make_base
from steppe.optim.sharpness.vectors import Bucket, Vector, duplicate

__all__ = ["Algorithm", "Base", "Interval", "SharpnessAware"]

Algorithm: TypeAlias = Generator[None, Vector, None]

_HALF = (torch.float16, torch.bfloat16)
_OWN = "sharpness_aware"


class SharpnessAware(Optimizer):
    """A base optimizer that is fed gradients taken at perturbed weights.

    `step(closure)` has torch's own meaning: the closure zeroes the gradients, computes the loss, calls backward and
    returns the loss; it is called once per pass. A loop that wants no closure writes ::

        for _ in optimizer.passes():         # 2 passes for SAM, 4 for GAM
            loss_fn(model(x), y).backward()  # several backward calls accumulate; gradients are zeroed between passes
        optimizer.step()

    Between two passes the weights are perturbed in place. They come back bit for bit, in the same memory, when the
    step ends, when the closure or the loop's body raises, and when the loop is left by ``break``. A pass whose
    gradient is not finite ends the step: weights, base optimizer and memory stay as they were, `skipped` is counted
    up and the first time a warning says so.

    The base owns ``param_groups`` and ``state``; this object shares both, so schedulers, checkpoints and clipping
    (``optimizer.base.register_step_pre_hook``) see one optimizer. Own hyper-parameters live in ``param_groups``, may
    differ between groups and may be changed at any time. Norms and inner products run over all groups.

    A parameter takes part in a step when the first pass gives it a gradient; if a later pass gives it none, that
    gradient counts as zero. One that first gets a gradient in a later pass is not perturbed, and the base steps it
    with the gradient of the last pass. Weights in half precision are perturbed from float32 arithmetic, and a
    warning tells when rounding takes the perturbation away.

    A subclass gives its hyper-parameters to `__init__`, their allowed values in `allowed`, the names of what it
    remembers per parameter in `remembers`, and its paper's algorithm in `algorithm`.

    Args:
        params: what torch optimizers accept, ``model.named_parameters()`` and groups included.
        base: an optimizer class, a key of `steppe.optim.OPTIMIZERS` (or an import path), or a ready optimizer. With
            a ready one `params` must be None or exactly its parameters, and no hyper-parameters of the base may be
            given: they have been set already.
        base_hyper: hyper-parameters of the base.
        own: the algorithm's hyper-parameters, defaults of every group.

    Attributes:
        base: the base optimizer.
        skipped: number of steps skipped because a gradient was not finite.
        memory: what the algorithm remembers: name -> parameter index -> tensor.

    Raises:
        SpecError: unknown or ill-valued hyper-parameter, or a base that cannot be used.
    """

    allowed: ClassVar[Mapping[str, Interval | tuple[Any, ...]]] = {}
    remembers: ClassVar[tuple[str, ...]] = ()

    _stage: Literal["idle", "open", "ready", "skip"]
    _buckets: list[Bucket]
    _rounding_told: bool

    def __init__(self, params: Any, base: Base, base_hyper: Mapping[str, Any], **own: Any) -> None:
        self.base = make_base(type(self).__name__, params, base, base_hyper, own)
        self.skipped = 0
        self.memory: dict[str, dict[int, Tensor]] = {name: {} for name in self.remembers}
        self._own = tuple(own)
        self._reset()
        groups, state = self.base.param_groups, self.base.state
        for group in groups:
            self.check({**own, **group})
        for group in groups:
            for name, value in own.items():
                group.setdefault(name, value)
        # torch's constructor starts empty groups and state, which here are the base's: they are put back
        super().__init__(groups, {**self.base.defaults, **own})
        self.param_groups, self.state = groups, state

    # -- for subclasses ------------------------------------------------------------------------------------------

    def algorithm(self) -> Algorithm:
        """One step's sequence of gradient evaluations: each ``yield`` returns the gradient at the present weights.

        The gradient may be overwritten. Code runs without autograd. What the last pass left in ``.grad`` goes to the
        base optimizer, unless `descend` replaces it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no algorithm()")

    def trait(self, index: int, name: str | None, param: Tensor) -> Hashable:
        """What decides the bucket of a parameter besides its group, dtype and device."""
        return None

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise a `SpecError` if a hyper-parameter of `group` has a value that is not allowed."""
        for name, allowed in self.allowed.items():
            if group[name] not in allowed:
                what = (
                    f"one of {', '.join(map(repr, allowed))}" if isinstance(allowed, tuple) else str(allowed)
                )
                raise SpecError(f"{type(self).__name__}: {name}={group[name]!r}, but it must be {what}.")

    @property
    def buckets(self) -> Sequence[Bucket]:
        """The parameters of this step, known after the first ``yield``."""
        return self._buckets

    def hyper(self, name: str) -> list[Any]:
        """The present value of a hyper-parameter, one per bucket."""
        return [bucket.group[name] for bucket in self._buckets]

    @contextmanager
    def perturbed(self, e: Perturbation) -> Iterator[None]:
        """Add e to the weights; on leaving, however that happens, they come back bit for bit."""
        saved = [duplicate(bucket.params) for bucket in self._buckets]
        try:
            self.shift(e)
            if not self._rounding_told:
                self._tell_rounding(e, saved)
            del e  # its memory is free for the pass
            yield
        finally:
            for bucket, values in zip(self._buckets, saved, strict=True):
                torch._foreach_copy_(bucket.params, values)

    def shift(self, e: Perturbation) -> None:
        """Add e to the weights, inside a `perturbed` block that undoes it."""
        for bucket, direction, length in zip(self._buckets, e.direction.tensors, e.lengths, strict=True):
            torch._foreach_add_(bucket.params, direction, alpha=length)

    def descend(self, gradient: Vector) -> None:
        """Hand `gradient` to the base optimizer in place of what the last pass left in ``.grad``."""
        for bucket, tensors in zip(self._buckets, gradient.tensors, strict=True):
            half = bucket.params[0].dtype in _HALF
            given = duplicate(tensors, bucket.params[0].dtype) if half else tensors
            for param, tensor in zip(bucket.params, given, strict=True):
                param.grad = tensor

    # -- the step ------------------------------------------------------------------------------------------------

    def passes(self) -> Generator[None, None, None]:
        """Ask for one gradient per iteration: zeroed before each, to be filled by backward before the next.

        Raises:
            RuntimeError: if another loop over `passes` has not ended.
        """
        if self._stage == "open":
            raise RuntimeError(
                "a loop over passes() is still open; its weights may be perturbed. Close it first."
            )
        outcome: Literal["idle", "ready", "skip"] = "idle"
        self._stage = "open"
        algorithm = self.algorithm()
        try:
            with torch.no_grad():
                next(algorithm)
            for number in itertools.count(1):
                self.zero_grad()
                yield
                with torch.no_grad():
                    if number == 1:
                        self._buckets = self._bucketed()
                    gradient = self._gradient()
                    if not math.isfinite(gradient.norm):
                        outcome = "skip"
                        self._skip(number)
                        return
                    try:
                        algorithm.send(gradient)
                    except StopIteration:
                        outcome = "ready"
                        return
                    del gradient
        finally:
            with torch.no_grad():
                algorithm.close()  # leaves `perturbed` blocks, which restore the weights
            self._buckets, self._stage = [], outcome

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the passes with `closure` and step the base; without one, step the base after a `passes` loop.

        Returns:
            What the closure returned in the first pass (the loss at the unperturbed weights); None without closure.

        Raises:
            RuntimeError: without a closure, if no loop over `passes` was completed since the last step.
        """
        loss = None
        if closure is not None:
            with closing(self.passes()) as passes:
                for number, _ in enumerate(passes):
                    with torch.enable_grad():
                        value = closure()
                    if number == 0:
                        loss = value
        if self._stage in ("idle", "open"):
            raise RuntimeError(
                f"{type(self).__name__}.step() without a closure needs a completed loop "
                "`for _ in optimizer.passes(): ... loss.backward()` before it; or call step(closure)."
            )
        stage, self._stage = self._stage, "idle"
        if stage == "ready":
            self.base.step()
        return loss

    def _bucketed(self) -> list[Bucket]:
        buckets: dict[Hashable, Bucket] = {}
        index = 0
        for position, group in enumerate(self.param_groups):
            names = group.get("param_names") or [None] * len(group["params"])
            for name, param in zip(names, group["params"], strict=True):
                if param.grad is not None:
                    trait = self.trait(index, name, param)
                    key = (position, param.dtype, param.device, trait)
                    if key not in buckets:
                        buckets[key] = Bucket(group, [], [], trait)
                    buckets[key].params.append(param)
                    buckets[key].indices.append(index)
                index += 1
        return list(buckets.values())

    def _gradient(self) -> Vector:
        """What backward left in ``.grad``: float32 for half precision, zeros where there is nothing."""
        tensors = []
        for bucket in self._buckets:
            grads = [
                torch.zeros_like(p) if p.grad is None else p.grad.to_dense() if p.grad.is_sparse else p.grad
                for p in bucket.params
            ]
            tensors.append(duplicate(grads, torch.float32) if bucket.params[0].dtype in _HALF else grads)
        return Vector(tensors)

    def _skip(self, number: int) -> None:
        if not self.skipped:
            warnings.warn(
                f"the gradient of pass {number} is not finite: {type(self).__name__} skips this step and leaves the "
                "weights as they are. Further ones are skipped silently and counted in optimizer.skipped.",
                RuntimeWarning,
                stacklevel=3,
            )
        self.skipped += 1

    def _tell_rounding(self, e: Perturbation, saved: list[list[Tensor]]) -> None:
        """Warn once if half-precision weights moved by less or more than a tenth off what was asked for."""
        for bucket, before, direction, length in zip(
            self._buckets, saved, e.direction.tensors, e.lengths, strict=True
        ):
            dtype = bucket.params[0].dtype
            asked = abs(length) * Vector([direction]).norm if dtype in _HALF else 0.0
            if not asked:
                continue
            moved = duplicate(bucket.params, torch.float32)
            torch._foreach_sub_(moved, duplicate(before, torch.float32))
            share = Vector([moved]).norm / asked
            if abs(share - 1) > 0.1:
                self._rounding_told = True
                warnings.warn(
                    f"rounding to {dtype} changes the perturbation's length to {share:.0%} of what "
                    f"{type(self).__name__} asked for. Keep the weights in float32 and use torch.autocast.",
                    RuntimeWarning,
                    stacklevel=7,
                )
                return

    # -- one optimizer with the base -----------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch; what it does not set, the algorithm's values included, takes the defaults.

        Raises:
            SpecError: a value that is not allowed; nothing has been added then.
        """
        own = {name: self.defaults[name] for name in self._own}
        self.check({**self.defaults, **param_group})
        self.base.add_param_group({**own, **param_group})

    def state_dict(self) -> dict[str, Any]:
        """The base's ``state_dict`` plus, under "sharpness_aware", the algorithm's name, `skipped` and `memory`."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base.state_dict()
        memory = {name: dict(tensors) for name, tensors in self.memory.items()}
        state_dict[_OWN] = {"algorithm": type(self).__name__, "skipped": self.skipped, "memory": memory}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, to the same bits.

        Raises:
            SpecError: it was written by a plain optimizer or by another algorithm, or its memory does not fit the
                parameters. Nothing has been changed then.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        own = state_dict.get(_OWN)
        name = type(self).__name__
        if own is None:
            raise SpecError(
                f"this state_dict has no {_OWN!r} entry, so {name} did not write it. To go on from a plain "
                f"optimizer's state, load it there and wrap that: {name}(None, base=optimizer)."
            )
        if own["algorithm"] != name:
            raise SpecError(f"this state_dict was written by {own['algorithm']}; {name} cannot continue it.")
        memory = self._checked_memory(own["memory"])
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != _OWN})
        self.skipped, self.memory = int(own["skipped"]), memory
        self._reset()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _checked_memory(self, memory: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[int, Tensor]]:
        params = [param for group in self.param_groups for param in group["params"]]
        if set(memory) != set(self.remembers):
            raise SpecError(
                f"memory of {type(self).__name__}: {sorted(memory)}, expected {sorted(self.remembers)}."
            )
        loaded: dict[str, dict[int, Tensor]] = {}
        for name, tensors in memory.items():
            loaded[name] = {}
            for index, tensor in tensors.items():
                if not 0 <= int(index) < len(params) or tensor.shape != params[int(index)].shape:
                    raise SpecError(
                        f"memory {name!r} of parameter {index} has shape {tuple(tensor.shape)}, which no parameter "
                        f"of this optimizer has at that place ({len(params)} parameters)."
                    )
                loaded[name][int(index)] = tensor.to(params[int(index)].device, copy=True)
        return loaded

    def _reset(self) -> None:
        """Forget everything that only matters within a step."""
        self._stage = "idle"
        self._buckets = []
        self._rounding_told = False

    def __getstate__(self) -> dict[str, Any]:
        # hooks and a scheduler's wrapper of step stay behind, as in torch
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("step", "_stage", "_buckets") and not name.startswith("_optimizer_")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()
        super().__setstate__(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__} over {self.base!r}"

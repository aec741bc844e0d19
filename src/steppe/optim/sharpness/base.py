"""The one base class of sharpness-aware optimizers: an algorithm asks for gradients, this class gets them for it."""

from __future__ import annotations

import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Generator, Hashable, Mapping
from contextlib import closing
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from steppe.core.errors import SpecError
from steppe.optim.sharpness.construction import Allowed, Base, Interval, Maybe, make_base
from steppe.optim.sharpness.gradients import as_gradient, bucketed, drop, gradient_of, multiply, present
from steppe.optim.sharpness.modules import Module
from steppe.optim.sharpness.passes import Diagnostics, Pass
from steppe.optim.sharpness.perturbing import Perturbs
from steppe.optim.sharpness.vectors import Bucket, Vector, cosine, duplicate

__all__ = ["Algorithm", "Base", "Interval", "Maybe", "Pass", "SharpnessAware"]

Algorithm: TypeAlias = Generator[Any, Any, None]
"""Yields `Pass`es, or nothing for the gradient of the batch; is sent the gradients, `Vector`s (None without one)."""


class SharpnessAware(Perturbs):
    """A base optimizer that is fed gradients taken at perturbed weights.

    `step(closure)` has torch's own meaning: the closure zeroes the gradients, computes the loss, calls backward and
    returns the loss; it is called once per pass. A loop that wants no closure writes ::

        for p in optimizer.passes():         # 2 passes for SAM, 4 for GAM; with AMP: passes(scaler)
            loss_fn(model(x), y).backward()  # several backward calls accumulate; gradients are zeroed between passes
        optimizer.step()

    Between two passes the weights are perturbed in place. They come back bit for bit, in the same memory, when the
    step ends, when the closure or the loop's body raises, and when the loop is left by ``break``. A pass whose
    gradient is not finite ends the step: weights, base optimizer and memory stay as they were, `skipped` is counted
    up and the first time a warning says so.

    The base owns ``param_groups`` and ``state``; this object shares both, so schedulers, checkpoints and clipping
    (``optimizer.base.register_step_pre_hook``) see one optimizer. Own hyper-parameters live in ``param_groups``, may
    differ between groups and may be changed at any time; one that the base has too stands under
    ``sharpness_<name>``. Norms and inner products run over all groups, and over all shards of a sharded parameter.

    A parameter takes part in a step when the first pass gives it a gradient; if a later pass gives it none, that
    gradient counts as zero. One that first gets a gradient in a later pass is not perturbed, and the base steps it
    with the gradient of the last pass. Weights in half precision are perturbed from float32 arithmetic and rounded at
    random, so that a small perturbation does not round away; a warning tells when this changes its length.

    An algorithm that looks at single samples or at outputs needs to be told of them: its `closure_takes_pass`, so that
    the closure is called as ``closure(p)`` and calls backward, if ``p.gradient``, on ``p.mean(losses, outputs)`` for
    the samples ``x[p.samples]``. A loop over `passes` does the same.

    A subclass gives its hyper-parameters to `__init__`, their allowed values in `allowed`, the names of what it
    remembers per parameter in `remembers`, and its paper's algorithm in `algorithm`.

    Args:
        params: what torch optimizers accept, ``model.named_parameters()`` and groups included.
        base: an optimizer class, a key of `steppe.optim.OPTIMIZERS` (or an import path), or a ready optimizer. With
            a ready one `params` must be None or exactly its parameters, and no hyper-parameters of the base may be
            given: they have been set already.
        rest: hyper-parameters of the base, and what every sharpness-aware optimizer takes:
            **model**, the trained module: its normalisation layers then update running statistics in the first pass
            of a step only; **sync**, "every" (default): ranks average the gradient of every pass and perturb alike,
            or "last": each rank perturbs by its own gradient (m-sharpness) and only what the base gets is averaged,
            for which `model` must be the `DistributedDataParallel` module; **restore**, "copy" (default): perturbed
            passes hold a copy of the weights, "swap": in perturbed passes the parameters lie in other memory of that
            size, which saves the copying, so nobody may look for weights elsewhere than in the parameters (views of
            their memory, captured graphs, cuDNN's packed weights), or "subtract": the perturbation is taken away
            again, without the copy, and weights drift by a rounding error per step; **seed** of what the algorithm
            draws, default 0.
        own: the algorithm's hyper-parameters, defaults of every group.

    Attributes:
        base: the base optimizer.
        diagnose: set it to have the next steps measure all of `diagnostics`, at the price of a copy of the gradient
            and a few sweeps over it, and never of a pass. Default False.
        diagnostics: what the last completed step did; None before the first.
        skipped: number of steps skipped because a gradient was not finite.
        steps: number of completed steps.
        memory: what the algorithm remembers: name -> parameter index -> tensor.
        numbers: what it remembers besides: name -> number.

    Raises:
        SpecError: unknown or ill-valued hyper-parameter, or a base that cannot be used.
    """

    allowed: Mapping[str, Allowed] = {}
    remembers: tuple[str, ...] = ()
    closure_takes_pass: bool = False

    def __init__(self, params: Any, base: Base, rest: Mapping[str, Any], **own: Any) -> None:
        name, rest = type(self).__name__, dict(rest)
        self.module = Module(name, rest.pop("model", None), rest.pop("sync", "every"))
        self.restore, self.seed = rest.pop("restore", "copy"), int(rest.pop("seed", 0))
        if self.restore not in ("copy", "swap", "subtract"):
            raise SpecError(
                f"{name}: restore={self.restore!r}, but it must be one of 'copy', 'swap', 'subtract'."
            )
        self.base = make_base(name, params, base, rest, own)
        self.skipped = self.steps = 0
        self.memory, self.numbers = {name: {} for name in self.remembers}, {}
        self.diagnose, self.diagnostics = False, None
        # where the base has a hyper-parameter of the same name (RMSprop an alpha), both live on
        self._keys = {key: f"sharpness_{key}" if key in self.base.defaults else key for key in own}
        own = {self._keys[key]: value for key, value in own.items()}
        self._own, self._rounding_checked, self._cached = tuple(own), False, (None, [])
        self._left, self._dropping_told = None, False
        self._reset()
        groups, state = self.base.param_groups, self.base.state
        for group in groups:
            self.check({**own, **group})
        for group in groups:
            for key, value in own.items():
                group.setdefault(key, value)
        # torch's constructor starts empty groups and state, which here are the base's: they are put back
        super().__init__(groups, {**self.base.defaults, **own})
        self.param_groups, self.state = groups, state

    diagnose: bool
    diagnostics: Diagnostics | None
    _stage: Literal["idle", "open", "ready", "skip"]
    _last: Pass
    _dropping_told: bool

    # -- for subclasses ------------------------------------------------------------------------------------------

    def algorithm(self) -> Algorithm:
        """One step's sequence of gradient evaluations: each ``yield`` returns the gradient at the present weights.

        The gradient may be overwritten. Code runs without autograd. What the last pass left in ``.grad`` goes to the
        base optimizer, unless `descend` replaces it. ``yield Pass(...)`` asks for more than the batch's gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} has no algorithm()")

    def trait(self, index: int, name: str | None, param: Tensor) -> Hashable:
        """What decides the bucket of a parameter besides its group, dtype, device and layout over ranks."""
        return None

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise a `SpecError` if a hyper-parameter of `group` has a value that is not allowed."""
        for name, allowed in self.allowed.items():
            value = group[self.key(name)]
            if value not in allowed:
                what = (
                    f"one of {', '.join(map(repr, allowed))}" if isinstance(allowed, tuple) else str(allowed)
                )
                raise SpecError(f"{type(self).__name__}: {name}={value!r}, but it must be {what}.")

    def bucketed(self, takes_part: Callable[[int, Tensor], bool]) -> list[Bucket]:
        """The parameters for which ``takes_part(index, parameter)``: for moving weights before the first gradient."""
        found, known = bucketed(self.param_groups, self.trait, takes_part), self._cached[1]
        alike = len(found) == len(known) and all(map(Bucket.is_like, found, known))
        return known if alike else found  # with the memory that they keep

    def step_base(self) -> list[list[Tensor]]:
        """See `Perturbs.step_base`; ranks that perturb alone average their gradients first."""
        self._average_once()
        return super().step_base()

    def hyper(self, name: str) -> list[Any]:
        """The present value of a hyper-parameter, one per bucket."""
        return [bucket.group[self.key(name)] for bucket in self._buckets]

    def key(self, name: str) -> str:
        """The key in ``param_groups`` of an own hyper-parameter: its name, or apart from the base's of that name."""
        return self._keys.get(name, name)

    def common(self, name: str) -> Any:
        """The present value of a hyper-parameter that decides for all groups at once.

        Raises:
            SpecError: groups differ in it.
        """
        first, *others = (group[self.key(name)] for group in self.param_groups)
        if any(other != first for other in others):
            raise SpecError(
                f"{type(self).__name__}: {name} decides for all groups at once; give all the same."
            )
        return first

    def descend(self, gradient: Vector) -> None:
        """Hand `gradient` to the base optimizer in place of what the last pass left in ``.grad``."""
        for bucket, tensors in zip(self._buckets, gradient.tensors, strict=True):
            dtype = bucket.params[0].dtype
            given = duplicate(tensors, dtype) if tensors[0].dtype != dtype else tensors
            for owner, tensor in zip(bucket.owners, given, strict=True):
                owner.grad = as_gradient(owner, tensor)

    # -- the step ------------------------------------------------------------------------------------------------

    def passes(self, scaler: torch.amp.GradScaler | None = None) -> Generator[Pass, None, None]:
        """Ask for one gradient per iteration: zeroed before each, to be filled by backward before the next.

        Args:
            scaler: the scaler that scales the losses. Algorithms then see true gradients, an inf in any pass makes
                the scaler lower its scale, and ``scaler.step(optimizer)`` and ``scaler.update()`` follow once.

        Raises:
            RuntimeError: if another loop over `passes` has not ended.
        """
        if self._stage == "open":
            raise RuntimeError(
                "a loop over passes() is still open; its weights may be perturbed. Close it first."
            )
        outcome: Literal["idle", "ready", "skip"] = "idle"
        self._reset()
        self._stage, self._scaled = "open", scaler is not None
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        algorithm, asked, first, along = self.algorithm(), [], None, math.nan
        try:
            with torch.no_grad():
                request = next(algorithm)
            for number in itertools.count(1):
                one = request or Pass()
                one.number, one.perturbed = number, self._is_perturbed
                self._last = one
                asked.append(one)
                drop(self.param_groups)
                statistics = number == 1 if one.statistics is None else one.statistics
                torch.clear_autocast_cache()  # an autocast around all passes would keep casts of other weights
                with self.module.during(statistics=statistics, average=one.final):
                    yield one
                with torch.no_grad():
                    gradient = None
                    if one.gradient:
                        multiply(self.param_groups, 1 / scale)
                        if not self._buckets:
                            self._buckets = self._bucketed()
                        gradient = gradient_of(self._buckets)
                        if not self._is_finite(gradient):
                            outcome = "skip"
                            self._skip(number)
                            return
                        if first is None:
                            first = gradient.norm, gradient.copied() if self.diagnose else None
                        elif self.diagnose and one.perturbed and first[1] is not None:
                            along = cosine(first[1], gradient)
                    try:
                        request = algorithm.send(gradient)
                    except StopIteration:
                        self._average_once()
                        multiply(self.param_groups, scale)
                        self._observed = (asked, 0.0 if first is None else first[0], along)
                        outcome = "ready"
                        return
                    del gradient
        finally:
            with torch.no_grad():
                algorithm.close()  # leaves `perturbed` blocks, which restore the weights
            self._buckets, self._stage = [], outcome
            self._note_left()

    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """Run the passes with `closure` and step the base; without one, step the base after a `passes` loop.

        Returns:
            What the closure returned in the first pass (the loss at the unperturbed weights); None without closure.

        Raises:
            RuntimeError: without a closure, if no loop over `passes` was completed since the last step; called by a
                `GradScaler` with a closure, or after a loop that was not given the scaler.
        """
        by_scaler = hasattr(self, "found_inf")  # set by GradScaler.step around its call
        loss = None
        if closure is not None and self._stage in ("ready", "skip"):
            # trainers that let the user call backward hand over a closure that does nothing
            if closure() is not None:
                raise RuntimeError(
                    "the loop over passes() has taken this step's gradients: call step() after it."
                )
        elif closure is not None:
            if by_scaler:
                raise RuntimeError(
                    "scaler.step(optimizer, closure) cannot unscale the gradients of several passes: write "
                    "`for _ in optimizer.passes(scaler): ... scaler.scale(loss).backward()`, then "
                    "scaler.step(optimizer) and scaler.update()."
                )
            self._tell_dropped()
            with closing(self.passes()) as passes:
                for one in passes:
                    with torch.set_grad_enabled(one.gradient):
                        value = closure(one) if self.closure_takes_pass else closure()
                    if one.loss is None:  # else p.mean() has told
                        one.loss = value.detach() if isinstance(value, Tensor) else value
                    if one.number == 1:
                        loss = value
        if self._stage in ("idle", "open"):
            raise RuntimeError(
                f"{type(self).__name__}.step() without a closure needs a completed loop "
                "`for _ in optimizer.passes(): ... loss.backward()` before it; or call step(closure)."
            )
        if by_scaler:
            raise RuntimeError(
                "the losses were scaled, so the loop must be `for _ in optimizer.passes(scaler)`: rules that "
                "compare gradients with anything else need their true size."
            )
        stage, self._stage = self._stage, "idle"
        if stage == "skip":
            return loss
        self._finish()
        return loss

    # -- within a step -------------------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # True makes GradScaler.step leave unscaling to `step`, which then can tell what is wrong; after a loop over
        # passes(scaler) nothing is, and the scaler does as with any optimizer
        return self._stage == "idle" or (self._stage != "open" and not self._scaled)

    def _note_left(self) -> None:
        first = next(present(self.param_groups), None)
        self._left = None if first is None else weakref.ref(first)

    def _tell_dropped(self) -> None:
        """Warn once of gradients that were accumulated before the closure, which each pass has to zero."""
        first = next(present(self.param_groups), None)
        left = None if self._left is None else self._left()
        if first is None or first is left or self._dropping_told:
            return
        self._dropping_told = True
        warnings.warn(
            f"{type(self).__name__}.step(closure) found gradients that backward had left before it, and drops them: "
            "every pass needs the whole batch. Accumulate inside the closure or inside the loop over passes().",
            RuntimeWarning,
            stacklevel=4,
        )

    def _finish(self) -> None:
        self._step_base_once()
        self.steps += 1
        asked, gradient_norm, along = self._observed
        clean = [one.loss for one in asked if not one.perturbed]
        moved = [one for one in asked if one.perturbed]
        self.diagnostics = Diagnostics(
            passes=sum(one.gradient for one in asked),
            perturbed=bool(moved),
            gradient_norm=gradient_norm,
            perturbation=self._length,
            cosine=along,
            clean_loss=clean[0] if clean else None,
            perturbed_loss=moved[-1].loss if moved else None,
        )
        self._note_left()
        self._reset()

    def _bucketed(self) -> list[Bucket]:
        """The buckets of this step: mostly those of the step before."""
        has = [None if p.grad is None else p.dtype for group in self.param_groups for p in group["params"]]
        layout = (has, [id(group) for group in self.param_groups], [tuple(m) for m in self.memory.values()])
        if self._cached[0] != layout or any(bucket.ranks for bucket in self._cached[1]):
            self._cached = layout, bucketed(self.param_groups, self.trait)
        return self._cached[1]

    def _is_finite(self, gradient: Vector) -> bool:
        late = self._late()
        finite = math.isfinite(gradient.norm) and (late is None or math.isfinite(late.norm))
        if self.module.by_rank:  # all skip or none
            finite = self.module.agreed(float(finite), self.param_groups[0]["params"][0].device) == 1
        return finite

    def _late(self) -> Vector | None:
        """The gradients of parameters that had none in the first pass, if there are any: only the base sees them."""
        (had, *_), _ = self._cached
        if None not in had:
            return None
        params = (param for group in self.param_groups for param in group["params"])
        if not any(dtype is None and p.grad is not None for dtype, p in zip(had, params, strict=True)):
            return None
        known = {id(owner) for bucket in self._buckets for owner in bucket.owners}
        return gradient_of(
            self.bucketed(lambda index, param: param.grad is not None and id(param) not in known)
        )

    def _average_once(self) -> None:
        if not self.module.by_rank or self._last.final or self._stepped:
            return
        grads = list(present(self.param_groups))
        for dtype in {grad.dtype for grad in grads}:
            self.module.mean([grad for grad in grads if grad.dtype == dtype])

    def _skip(self, number: int) -> None:
        # a scaler looks for the largest scale that fits: inf is its normal
        if not self.skipped and not self._scaled:
            warnings.warn(
                f"the gradient of pass {number} is not finite: {type(self).__name__} skips this step and leaves the "
                "weights as they are. Further ones are skipped silently and counted in optimizer.skipped.",
                RuntimeWarning,
                stacklevel=3,
            )
        self.skipped += 1

    def _reset(self) -> None:
        super()._reset()
        self._stage, self._scaled = "idle", False

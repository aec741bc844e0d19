"""Sharpness-aware steps of two passes, put together from four parts: ascent, radius, descent, cadence."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from steppe.core.errors import SpecError, unknown
from steppe.optim.registry import OPTIMIZERS, optimizer_class
from steppe.optim.sharpness.ascent import Perturbation
from steppe.optim.sharpness.base import Algorithm, Base, Interval, Pass, SharpnessAware
from steppe.optim.sharpness.construction import Allowed
from steppe.optim.sharpness.vectors import Bucket, Vector, duplicate

__all__ = ["Ascent", "Cadence", "Composed", "Composition", "Descent", "Hyper", "Part", "Parts", "Radius"]

ROLES = ("ascent", "radius", "descent", "cadence")


class Hyper(NamedTuple):
    """A hyper-parameter of a part: its default and the values it may take."""

    default: Any
    allowed: Allowed


class Part:
    """What one paper adds to a step of two passes. Methods run without autograd and within a step.

    Attributes:
        optimizer: the optimizer it belongs to.
        hyper: its hyper-parameters by name.
        remembers: names of what it keeps per parameter in ``optimizer.memory``.
    """

    hyper: ClassVar[Mapping[str, Hyper]] = {}
    remembers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, optimizer: Composition, role: str, keys: Mapping[str, str]) -> None:
        self.optimizer, self.role, self.keys = optimizer, role, dict(keys)

    def of(self, group: Mapping[str, Any], name: str) -> Any:
        """The present value of a hyper-parameter in a group."""
        return group[self.optimizer.key(self.keys[name])]

    def each(self, name: str) -> list[Any]:
        """The present value of a hyper-parameter, one per bucket."""
        return [self.of(bucket.group, name) for bucket in self.optimizer.buckets]

    def one(self, name: str) -> Any:
        """The present value of a hyper-parameter that decides for all groups at once."""
        return self.optimizer.common(self.keys[name])

    def trait(self, index: int, name: str | None, param: Tensor) -> Hashable:
        """What decides the bucket of a parameter, see `SharpnessAware.trait`."""
        return None

    def trait_of(self, bucket: Bucket) -> Any:
        """What `trait` said of the parameters of a bucket."""
        return bucket.trait[ROLES.index(self.role)]  # type: ignore[index]

    def average(self, name: str, g: Vector, weights: Sequence[float]) -> None:
        """m ← m + weight · (g − m) in the memory of that name, one weight per bucket; g where there is no m yet."""
        memory = self.optimizer.memory[name]
        for bucket, gs, weight in zip(g.buckets, g.tensors, weights, strict=True):
            if bucket.indices[0] in memory:
                torch._foreach_lerp_([memory[i] for i in bucket.indices], gs, weight)
            else:
                memory.update(zip(bucket.indices, duplicate(gs), strict=True))

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise a `SpecError` if values of a group do not go together."""

    @classmethod
    def objection(cls, parts: Parts) -> str | None:
        """Why this part means nothing beside the others, or None."""
        return None


class Ascent(Part):
    """Which way e points."""

    keeps_gradient: ClassVar[bool] = False

    def perturbation(self, g: Vector, rho: Sequence[float]) -> Perturbation:
        """e from the gradient at w and the radius of each bucket; the gradient must stay as it is or be `taken`."""
        raise NotImplementedError

    def observe(self, p: Vector) -> None:
        """Take note of p, the gradient at w + e, which is not to be held."""

    def update(self, g: Vector) -> None:
        """Take note of g, which is not to be held, in every step, after its last pass; only with `keeps_gradient`."""


class Radius(Part):
    """How long e is."""

    hyper: ClassVar[Mapping[str, Hyper]] = {"rho": Hyper(0.05, Interval(0))}

    def rho(self) -> list[float]:
        """The radius, one per bucket."""
        return self.each("rho")


class Descent(Part):
    """What the base gets: here p, the gradient at w + e."""

    keeps_gradient: ClassVar[bool] = False

    @property
    def takes_pass(self) -> bool:
        """Whether the closure has to be told of the pass, see `SharpnessAware`."""
        return False

    def passes(self) -> tuple[Pass, Pass]:
        """What is asked for at w and at w + e: here the gradient of the batch."""
        return Pass(), Pass()

    def combined(self, g: Vector, p: Vector) -> Vector:
        """The gradient for the base, which may be written over p; g must stay as it is."""
        return p


class Cadence(Part):
    """Which steps are perturbed: here all."""

    keeps_gradient: ClassVar[bool] = False

    def perturbs(self, g: Vector) -> bool:
        """Whether this step is perturbed; the same on all ranks."""
        return True

    def otherwise(self, g: Vector) -> Vector:
        """What the base gets in a step that is not, which may be written over g."""
        return g

    def update(self, g: Vector, combined: Vector | None) -> None:
        """Take note of a step, after its last pass; `combined` is None if it was not perturbed.

        With `keeps_gradient`, g may be overwritten and held after a perturbed step. `combined` may not: it is what
        the base gets.
        """


class Parts(NamedTuple):
    """The four parts of a composition, as classes."""

    ascent: type[Ascent]
    radius: type[Radius] = Radius
    descent: type[Descent] = Descent
    cadence: type[Cadence] = Cadence


class Composition(SharpnessAware):
    """The base class of optimizers that are made of `parts`.

    Args:
        params, base, rest: see `SharpnessAware`.
        own: hyper-parameters of the parts. A name that two parts have is kept apart by role: ``descent_alpha``,
            ``cadence_alpha``.
    """

    parts: Parts
    ascent: Ascent
    radius: Radius
    descent: Descent
    cadence: Cadence

    def __init__(self, params: Any, base: Base, rest: Mapping[str, Any], **own: Any) -> None:
        keys = named(self.parts)
        for role, part in zip(ROLES, self.parts, strict=True):
            setattr(self, role, part(self, role, keys[role]))
        self.allowed = {
            keys[role][name]: hyper.allowed
            for role, part in zip(ROLES, self.parts, strict=True)
            for name, hyper in part.hyper.items()
        }
        self.remembers = tuple(name for part in self.parts for name in part.remembers)
        super().__init__(params, base, rest, **own)

    @property
    def closure_takes_pass(self) -> bool:  # type: ignore[override]
        """What the descent says."""
        return self.descent.takes_pass

    def check(self, group: Mapping[str, Any]) -> None:
        """Also what a part has to say about several values."""
        super().check(group)
        for part in self._bound:
            part.check(group)

    def trait(self, index: int, name: str | None, param: Tensor) -> Hashable:
        """What each part says."""
        return tuple(part.trait(index, name, param) for part in self._bound)

    def algorithm(self) -> Algorithm:
        """∇L(w), then mostly ∇L(w + e), then what the base gets of them."""
        ascent, descent, cadence = self.ascent, self.descent, self.cadence
        at_clean, at_perturbed = descent.passes()
        g = yield at_clean
        if not cadence.perturbs(g):
            ascent.update(g)
            cadence.update(g, None)
            plain = cadence.otherwise(g)
            if plain is not g:
                self.descend(plain)
            return
        keeps = any(part.keeps_gradient for part in (ascent, descent, cadence))
        g.disposable = not (descent.keeps_gradient or cadence.keeps_gradient)
        with self.perturbed(ascent.perturbation(g, self.radius.rho())):
            if not keeps:
                g = None  # its memory is free for the pass
            given_as_it_is = type(descent).combined is Descent.combined
            at_perturbed.final = given_as_it_is and not cadence.keeps_gradient
            p = yield at_perturbed
        if keeps:
            g.disposable = not (ascent.keeps_gradient or cadence.keeps_gradient)
        ascent.observe(p)
        combined = descent.combined(g, p)
        if combined is not p:
            self.descend(combined)
        ascent.update(g)
        cadence.update(g, combined)

    @property
    def _bound(self) -> tuple[Part, ...]:
        return self.ascent, self.radius, self.descent, self.cadence


PartOf: TypeAlias = str | type[Part]


class Composed(Composition):
    """A combination of your own: any ascent with any radius, descent and cadence.

    A part is taken from the optimizer that brought it, by registry key, or is a class of your own ::

        Composed(params, base="adamw", ascent="asam", descent="gsam", cadence="looksam",
                 descent_alpha=0.4, cadence_alpha=0.7, k=5, lr=1e-3)

    Hyper-parameters have the names and defaults that they have in the optimizer that lends the part; one that two
    parts have is kept apart by role, as here ``alpha``. How they go together is told by `Composition.algorithm`.
    Checkpoints name the parts, and are refused by another combination.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        ascent: which way e points.
        radius: how long e is; None for that of the optimizer that lends the ascent, whose scale it is measured on.
        descent: what the base gets.
        cadence: which steps are perturbed.
        rest: hyper-parameters of the parts, of the base, and what `SharpnessAware` takes.

    Raises:
        SpecError: an optimizer that has no such part to lend, parts that mean nothing together, or a name that does
            not say whose hyper-parameter is meant.
    """

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        ascent: PartOf = "sam",
        radius: PartOf | None = None,
        descent: PartOf = "sam",
        cadence: PartOf = "sam",
        **rest: Any,
    ) -> None:
        if radius is None:
            radius = ascent if isinstance(ascent, str) else "sam"
        given = dict(zip(ROLES, (ascent, radius, descent, cadence), strict=True))
        lent = {role: _lent(role, part) for role, part in given.items()}
        self.parts = Parts(*(part for part, _ in lent.values()))
        _require_sense(self.parts, given)
        keys = named(self.parts)
        own = {
            keys[role][name]: value for role, (_, values) in lent.items() for name, value in values.items()
        }
        for name in rest.keys() - own.keys():
            apart = [keys[role][name] for role in ROLES if name in keys[role]]
            if apart:
                raise SpecError(
                    f"two parts have a hyper-parameter {name!r}: give {' or '.join(apart)} instead."
                )
        for name in own.keys() & rest.keys():
            own[name] = rest.pop(name)
        super().__init__(params, base, rest, **own)

    @property
    def title(self) -> str:
        """The class and its parts, so that a checkpoint tells of them."""
        return f"{type(self).__name__}({', '.join(part.__name__ for part in self.parts)})"


def named(parts: Parts) -> dict[str, dict[str, str]]:
    """Role -> a part's own names -> names in ``param_groups``, apart by role where two parts have the same."""
    names = [name for part in parts for name in part.hyper]
    return {
        role: {name: f"{role}_{name}" if names.count(name) > 1 else name for name in part.hyper}
        for role, part in zip(ROLES, parts, strict=True)
    }


_KINDS: dict[str, type[Part]] = {"ascent": Ascent, "radius": Radius, "descent": Descent, "cadence": Cadence}


def _lent(role: str, part: PartOf) -> tuple[type[Any], dict[str, Any]]:
    """A part, and the defaults of its hyper-parameters where it comes from."""
    kind = _KINDS[role]
    if not isinstance(part, str):
        if not (isinstance(part, type) and issubclass(part, kind)):
            raise SpecError(f"{role}={part!r} is neither a registry key nor a subclass of {kind.__name__}.")
        return part, {name: hyper.default for name, hyper in part.hyper.items()}
    if part not in OPTIMIZERS and ":" not in part:
        raise SpecError(unknown(f"lender of {role}", part, _lenders()))
    cls = optimizer_class(part)
    lends = getattr(cls, "parts", None)
    if lends is None:
        why = (
            "takes one gradient per step"
            if not issubclass(cls, SharpnessAware)
            else "is made of parts of other optimizers"
            if issubclass(cls, Composition)
            else "is not made of parts (its passes are its own)"
        )
        raise SpecError(
            f"{role}={part!r}: {cls.__name__} {why}, so it has no {role} to lend. Lenders: {', '.join(_lenders())}."
        )
    found: type[Part] = getattr(lends, role)
    arguments, keys = inspect.signature(cls).parameters, named(lends)[role]
    values = {}
    for name, hyper in found.hyper.items():
        argument = arguments.get(keys[name])
        given = argument is not None and argument.default is not argument.empty
        values[name] = argument.default if argument is not None and given else hyper.default
    return found, values


def _lenders() -> list[str]:
    """The registered optimizers that are made of parts."""
    return sorted(
        key
        for key, spec in OPTIMIZERS.items()
        if spec.family == "sharpness-aware" and hasattr(spec.load(), "parts")
    )


def _require_sense(parts: Parts, given: Mapping[str, PartOf]) -> None:
    """Raise a `SpecError` if a part means nothing beside the others."""
    names = [name for part in parts for name in part.remembers]
    for role, part in zip(ROLES, parts, strict=True):
        twice = [name for name in part.remembers if names.count(name) > 1]
        reason = f"another part remembers {twice[0]!r} too." if twice else part.objection(parts)
        if reason:
            raise SpecError(f"{role}={given[role]!r} in this combination: {reason}")

"""Sharpness-aware steps of two passes, put together from four parts: ascent, radius, descent, cadence."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from steppe.core.errors import SpecError
from steppe.optim.registry import optimizer_class
from steppe.optim.sharpness.ascent import Perturbation
from steppe.optim.sharpness.base import Algorithm, Base, Interval, Pass, SharpnessAware
from steppe.optim.sharpness.construction import Allowed
from steppe.optim.sharpness.vectors import Bucket, Vector

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

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise a `SpecError` if values of a group do not go together."""

    def objection(self, parts: Parts) -> str | None:
        """Why this part means nothing beside the others, or None."""
        return None


class Ascent(Part):
    """Which way e points."""

    keeps_gradient: ClassVar[bool] = False

    def perturbation(self, g: Vector, rho: Sequence[float]) -> Perturbation:
        """e from the gradient at w, which must stay as it is, and the radius of each bucket."""
        raise NotImplementedError

    def update(self, g: Vector) -> None:
        """Take note of g, in every step, after its last pass; only with `keeps_gradient`."""


class Radius(Part):
    """How long e is."""

    hyper: ClassVar[Mapping[str, Hyper]] = {"rho": Hyper(0.05, Interval(0))}

    def rho(self) -> list[float]:
        """The radius, one per bucket."""
        return self.each("rho")


class Descent(Part):
    """What the base gets: here p, the gradient at w + e."""

    keeps_gradient: ClassVar[bool] = False

    def combined(self, g: Vector, p: Vector) -> Vector:
        """The gradient for the base, which may be written over p."""
        return p


class Cadence(Part):
    """Which steps are perturbed: here all."""

    keeps_gradient: ClassVar[bool] = False

    def perturbs(self, g: Vector) -> bool:
        """Whether this step is perturbed; the same on all ranks."""
        return True

    def otherwise(self, g: Vector) -> Vector:
        """What the base gets in a step that is not."""
        return g

    def update(self, g: Vector, combined: Vector) -> None:
        """Take note of a perturbed step; g may be overwritten, what the base gets may not."""


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
        g = yield
        ascent, descent, cadence = self.ascent, self.descent, self.cadence
        if not cadence.perturbs(g):
            plain = cadence.otherwise(g)
            if plain is not g:
                self.descend(plain)
            ascent.update(g)
            return
        keeps = any(part.keeps_gradient for part in (ascent, descent, cadence))
        with self.perturbed(ascent.perturbation(g, self.radius.rho())):
            if not keeps:
                g = None  # its memory is free for the pass
            p = yield Pass(final=type(descent) is Descent)
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
                 rho=0.5, descent_alpha=0.4, cadence_alpha=0.7, k=5, lr=1e-3)

    Hyper-parameters have the names and defaults that they have in the parts; one that two parts have is kept apart
    by role, as here ``alpha``.

    Args:
        params: see `SharpnessAware`.
        base: see `SharpnessAware`.
        ascent: which way e points.
        radius: how long e is.
        descent: what the base gets.
        cadence: which steps are perturbed.
        rest: hyper-parameters of the parts, of the base, and what `SharpnessAware` takes.

    Raises:
        SpecError: an optimizer that has no such part to lend, or parts that mean nothing together.
    """

    def __init__(
        self,
        params: Any,
        base: Base = torch.optim.SGD,
        *,
        ascent: PartOf = "sam",
        radius: PartOf = "sam",
        descent: PartOf = "sam",
        cadence: PartOf = "sam",
        **rest: Any,
    ) -> None:
        given = dict(zip(ROLES, (ascent, radius, descent, cadence), strict=True))
        self.parts = Parts(**{role: _lent(role, part) for role, part in given.items()})
        own = defaults(self.parts)
        for name in own.keys() & rest.keys():
            own[name] = rest.pop(name)
        super().__init__(params, base, rest, **own)
        for part in self._bound:
            reason = part.objection(self.parts)
            if reason:
                raise SpecError(f"{part.role}={given[part.role]!r} in this combination: {reason}")


def named(parts: Parts) -> dict[str, dict[str, str]]:
    """Role -> a part's own names -> names in ``param_groups``, apart by role where two parts have the same."""
    names = [name for part in parts for name in part.hyper]
    return {
        role: {name: f"{role}_{name}" if names.count(name) > 1 else name for name in part.hyper}
        for role, part in zip(ROLES, parts, strict=True)
    }


def defaults(parts: Parts) -> dict[str, Any]:
    """Name in ``param_groups`` -> default."""
    keys = named(parts)
    return {
        keys[role][name]: hyper.default
        for role, part in zip(ROLES, parts, strict=True)
        for name, hyper in part.hyper.items()
    }


_KINDS: dict[str, type[Part]] = {"ascent": Ascent, "radius": Radius, "descent": Descent, "cadence": Cadence}


def _lent(role: str, part: PartOf) -> type[Any]:
    kind = _KINDS[role]
    if isinstance(part, str):
        cls = optimizer_class(part)
        lends = getattr(cls, "parts", None)
        if lends is None:
            raise SpecError(
                f"{role}={part!r}: {cls.__name__} is not made of parts (its passes are its own), so it has no "
                f"{role} to lend."
            )
        return getattr(lends, role)
    if not (isinstance(part, type) and issubclass(part, kind)):
        raise SpecError(f"{role}={part!r} is neither a registry key nor a subclass of {kind.__name__}.")
    return part

"""Parts put together: every pair of registered parts, what is refused, names, checkpoints, the named combinations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steppe.core.errors import SpecError
from steppe.core.spec import Spec
from steppe.optim import OPTIMIZERS, Composed, create
from steppe.optim.sharpness.ascent import Perturbation, steepest
from steppe.optim.sharpness.composition import (
    ROLES,
    Ascent,
    Cadence,
    Composition,
    Descent,
    Hyper,
    Parts,
    Radius,
    named,
)
from steppe.optim.sharpness.construction import Interval
from steppe.optim.sharpness.vectors import Vector
from steppe.testing import Rig

SPEC = OPTIMIZERS["composed"]
LENDERS = [
    key
    for key, spec in OPTIMIZERS.items()
    if spec.family == "sharpness-aware" and isinstance(getattr(spec.load(), "parts", None), Parts)
]
COMBINATIONS = ["look_agsam", "friendly_gsam", "ae_vasso"]


def parts_of(key: str) -> Parts:
    parts: Parts = OPTIMIZERS[key].load().parts
    return parts


# role -> part -> the optimizer that brought it
BROUGHT: dict[str, dict[type, str]] = {role: {} for role in ROLES}
for key in sorted(LENDERS, key=COMBINATIONS.count):  # which bring nothing of their own
    for role, part in zip(ROLES, parts_of(key), strict=True):
        BROUGHT[role].setdefault(part, key)

PAIRS = [
    pytest.param({one: a, other: b}, id=f"{one}={a}-{other}={b}")
    for one, other in itertools.combinations(ROLES, 2)
    for a, b in itertools.product(BROUGHT[one].values(), BROUGHT[other].values())
]


def composed(given: dict[str, Any], **hyper: Any) -> Rig:
    """A small run; every schedule ends after six steps."""
    lenders = {"ascent": "sam", "radius": "sam", "descent": "sam", "cadence": "sam", **given}
    parts = Parts(*(getattr(parts_of(lenders[role]), role) for role in ROLES))
    for names in named(parts).values():
        hyper.update((name, 6) for own, name in names.items() if own == "total_steps")
    return Rig(SPEC, {"lr": 0.05, "momentum": 0.9, **lenders, **hyper})


def refused(given: dict[str, str]) -> str | None:
    """The reason that has to be given, or None."""
    if given.get("radius") == "late_sam" and given.get("cadence") != "late_sam":
        return "its ramp begins where the late phase does"
    if given.get("radius") == "rwp" and given.get("ascent") != "rwp":
        return "this ascent draws none"
    if given.get("descent") == "wsam" and given.get("cadence") == "looksam":
        return "finds nothing to use again"
    return None


@pytest.mark.parametrize("given", PAIRS)
def test_every_pair_trains_restores_and_resumes_or_says_why_not(given: dict[str, str]) -> None:
    reason = refused(given)
    if reason:
        with pytest.raises(SpecError, match=reason):
            composed(given)
        return
    straight, rig = composed(given), composed(given)
    start = straight.weights()
    straight.train(6)
    for step in range(6):
        before = rig.weights()
        rig.tell()
        for p in rig.optimizer.passes():
            if p.number == 2:  # where the weights are perturbed
                break
            with torch.set_grad_enabled(p.gradient):
                rig.backward(p)
        else:
            rig.optimizer.step()
            rig.steps += 1
        if rig.steps == step:
            assert all(a.equal(b) for a, b in zip(before, rig.weights(), strict=True))
            rig.optimizer.zero_grad()
            rig.train(1)
        if step == 2:
            resumed = composed(given)
            resumed.model.load_state_dict(rig.model.state_dict())
            resumed.optimizer.load_state_dict(rig.optimizer.state_dict())
            resumed.steps, rig = rig.steps, resumed
    assert all(a.equal(b) for a, b in zip(straight.weights(), rig.weights(), strict=True))
    assert all(w.isfinite().all() for w in rig.weights())
    assert not any(a.equal(b) for a, b in zip(start, rig.weights(), strict=True))


def test_what_parts_remember_does_not_collide() -> None:
    names = [
        (name, role)
        for role, parts in BROUGHT.items()
        for name in {name for part in parts for name in part.remembers}
    ]
    assert len({name for name, _ in names}) == len(names)


DRAWN = {"rst", "g_rst", "rwp"}
"""What they draw is a function of the optimizer's name too."""


@pytest.mark.parametrize("key", sorted(set(LENDERS) - DRAWN))
def test_all_parts_of_one_optimizer_are_that_optimizer(key: str) -> None:
    demo = OPTIMIZERS[key].demos[0]
    member, same = Rig(OPTIMIZERS[key], demo), Rig(SPEC, {**demo, **dict.fromkeys(ROLES, key)})
    member.train(6)
    same.train(6)
    assert all(a.equal(b) for a, b in zip(member.weights(), same.weights(), strict=True))
    own = {name for names in named(parts_of(key)).values() for name in names.values()}
    assert {name: member.optimizer.defaults[name] for name in own} == {
        name: same.optimizer.defaults[name] for name in own
    }


# -- names and defaults ---------------------------------------------------------------------------------------------


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_names_that_clash_are_kept_apart_by_role() -> None:
    optimizer = Composed(
        [parameter(1.0)], descent="gsam", cadence="looksam", descent_alpha=0.3, cadence_alpha=0.6, k=3
    )
    (group,) = optimizer.param_groups
    assert (group["descent_alpha"], group["cadence_alpha"], group["k"]) == (0.3, 0.6, 3)
    assert "alpha" not in group
    assert optimizer.descent.of(group, "alpha") == 0.3
    assert optimizer.cadence.of(group, "alpha") == 0.6


def test_defaults_are_those_of_the_lender() -> None:
    (group,) = Composed([parameter(1.0)], ascent="asam", cadence="looksam").param_groups
    assert (group["rho"], group["eta"], group["k"]) == (0.5, 0.01, 5)  # the radius follows the ascent
    (group,) = Composed([parameter(1.0)], ascent="asam", radius="sam").param_groups
    assert group["rho"] == 0.05


def test_groups_may_differ() -> None:
    p, q = parameter(0.0), parameter(0.0)
    optimizer = Composed([{"params": [p], "rho": 0.3}, {"params": [q]}], lr=0.0, descent="gsam")
    seen = []
    for _ in optimizer.passes():
        seen.append((p.item(), q.item()))
        p.grad, q.grad = torch.full_like(p, 3.0), torch.full_like(q, 4.0)
    assert seen[1] == pytest.approx((0.3 * 0.6, 0.05 * 0.8))


# -- parts of one's own ----------------------------------------------------------------------------------------------


class SignAscent(Ascent):
    """e = rho · sign(g) / √n."""

    hyper = {"floor": Hyper(0.0, Interval(0))}  # noqa: RUF012

    def perturbation(self, g: Vector, rho: Sequence[float]) -> Perturbation:
        return steepest(g.like([list(torch._foreach_sign(gs)) for gs in g.tensors]), rho)


class Halved(Descent):
    def combined(self, g: Vector, p: Vector) -> Vector:
        for ps in p.tensors:
            torch._foreach_mul_(ps, 0.5)
        return p


class Half(Radius):
    def rho(self) -> list[float]:
        return [rho / 2 for rho in super().rho()]


class Odd(Cadence):
    def perturbs(self, g: Vector) -> bool:
        return self.optimizer.steps % 2 == 1


def test_parts_of_your_own() -> None:
    p = parameter(0.0, 0.0)
    optimizer = Composed(
        [p], ascent=SignAscent, radius=Half, descent=Halved, cadence=Odd, rho=2.0, floor=1.0, lr=1.0
    )
    seen = []
    for _ in range(2):
        for _ in optimizer.passes():
            seen.append(p.tolist())
            p.grad = torch.tensor([1.0, -2.0], dtype=torch.float64)
        optimizer.step()
    assert seen[:2] == [[0.0, 0.0], [-1.0, 2.0]]
    assert seen[2] == pytest.approx([-1 + math.sqrt(0.5), 2 - math.sqrt(0.5)])
    assert p.tolist() == pytest.approx([-1.5, 3.0])


class AlsoRemembers(Descent):
    remembers = ("m",)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ascent": "asan"}, "unknown lender of ascent 'asan'. Did you mean 'asam'?"),
        ({"descent": "adamw"}, "AdamW takes one gradient per step, so it has no descent to lend"),
        ({"cadence": "gam"}, r"GAM is not made of parts \(its passes are its own\), so it has no cadence"),
        ({"ascent": "composed"}, "Composed is made of parts of other optimizers"),
        ({"ascent": "no.such:Thing"}, "cannot import"),
        ({"ascent": Halved}, "neither a registry key nor a subclass of Ascent"),
        ({"radius": 0.1}, "radius=0.1 is neither a registry key nor a subclass of Radius"),
        ({"radius": "late_sam"}, "radius='late_sam' in this combination: its ramp begins where"),
        ({"descent": "rwp", "cadence": "looksam", "halves": True}, "would see half only: set halves=False"),
        ({"cadence": "late_sam"}, "total_steps=None, but it must be a whole number >= 1"),
        ({"descent": "gsam", "cadence": "looksam", "alpha": 1}, "descent_alpha or cadence_alpha instead"),
        (
            {"ascent": "asam", "etta": 1},
            "unknown hyper-parameter of Composed over SGD 'etta'. Did you mean 'eta'",
        ),
        ({"ascent": "asam", "eta": -1}, "Composed: eta=-1, but it must be a number >= 0"),
        ({"ascent": "friendly_sam", "descent": AlsoRemembers}, "another part remembers 'm' too"),
    ],
)
def test_errors_say_what_to_do(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Composed([parameter(1.0)], **given)


def test_an_unknown_lender_names_the_known_ones() -> None:
    with pytest.raises(SpecError) as raised:
        Composed([parameter(1.0)], ascent="asan")
    known = str(raised.value).split("Known: ")[1].rstrip(".").split(", ")
    assert known == sorted(LENDERS)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_refused_by_another_combination() -> None:
    saved = Composed([parameter(1.0)], ascent="asam", descent="gsam").state_dict()
    other = Composed([parameter(1.0)], ascent="asam", lr=3.0)
    with pytest.raises(
        SpecError,
        match=r"written by Composed\(AdaptiveAscent, Radius, SurrogateGapDescent, Cadence\); "
        r"Composed\(AdaptiveAscent, Radius, Descent, Cadence\) cannot",
    ):
        other.load_state_dict(saved)
    with pytest.raises(SpecError, match="cannot continue it"):
        create("gsam", [parameter(1.0)]).load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 3.0
    Composed([parameter(1.0)], ascent="asam", descent="gsam").load_state_dict(saved)
    assert repr(other).startswith("Composed(AdaptiveAscent, Radius, Descent, Cadence) over SGD (")


# -- the named combinations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("look_agsam", {"ascent": "asam", "descent": "gsam", "cadence": "looksam"}),
        ("friendly_gsam", {"ascent": "friendly_sam", "descent": "gsam"}),
        ("ae_vasso", {"ascent": "vasso", "cadence": "ae_sam", "total_steps": 6}),
    ],
)
def test_named_combinations_are_one_line(key: str, given: dict[str, Any]) -> None:
    hyper = {"lr": 0.05, **{name: given[name] for name in given if name not in ROLES}}
    member, same = Rig(OPTIMIZERS[key], hyper), Rig(SPEC, {"lr": 0.05, **given})
    member.train(6)
    same.train(6)
    assert member.passes == same.passes > 6
    assert all(a.equal(b) for a, b in zip(member.weights(), same.weights(), strict=True))


@pytest.mark.parametrize("key", COMBINATIONS)
def test_named_combinations_say_that_they_are_unpublished(key: str) -> None:
    cls = OPTIMIZERS[key].load()
    assert "Unpublished" in cls.__doc__
    assert issubclass(cls, Composition)
    others = [parts_of(other) for other in LENDERS if other != key]
    assert cls.parts not in others


def test_look_agsam_uses_the_direction_that_looksam_would() -> None:
    look = composed({"ascent": "asam", "cadence": "looksam"}, lr=0.0)
    both = composed({"ascent": "asam", "cadence": "looksam", "descent": "gsam"}, lr=0.0)
    look.train(1)
    both.train(1)
    for a, b in zip(look.optimizer.memory["v"].values(), both.optimizer.memory["v"].values(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_study_of_the_combinations_has_all_their_parents() -> None:
    read_spec = pytest.importorskip("steppe.study.spec").read_spec
    study = read_spec(Path(__file__).resolve().parents[2] / "studies" / "combinations.toml")
    brought = {
        BROUGHT[role][part] for key in COMBINATIONS for role, part in zip(ROLES, parts_of(key), strict=True)
    }
    assert {*COMBINATIONS, *brought} <= set(study.optimizers)
    for label in study.optimizers:
        settings = study.optimizer(label)
        create(settings["kind"], [parameter(1.0)], base=settings["base"], **settings["hyper"])


def test_a_sharpness_part_trains_over_any_base(recwarn: Any) -> None:
    build: Callable[..., Rig] = lambda base: Rig(Spec(SPEC.path, "", ""), {"base": base, "descent": "gsam"})  # noqa: E731
    for base in ("adam", "torch.optim:RMSprop", "torch.optim:Adadelta"):
        rig = build(base)
        rig.train(3)
        assert all(w.isfinite().all() for w in rig.weights())

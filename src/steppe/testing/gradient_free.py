"""What every gradient-free optimizer has to hold, beside the part of torch's contract that concerns it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steppe.core.errors import SpecError
from steppe.core.flat import flatten
from steppe.core.seeding import generator
from steppe.core.spec import Spec
from steppe.optim.gradient_free.base import GradientFree
from steppe.optim.registry import create
from steppe.testing.every import CHECKS
from steppe.testing.rig import Check, ConformanceError, Rig, require, same

__all__ = ["GRADIENT_FREE_CHECKS"]

_STEPS = 12


class _Search:
    """An optimizer on a function of six weights, which lie in two tensors.

    As a closure it evaluates at the weights; with `together` it has ``values`` too, row by row to the same bits.
    """

    def __init__(
        self,
        spec: Spec,
        demo: Mapping[str, Any],
        fn: Callable[[Tensor], Tensor],
        *,
        groups: bool = False,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        stream = generator(0, "conformance", "search")
        self.fn = fn
        self.parameters = [
            nn.Parameter(torch.randn(shape, generator=stream, dtype=torch.float64).to(dtype))
            for shape in ((2, 2), (2,))
        ]
        params = [{"params": [param]} for param in self.parameters] if groups else self.parameters
        self.optimizer: GradientFree = create(spec, params, **demo)  # type: ignore[assignment]
        self.seen: list[tuple[float, Tensor]] = []

    def __call__(self) -> Tensor:
        at = self.weights()
        value = self.fn(at.double())
        self.seen.append((float(value), at))
        return value

    def weights(self) -> Tensor:
        """The flat vector."""
        return flatten(self.parameters)

    def train(self, steps: int) -> Tensor:
        """Take steps; returns what the last one returned."""
        loss = torch.tensor(math.nan)
        for _ in range(steps):
            loss = self.optimizer.step(self)
        return loss


class _Together(_Search):
    def values(self, theta: Tensor) -> Tensor:
        return torch.stack([self.fn(row) for row in theta])


def _bowl(x: Tensor) -> Tensor:
    return (x - torch.linspace(-1, 1, 6, dtype=x.dtype)).square().sum()


def _stairs(x: Tensor) -> Tensor:
    """Rounding and argmax: the gradient is zero wherever there is one."""
    return (4 * x).round().square().sum() + (x.argmax() != 2).to(x.dtype)


def descends(spec: Spec, demo: Mapping[str, Any]) -> None:
    """Searching over the weights of a net lowers its loss on a batch that stays the same."""
    rig = Rig(spec, demo)
    first = float(rig.backward())
    for _ in range(42):
        rig.train(1)
        rig.steps = 0
    best = rig.optimizer.best_value
    require(best < first, f"after 42 steps the loss of the batch went from {first:.4g} to {best:.4g}")


def returns_the_populations_best(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A step returns the smallest loss of its population; the best of all is kept."""
    search = _Search(spec, demo, _bowl)
    for _ in range(_STEPS):
        if search.optimizer.finished:
            break
        search.seen.clear()
        asked = search.optimizer.ask()
        got = search.train(1)
        values = torch.stack([_bowl(row) for row in asked])
        require(float(got) == float(values.min()), f"a step returned {got}, its least loss is {values.min()}")
        require(search.optimizer.best_value <= float(got), "best_value is above a loss that was seen")
    best = search.optimizer.best
    require(
        best is not None and float(_bowl(best)) == search.optimizer.best_value, "best_value is not best's"
    )


def leaves_the_incumbent(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A step leaves the incumbent in the parameters: the best so far, unless the optimizer says otherwise."""
    search = _Search(spec, demo, _bowl)
    for _ in range(_STEPS):
        search.train(1)
        weights = search.optimizer.incumbent()
        require(weights is None or same([weights], [search.weights()]), "the weights are not the incumbent")


def ask_repeats(spec: Spec, demo: Mapping[str, Any]) -> None:
    """ask() gives the same candidates until they are told, and does not touch the weights."""
    search = _Search(spec, demo, _bowl)
    for _ in range(4):
        if search.optimizer.finished:
            break
        before = search.weights()
        first, second = search.optimizer.ask(), search.optimizer.ask()
        require(first.ndim == 2 and first.shape[1] == 6, f"ask() gave shape {list(first.shape)}")
        require(first.dtype == torch.float64, f"ask() gave {first.dtype}")
        require(same([first, before], [second, search.weights()]), "a second ask() differs from the first")
        search.optimizer.tell(torch.stack([_bowl(row) for row in first]))


def survives_an_interrupted_step(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A step whose closure raises leaves no trace: weights and what follows are the same."""
    straight, broken = _Search(spec, demo, _bowl), _Search(spec, demo, _bowl)
    straight.train(2)
    broken.train(2)
    before, calls = broken.weights(), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == min(3, len(broken.optimizer.ask())):
            raise KeyboardInterrupt
        return _bowl(broken.weights())

    try:
        broken.optimizer.step(closure)
    except KeyboardInterrupt:
        require(same([before], [broken.weights()]), "an interrupted step changed the weights")
    straight.train(3)
    broken.train(3)
    require(same([straight.weights()], [broken.weights()]), "an interrupted step changed the search")


def stays_inside_bounds(spec: Spec, demo: Mapping[str, Any]) -> None:
    """No candidate ever leaves the bounds, though the start does and the loss pulls outwards."""
    low, high = torch.linspace(-0.5, 0.1, 6).double(), torch.linspace(0.2, 0.9, 6).double()
    for pull in (1.0, -1.0):
        search = _Search(spec, {**demo, "bounds": (low, high)}, lambda x, pull=pull: pull * x.sum())  # type: ignore[misc]
        for _ in range(3 * _STEPS):
            if search.optimizer.finished:
                break
            asked = search.optimizer.ask()
            require(bool(((asked >= low) & (asked <= high)).all()), "a candidate lies outside the bounds")
            search.train(1)
        weights = search.weights()
        require(bool(((weights >= low) & (weights <= high)).all()), "the weights lie outside the bounds")


def never_chooses_nan(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A loss that is NaN or infinite is never the best; where all are, the weights stay."""

    def holes(x: Tensor) -> Tensor:
        loss = _bowl(x)
        return torch.where(x[0] > 0, torch.tensor(math.nan, dtype=x.dtype), loss)

    search = _Search(spec, demo, holes)
    search.train(_STEPS)
    value = search.optimizer.best_value
    require(not math.isnan(value), "a NaN became the best loss")
    require(
        math.isinf(value) or float(holes(search.optimizer.best)) == value,  # type: ignore[arg-type]
        "the best loss is not that of the best weights",
    )
    nothing = _Search(spec, demo, lambda x: torch.tensor(math.nan, dtype=x.dtype))
    before = nothing.weights()
    nothing.train(3)
    require(nothing.optimizer.best is None, "NaN losses gave a best candidate")
    require(
        bool(nothing.weights().isfinite().all()) and nothing.weights().shape == before.shape,
        "NaN losses made the weights not finite",
    )


def ignores_groups(spec: Spec, demo: Mapping[str, Any]) -> None:
    """Two groups are one search: the same bits as one group."""
    one, two = _Search(spec, demo, _bowl), _Search(spec, demo, _bowl, groups=True)
    one.train(_STEPS)
    two.train(_STEPS)
    require(same([one.weights()], [two.weights()]), "two groups train differently from one")


def grows_before_the_start_only(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A group added before the first step is searched too; later it is an error that says so."""
    search = _Search(spec, demo, _bowl)
    extra = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    search.optimizer.add_param_group({"params": [extra]})
    require(search.optimizer.ask().shape[1] == 9, "the added group is not part of the search")
    try:
        search.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    except SpecError:
        return
    raise ConformanceError("a group was added to a search that has begun")


def takes_real_dtypes(spec: Spec, demo: Mapping[str, Any]) -> None:
    """float32 and bfloat16 weights keep their dtype; complex ones are an error."""
    for dtype in (torch.float32, torch.bfloat16):
        search = _Search(spec, demo, _bowl, dtype=dtype)
        search.train(4)
        weights = search.parameters
        require(all(param.dtype == dtype for param in weights), f"{dtype} weights changed their dtype")
        require(bool(search.weights().isfinite().all()), f"{dtype} weights are not finite")
    try:
        _Search(spec, demo, _bowl, dtype=torch.complex64)
    except SpecError:
        return
    raise ConformanceError("complex weights were accepted")


def descends_without_gradients(spec: Spec, demo: Mapping[str, Any]) -> None:
    """Rounding and argmax are no obstacle: the closure needs no gradient and gets better."""
    search = _Search(spec, demo, _stairs)
    first = float(_stairs(search.weights()))
    search.train(5 * _STEPS)
    last = search.optimizer.best_value
    require(
        last < first,
        f"on a loss of stairs the best of {5 * _STEPS} steps is {last:.4g}, the start {first:.4g}",
    )


def evaluates_together(spec: Spec, demo: Mapping[str, Any]) -> None:
    """A closure with values() takes the same path as one that is called weight vector by weight vector."""
    alone, together = _Search(spec, demo, _bowl), _Together(spec, demo, _bowl)
    alone.train(_STEPS)
    together.train(_STEPS)
    require(not together.seen, "the closure was called though it has values()")
    require(same([alone.weights()], [together.weights()]), "values() and the loop take different paths")


def a_finished_search_rests(spec: Spec, demo: Mapping[str, Any]) -> None:
    """`finished` is a sentence or empty, and a step after the end evaluates and changes nothing."""
    search = _Search(spec, demo, lambda x: x.new_zeros(()))
    for _ in range(150):
        if search.optimizer.finished:
            break
        search.train(1)
    else:
        return  # it goes on for ever, or for long
    before, generation = search.weights(), search.optimizer.generation
    search.seen.clear()
    search.train(2)
    require(not search.seen, "a step of a finished search evaluated the loss")
    require(
        same([before], [search.weights()]) and generation == search.optimizer.generation,
        "a step of a finished search changed something",
    )


GRADIENT_FREE_CHECKS: dict[str, Check] = {
    **{
        name: CHECKS[name]
        for name in (
            "resumes_exactly",
            "copies_deeply",
            "pickles",
            "leaves_the_global_rng",
            "keeps_memory_in_place",
            "runs_hooks",
            "rejects_unknown_names",
        )
    },
    **{
        check.__name__: check
        for check in (
            descends,
            returns_the_populations_best,
            leaves_the_incumbent,
            ask_repeats,
            survives_an_interrupted_step,
            stays_inside_bounds,
            never_chooses_nan,
            ignores_groups,
            grows_before_the_start_only,
            takes_real_dtypes,
            descends_without_gradients,
            evaluates_together,
            a_finished_search_rests,
        )
    },
}
"""What every gradient-free optimizer has to hold: name -> check(spec, demo). It has no learning rate, no gradient, and
evaluates a population per step, so the checks of `steppe.testing.CHECKS` on those are not among them."""

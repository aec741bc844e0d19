"""Value-only search and gradients in one optimizer: what both ways share, and the start that hands over."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from steppe.core.errors import SpecError
from steppe.core.flat import assign
from steppe.optim.gradient_free.base import GradientFree
from steppe.optim.registry import create, optimizer_class, reject_unknown

__all__ = ["Base", "ThenGradient", "WithBase"]

Base: TypeAlias = str | type[Optimizer] | Optimizer
"""A key of `steppe.optim.OPTIMIZERS` (or an import path), an optimizer class, or a ready optimizer."""

_HYBRID = "hybrid"


class WithBase(Optimizer, ABC):
    """An optimizer that now and then does something else than its base, which takes the gradient steps.

    The base owns ``param_groups`` and ``state``; this object shares both, so schedulers and checkpoints see one
    optimizer. What the hybrid itself remembers is plain data under a name of its own in `state_dict`.

    Attributes:
        base: the base optimizer.
    """

    def __init__(self, params: Any, base: Base, hyper: Mapping[str, Any]) -> None:
        name = type(self).__name__
        if isinstance(base, Optimizer):
            if hyper or params is not None:
                raise SpecError(
                    f"{name}: a ready base has its own parameters and settings: give params=None."
                )
            self.base = base
        elif isinstance(base, str):
            self.base = create(base, params, **hyper)
        else:
            reject_unknown(f"{name} over {base.__name__}", hyper, [base])
            self.base = base(params, **hyper)
        if isinstance(self.base, GradientFree | WithBase) or getattr(self.base, "closure_takes_pass", False):
            raise SpecError(
                f"{name}: {type(self.base).__name__} cannot be the base, which takes one gradient of a plain closure."
            )
        if any(param.is_complex() for param in self.params):
            raise SpecError(f"{name} treats all weights as one vector of real numbers; these are complex.")
        groups, state = self.base.param_groups, self.base.state
        # torch's constructor starts empty groups and state, which here are the base's: they are put back
        super().__init__(groups, self.base.defaults)
        self.param_groups, self.state = groups, state

    @abstractmethod
    def remembered(self) -> dict[str, Any]:
        """Plain data that `recall` goes on from."""

    @abstractmethod
    def recall(self, remembered: Mapping[str, Any]) -> None:
        """Go on where `remembered` was taken."""

    def __getattr__(self, name: str) -> Any:
        if name in ("train", "eval"):  # of bases that train at other weights than they evaluate
            return getattr(self.base, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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

    @property
    def params(self) -> list[Tensor]:
        """The parameters of all groups, in their order."""
        return [param for group in self.param_groups for param in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, over the base."""
        self.base.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base's, and under a name of its own what the hybrid remembers: plain data."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        own = {"kind": type(self).__name__, **copy.deepcopy(self.remembered())}
        state_dict = {**self.base.state_dict(), _HYBRID: own}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            SpecError: another kind of optimizer wrote it; nothing has been changed then.
        """
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        own = dict(state_dict.get(_HYBRID, {}))
        if (kind := own.pop("kind", "another optimizer")) != type(self).__name__:
            raise SpecError(f"this state was written by {kind}; {type(self).__name__} cannot continue it.")
        self.base.load_state_dict({name: value for name, value in state_dict.items() if name != _HYBRID})
        self.recall(copy.deepcopy(own))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # hooks and a scheduler's wrapper of step stay behind, as in torch
        return {
            name: value
            for name, value in vars(self).items()
            if name != "step" and not name.startswith("_optimizer_")
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__} over {self.base!r}"


class ThenGradient(WithBase):
    """Search by values for `switch` evaluations, then gradient steps from the best weights found.

    A step of the first phase evaluates one population of `first`, so the last one may pass `switch` by less than a
    population. The phase ends sooner when the search says that it is `finished`. A learning-rate schedule counts the
    steps of both phases.

    Args:
        params: what torch optimizers take.
        first: a gradient-free optimizer: key, import path, class, or a ready one over these parameters.
        base: what takes the gradient steps; see `Base`. A ready one must hold `params`.
        switch: evaluations (forward passes) after which the gradient steps begin.
        seed: of what the search draws; a ready one has its own.
        hyper: hyper-parameters of `first` and `base` together; each goes to the one that has it. Learning rate and
            step size of the search are the classes' own defaults.

    Attributes:
        first: the search.
        searching: whether the first phase still runs.
        spent: evaluations of the first phase so far.

    Raises:
        SpecError: `first` needs gradients, a hyper-parameter is unknown, or both optimizers have it.
    """

    def __init__(
        self,
        params: Any,
        first: str | type[GradientFree] | GradientFree = "cma_es",
        base: Base = "adam",
        switch: int = 1000,
        seed: int = 0,
        **hyper: Any,
    ) -> None:
        if switch < 1:
            raise SpecError(f"ThenGradient: switch={switch}, but the search needs at least one evaluation.")
        searches, descends = (optimizer_class(x) if isinstance(x, str) else x for x in (first, base))
        kinds = [x if isinstance(x, type) else type(x) for x in (searches, descends)]
        if not issubclass(kinds[0], GradientFree):
            raise SpecError(f"ThenGradient: first={first!r} is not gradient-free; it may be base.")
        reject_unknown("ThenGradient", hyper, kinds)
        shares = [{name: value for name, value in hyper.items() if _takes(kind, name)} for kind in kinds]
        if both := shares[0].keys() & shares[1].keys():
            raise SpecError(
                f"ThenGradient: {kinds[0].__name__} and {kinds[1].__name__} both take {', '.join(sorted(both))}: "
                "give one of them ready-made, with its own."
            )
        super().__init__(None if isinstance(base, Optimizer) else params, base, shares[1])
        self.first: GradientFree
        if isinstance(searches, GradientFree):
            if list(map(id, searches.params)) != list(map(id, self.params)):
                raise SpecError("ThenGradient: the ready search is over other parameters than the base.")
            self.first = searches
        else:
            search: Any = kinds[0]
            drawn = {"seed": seed} if _takes(search, "seed") else {}
            self.first = search(self.params, **drawn, **shares[0])
        self.switch, self.spent, self.searching = switch, 0, True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One population of the search, or one step of the base.

        Returns the smallest loss of the population, or what the base returns.
        """
        if closure is None:
            raise SpecError("ThenGradient needs a closure: step(closure).")
        if not self.searching:
            return self.base.step(closure)
        size = len(self.first.ask())
        loss = self.first.step(closure)
        self.spent += size
        self.searching = self.spent < self.switch and not self.first.finished
        if not self.searching and self.first.best is not None:
            assign(self.params, self.first.best)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, once the gradient steps have begun: a search cannot change its dimension."""
        if getattr(self, "searching", False):
            raise SpecError("ThenGradient still searches: add parameter groups once `searching` is False.")
        super().add_param_group(param_group)

    def remembered(self) -> dict[str, Any]:
        """The search while it lasts; only its cost afterwards."""
        return {"spent": self.spent, "search": self.first.state_dict() if self.searching else None}

    def recall(self, remembered: Mapping[str, Any]) -> None:
        """See `WithBase.recall`."""
        self.spent, search = remembered["spent"], remembered["search"]
        self.searching = search is not None
        if search is not None:
            self.first.load_state_dict(search)


def _takes(cls: type, name: str) -> bool:
    try:
        reject_unknown(cls.__name__, [name], [cls])
    except SpecError:
        return False
    return True

"""A wrapper and its base as one optimizer: groups, state, checkpoints, copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from steppe.core.errors import SpecError
from steppe.optim.sharpness.vectors import Bucket

__all__ = ["OneWithBase"]

_OWN = "sharpness_aware"


class OneWithBase(Optimizer):
    """The half of `SharpnessAware` that makes wrapper and base one: they hold the same groups and the same state.

    Attributes:
        base: the base optimizer.
        skipped: number of steps skipped because a gradient was not finite.
        steps: number of completed steps.
        memory: what the algorithm remembers: name -> parameter index -> tensor.
        numbers: what it remembers besides: name -> number.
    """

    base: Optimizer
    skipped: int
    steps: int
    memory: dict[str, dict[int, Tensor]]
    numbers: dict[str, float]
    _own: tuple[str, ...]
    _cached: tuple[Any, list[Bucket]]
    _left: Any

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise a `SpecError` if a hyper-parameter of `group` has a value that is not allowed."""
        raise NotImplementedError

    def _reset(self) -> None:
        """Forget everything that only matters within a step."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The algorithm's name in checkpoints: only what has the same one can continue from there."""
        return type(self).__name__

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in torch; what it does not set, the algorithm's values included, takes the defaults.

        Raises:
            SpecError: a value that is not allowed; nothing has been added then.
        """
        own = {name: self.defaults[name] for name in self._own}
        self.check({**self.defaults, **param_group})
        self.base.add_param_group({**own, **param_group})

    def state_dict(self) -> dict[str, Any]:
        """The base's ``state_dict`` plus, under "sharpness_aware", what the algorithm itself remembers."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base.state_dict()
        state_dict[_OWN] = {
            "algorithm": self.title,
            "skipped": self.skipped,
            "steps": self.steps,
            "memory": {name: dict(tensors) for name, tensors in self.memory.items()},
            "numbers": dict(self.numbers),
        }
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
        if own["algorithm"] != self.title:
            raise SpecError(
                f"this state_dict was written by {own['algorithm']}; {self.title} cannot continue it."
            )
        memory = self._checked_memory(own["memory"])
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != _OWN})
        self.skipped, self.steps = int(own["skipped"]), int(own["steps"])
        self.memory, self.numbers = memory, dict(own["numbers"])
        self._reset()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _checked_memory(self, memory: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[int, Tensor]]:
        params = [local(param) for group in self.param_groups for param in group["params"]]
        if set(memory) != set(self.memory):
            raise SpecError(
                f"memory of {type(self).__name__}: {sorted(memory)}, expected {sorted(self.memory)}."
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

    def __getstate__(self) -> dict[str, Any]:
        # hooks and a scheduler's wrapper of step stay behind, as in torch
        return {
            name: value
            for name, value in vars(self).items()
            if name not in ("step", "_buckets", "_cached", "_left", "_last")
            and not name.startswith("_optimizer_")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._cached, self._left = (None, []), None
        self._reset()
        super().__setstate__(state)

    def __repr__(self) -> str:
        return f"{self.title} over {self.base!r}"


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard of a DTensor, else the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "device_mesh") else tensor  # type: ignore[attr-defined]

"""Gradient steps in stages, each from new weights: basin hopping, and restarts where an adviser says."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from steppe.core.errors import SpecError
from steppe.core.flat import assign, flatten
from steppe.core.seeding import generator
from steppe.optim.gradient_free.base import population_values
from steppe.optim.gradient_free.hybrid import Base, WithBase
from steppe.optim.gradient_free.proposer import Adviser, Proposer, Trial, proposer_of

__all__ = ["BasinHopping", "Proposed", "Stages"]


class Stages(WithBase):
    """Stages of `every` gradient steps; each but the first begins by moving to weights that a subclass chooses.

    The move comes first in a stage's first step, so that the last step of a stage leaves the weights it has reached.
    Their loss is evaluated then, and every value that choosing takes is one call of the closure: a forward pass of
    a `steppe.core.Objective`, which counts it. The base starts every stage without state (moments of other weights
    say nothing here) and with its groups as they are, learning rates of a scheduler included.

    An exception, from the closure or in choosing, leaves no trace: the step can be taken again.

    Losses of different mini-batches are compared as they come: use the whole data, or stages long enough.

    Attributes:
        steps: completed steps.
        best, best_value: the weights ``[dim]`` (float64, CPU) with the smallest loss that was seen, and this loss.
    """

    best: Tensor | None
    best_value: float
    memory: dict[str, Any]

    def __init__(self, params: Any, base: Base, every: int, hyper: Mapping[str, Any]) -> None:
        super().__init__(params, base, hyper)
        if every < 1:
            raise SpecError(f"{type(self).__name__}: every={every}, but a stage needs at least one step.")
        self.every, self.steps = every, 0
        self._forget()
        self._unused = self.base.state_dict()  # of a base that has not begun

    @abstractmethod
    def start(self, here: Trial, values: Callable[[Tensor], Tensor]) -> tuple[Trial, dict[str, Any]]:
        """Where the next stage starts, and the next memory.

        Args:
            here: what the last stage has reached.
            values: losses ``[n]`` of weights ``[n, dim]``; each costs an evaluation.

        Returns:
            The start; its value may be infinite where it was not evaluated.
        """

    def seen(self, trial: Trial) -> None:
        """Called with each step's weights and loss, which the gradient brings along at no cost."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the base; before it, where a stage begins, the move. Returns what the base returns."""
        if closure is None:
            raise SpecError(f"{type(self).__name__} needs a closure: step(closure).")
        where = self._weights()
        if self.steps == 0 or self.steps % self.every:
            loss = self.base.step(closure)
            tried = [Trial(where, _number(loss))]
        else:

            def values(theta: Tensor) -> Tensor:
                return population_values(closure, self.params, theta)

            here = Trial(where, float(values(where.unsqueeze(0))))
            start, memory = self.start(here, values)
            before = self.base.state_dict()
            try:
                assign(self.params, start.weights)
                begun = self._weights()  # as rounded to the parameters' type
                self.base.load_state_dict({**self._unused, "param_groups": before["param_groups"]})
                loss = self.base.step(closure)
            except BaseException:
                assign(self.params, where)
                self.base.load_state_dict(before)
                raise
            self.memory = memory
            tried = [here, start, Trial(begun, _number(loss))]
        self.steps += 1
        for trial in tried:
            if trial.value < self.best_value:
                self.best, self.best_value = trial.weights.clone(), trial.value
        self.seen(tried[-1])
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. The weights that are remembered have fewer numbers than there are now, and are forgotten."""
        super().add_param_group(param_group)
        if hasattr(self, "_unused"):
            self._unused["param_groups"] = self.base.state_dict()["param_groups"]
            self._forget()

    def _forget(self) -> None:
        self.best, self.best_value, self.memory = None, math.inf, {}

    def remembered(self) -> dict[str, Any]:
        """Steps, the best and what a subclass remembers."""
        return {
            "steps": self.steps,
            "best": self.best,
            "best_value": self.best_value,
            "memory": self.memory,
        }

    def recall(self, remembered: Mapping[str, Any]) -> None:
        """See `WithBase.recall`."""
        for name in ("steps", "best", "best_value", "memory"):
            setattr(self, name, remembered[name])

    def _weights(self) -> Tensor:
        return flatten(self.params).to("cpu", torch.float64)


class BasinHopping(Stages):
    """Basin hopping (Wales & Doye 1997, J. Phys. Chem. A 101, 5111): descend, accept or go back, jump.

    A stage's end, with loss f, is accepted in place of the one accepted last, with loss f0, with the probability
    min(1, exp((f0 - f) / temperature)); the next stage starts from the accepted one plus a displacement drawn
    uniformly from [-hop, hop] for every weight. The paper descends to a minimum; here a stage is `every` steps.
    The paper adapts the displacement until half of the jumps are accepted; here it stays as given.

    Args:
        params: what torch optimizers take.
        base: what takes the gradient steps; see `steppe.optim.gradient_free.hybrid.Base`.
        hop: half the width of the displacement, in the weights' units. Default 0.5, SciPy's.
        every: steps of a stage. Default 100, ours.
        temperature: in the loss's units; 0 accepts only what is lower. Default 1.0, SciPy's.
        seed: of displacements and acceptance.
        hyper: hyper-parameters of the base.
    """

    def __init__(
        self,
        params: Any,
        base: Base = "adam",
        hop: float = 0.5,
        every: int = 100,
        temperature: float = 1.0,
        seed: int = 0,
        **hyper: Any,
    ) -> None:
        super().__init__(params, base, every, hyper)
        if hop <= 0 or temperature < 0:
            raise SpecError(f"BasinHopping: hop={hop} must be above 0, temperature={temperature} at least 0.")
        self.hop, self.temperature, self.seed = hop, temperature, seed

    def start(self, here: Trial, values: Callable[[Tensor], Tensor]) -> tuple[Trial, dict[str, Any]]:
        """Metropolis, then the jump."""
        stream = generator(self.seed, "basin_hopping", self.steps)
        chance = float(torch.rand((), generator=stream, dtype=torch.float64))
        jump = (2 * torch.rand(len(here.weights), generator=stream, dtype=torch.float64) - 1) * self.hop
        memory: dict[str, Any] = {"home": here.weights, "value": here.value}
        if self.memory:
            rise = here.value - self.memory["value"]
            if rise > 0 and (self.temperature == 0 or chance >= math.exp(-rise / self.temperature)):
                memory = self.memory
        return Trial(memory["home"] + jump, math.inf), memory


class Proposed(Stages):
    """Gradient steps that restart where an adviser says ("Two Optimizers Are Better Than One", arXiv:2405.19732).

    After `every` steps the proposer sees the trace and names `candidates`; each is probed, one forward pass, and the
    next stage starts from the best of them (a single one is not probed), whether or not it is better than what was
    reached. In the paper the adviser is a large language model and the weights a soft prompt; its published code
    never calls the model. Whether advice is worth anything is told by the controls that need none: "random_restart",
    "jitter", "quadratic_fit".

    Args:
        params: what torch optimizers take.
        base: what takes the gradient steps; see `steppe.optim.gradient_free.hybrid.Base`.
        proposer: a `Proposer`, the name of one of `PROPOSERS`, or a table with its ``kind`` and settings, such as
            ``{"kind": "command", "argv": ["my-model"]}``.
        every: steps of a stage. Default 100, ours.
        candidates: weights to ask for. Default 3, the paper's.
        keep: trials of the trace: the last ones, and the best. Each holds a vector of all weights.
        task: what the proposer is told of the problem.
        hyper: hyper-parameters of the base.

    Attributes:
        trace: what was tried, in order of time: each step's weights and loss, stage ends and probes.
        proposer: what proposes; the answers of an `Adviser` are part of `state_dict`, so none is asked for twice.
    """

    def __init__(
        self,
        params: Any,
        base: Base = "adam",
        proposer: str | Mapping[str, Any] | Proposer = "jitter",
        every: int = 100,
        candidates: int = 3,
        keep: int = 100,
        task: str = "Minimise the loss.",
        **hyper: Any,
    ) -> None:
        super().__init__(params, base, every, hyper)
        if candidates < 1 or keep < 1:
            raise SpecError(f"Proposed: candidates={candidates} and keep={keep} must both be at least 1.")
        self.proposer = proposer_of(proposer)
        self.candidates, self.keep, self.task = candidates, keep, task

    @property
    def trace(self) -> list[Trial]:
        """What was tried, in order of time."""
        return [Trial(**entry) for entry in self.memory.get("trace", [])]

    def start(self, here: Trial, values: Callable[[Tensor], Tensor]) -> tuple[Trial, dict[str, Any]]:
        """The best of the candidates."""
        trace = [*self.trace, here]
        proposed = self.proposer.propose(self.task, trace, self.candidates)
        if not proposed or any(row.shape != here.weights.shape for row in proposed):
            raise SpecError(
                f"{type(self.proposer).__name__} must propose vectors of {len(here.weights)} weights; got shapes "
                f"{[list(row.shape) for row in proposed]}."
            )
        rows = torch.stack([row.to("cpu", torch.float64) for row in proposed])
        if len(rows) == 1:
            return Trial(rows[0], math.inf), self._kept(trace)
        losses = values(rows)
        probes = [Trial(row, float(loss)) for row, loss in zip(rows, losses, strict=True)]
        return probes[int(losses.argmin())], self._kept([*trace, *probes])

    def seen(self, trial: Trial) -> None:
        """Add it to the trace."""
        self.memory = self._kept([*self.trace, trial])

    def remembered(self) -> dict[str, Any]:
        """What stages remember, and the adviser's answers."""
        answers = self.proposer.answers if isinstance(self.proposer, Adviser) else {}
        return {**super().remembered(), "answers": answers}

    def recall(self, remembered: Mapping[str, Any]) -> None:
        """See `WithBase.recall`."""
        super().recall(remembered)
        if isinstance(self.proposer, Adviser):
            self.proposer.answers |= remembered["answers"]

    def _kept(self, trace: list[Trial]) -> dict[str, Any]:
        kept = trace[-self.keep :]
        best = min(trace, key=lambda trial: trial.value)
        if not any(trial is best for trial in kept):
            kept = [best, *kept[1:]]
        return {"trace": [{"weights": trial.weights, "value": trial.value} for trial in kept]}


def _number(loss: Any) -> float:
    value = float(torch.as_tensor(loss).detach())
    return value if math.isfinite(value) else math.inf

"""The protocols of a problem."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Analysis", "Problem", "StudyProblem"]


class Problem(Protocol):
    """One model to train: its data, its loss, and the metric that early stopping watches."""

    @property
    def watch(self) -> tuple[str, int]:
        """(metric, direction): early stopping maximises ``direction * metrics(model, "validation")[metric]``."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """JSON-able: all that a trained model depends on, the data it reads (by digest) included."""
        ...

    @property
    def output_identity(self) -> Mapping[str, Any]:
        """JSON-able: what `outputs` depend on beside the model; where it changes, they are made anew."""
        ...

    @property
    def samples(self) -> int:
        """Training samples in one epoch."""
        ...

    def model(self, generator: torch.Generator) -> nn.Module:
        """A freshly initialised model: a function of the generator's state alone."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The scalar mean loss of a batch."""
        ...

    def batches(self, generator: torch.Generator) -> Iterator[Any]:
        """The batches of one training epoch, in an order drawn from the generator."""
        ...

    def full(self, split: str) -> Iterable[Any]:
        """All batches of ``"train"`` or ``"validation"`` in a fixed order."""
        ...

    def sample(self, split: str, batches: int, samples: int) -> list[Any]:
        """Part of `full`, or of ``"test"``, to look at again and again: so many batches of so many samples at most."""
        ...

    def metrics(self, model: nn.Module, split: str) -> dict[str, float]:
        """Named scores of the model on ``"train"`` or ``"validation"``."""
        ...

    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """What a finished trial leaves for the analysis, such as test scores."""
        ...


class Analysis(NamedTuple):
    """Result tables (polars) by name, and JSON-able facts for the report beside those of `StudyProblem.describe`."""

    tables: Mapping[str, Any]
    facts: Mapping[str, Any] = {}


class StudyProblem(Protocol):
    """What a study trains: one or more parts, and an analysis over the outputs of all trials."""

    @property
    def parts(self) -> Mapping[str, Problem]:
        """The separately trained parts by name."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """JSON-able facts of the data for the report."""
        ...

    def analyse(self, outputs: Mapping[tuple[str, int], Mapping[str, Mapping[str, Tensor]]]) -> Analysis:
        """What the finished trials say, from ``outputs[optimizer, seed][part]``, a part's `Problem.outputs`.

        A part whose trial has failed is not there.
        """
        ...

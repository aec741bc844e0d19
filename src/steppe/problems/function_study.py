"""Studies of test functions and small published problems: where each optimizer goes, and where it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, nn

from steppe.core.errors import SpecError, explain_validation, unknown
from steppe.core.flat import assign, flatten
from steppe.core.objective import Objective
from steppe.core.seeding import generator
from steppe.problems.architecture import architecture
from steppe.problems.cart_pole import cart_pole, cart_pole_smooth
from steppe.problems.function import Function
from steppe.problems.function_parts import FunctionPart, SmallPart
from steppe.problems.functions import FUNCTIONS, find_function
from steppe.problems.problem import Analysis
from steppe.problems.small import SMALL, Small

__all__ = ["FunctionStudy", "FunctionStudySpec"]

_SMALL = {**SMALL, "cart_pole": cart_pole, "cart_pole_smooth": cart_pole_smooth}

GRID = 121
"""Points on a side of `function_grid` and `boundary`: contours are smooth, and the page stays below a megabyte."""


class FunctionStudySpec(BaseModel):
    """Settings of `FunctionStudy`.

    Attributes:
        names: functions (`steppe.problems.functions`: a name, or a family and a dimension as in ``"rosenbrock-10"``)
            and small problems (`steppe.problems.small`); each is a part of the study.
        steps: optimizer steps of an epoch: one frame of a path.
        start: part -> initial weights, for those that do not start where published.
        spread: standard deviation of what the seed adds to the initial weights; at 0 all seeds start alike, and an
            optimizer that draws nothing does the same for each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...] = Field(min_length=1)
    steps: int = Field(default=10, ge=1)
    start: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    spread: float = Field(default=0.0, ge=0.0)

    @field_validator("names")
    @classmethod
    def _once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"names {list(names)} repeat themselves")
        return names


class FunctionStudy:
    """Functions and small problems as a study's parts (`steppe.problems.problem.StudyProblem`)."""

    def __init__(self, **settings: Any) -> None:
        try:
            self.spec = FunctionStudySpec.model_validate(settings)
        except ValidationError as error:
            raise SpecError(explain_validation(error, FunctionStudySpec, "[problem]")) from error
        for name in self.spec.start:
            if name not in self.spec.names:
                raise SpecError(f"problem.start: {unknown('part', name, self.spec.names)}")

    @cached_property
    def parts(self) -> Mapping[str, FunctionPart | SmallPart]:
        """One per name."""
        return {name: self._part(name) for name in self.spec.names}

    def _part(self, name: str) -> FunctionPart | SmallPart:
        settings = (self.spec.start.get(name), self.spec.steps, self.spec.spread)
        if name in _SMALL:
            return SmallPart(_SMALL[name](), *settings)
        if name == "architecture":  # trained when it is asked for
            return FunctionPart(architecture(), *settings)
        if name not in FUNCTIONS and "-" not in name:
            known = [*FUNCTIONS, *_SMALL, "architecture"]
            raise SpecError(f"problem.names: {unknown('function or small problem', name, known)}")
        return FunctionPart(find_function(name), *settings)

    def describe(self) -> Mapping[str, Any]:
        """``{"kind": "functions", "parts": {part: facts}}``.

        Facts of a part: title, formula, source, dim, start, bounds, minima, floor (the smallest value there is; None
        if it is not known), errors (sentences on the publication), printed (its figures), steps, classes.
        """
        return {
            "kind": "functions",
            "steps": self.spec.steps,
            "parts": {name: _facts(part) for name, part in self.parts.items()},
        }

    def analyse(self, outputs: Mapping[tuple[str, int], Mapping[str, Mapping[str, Tensor]]]) -> Analysis:
        """The tables of the report; those without a row are left out.

        - ``function_final`` (optimizer, seed, part, value, floor): the loss that each trial ended with.
        - ``function_start`` (seed, part, x, y, value): where trials of two weights began.
        - ``function_grid`` (part, x, y, value): the loss around the paths of parts of two weights.
        - ``function_minima`` (part, x, y, value): their known minima.
        - ``function_points`` (part, x, y, label): the samples of classifiers of two features.
        - ``boundary`` (optimizer, seed, part, x, y, probability): what these learned.
        """
        ends = {
            (optimizer, seed, name): left["x"]
            for (optimizer, seed), parts in outputs.items()
            for name, left in parts.items()
        }
        seeds = sorted({seed for _, seed in outputs})
        tables = {
            "function_final": _table(
                {
                    "optimizer": [optimizer],
                    "seed": [seed],
                    "part": [name],
                    "value": [self._value(name, x)],
                    "floor": [_floor(self.parts[name].task)],
                }
                for (optimizer, seed, name), x in ends.items()
            )
        }
        flat = [name for name, part in self.parts.items() if part.task.dim == 2]
        starts = {
            (seed, name): flatten(self.parts[name].model(generator(seed, "model")).parameters())
            for name in flat
            for seed in seeds
        }
        tables["function_start"] = _table(
            {"seed": [seed], "part": [name], "x": x[:1], "y": x[1:], "value": [self._value(name, x)]}
            for (seed, name), x in starts.items()
        )
        tables["function_grid"] = _table(
            self._grid(name, [x for (_, _, part), x in ends.items() if part == name], starts) for name in flat
        )
        tables["function_minima"] = _table(
            {"part": [name], "x": point[:1], "y": point[1:], "value": [_floor(self.parts[name].task)]}
            for name in flat
            for point in np.array(self.parts[name].task.minima, dtype=float).reshape(-1, 2)
        )
        drawn = {
            name: part.task
            for name, part in self.parts.items()
            if isinstance(part, SmallPart) and part.task.labels and part.task.x.shape[1] == 2
        }
        tables["function_points"] = _table(
            {"part": [name] * len(task.x), "x": task.x[:, 0], "y": task.x[:, 1], "label": task.y.int()}
            for name, task in drawn.items()
        )
        tables["boundary"] = _table(
            {"optimizer": [optimizer], "seed": [seed], "part": [name]} | _boundary(drawn[name], weights)
            for (optimizer, seed, name), weights in ends.items()
            if name in drawn
        )
        return Analysis({name: table for name, table in tables.items() if table is not None})

    def _value(self, name: str, weights: Tensor) -> float:
        part = self.parts[name]
        model = part.model(torch.Generator())
        assign(list(model.parameters()), weights)
        return part.value(model)

    def _grid(
        self, name: str, ends: list[Tensor], starts: Mapping[tuple[int, str], Tensor]
    ) -> dict[str, Any]:
        """The loss over the stated region, made wider where a trial began or ended outside."""
        part = self.parts[name]
        low, high = part.task.bounds
        known = torch.stack([*ends, *(x for (_, of), x in starts.items() if of == name), part.start])
        room = 0.05 * (high - low)
        axes = [
            torch.linspace(
                min(low, float(known[:, axis].min()) - room),
                max(high, float(known[:, axis].max()) + room),
                GRID,
                dtype=torch.float64,
            )
            for axis in (0, 1)
        ]
        theta = torch.cartesian_prod(*axes)
        (batch,) = part.full("validation")
        loss: Callable[[nn.Module, Any], Tensor] = part.loss
        values = Objective(part.model(torch.Generator()), loss, batch).values(theta)
        return {"part": [name], "x": theta[:, 0], "y": theta[:, 1], "value": values}


def _floor(task: Function | Small) -> float | None:
    return task.minimum if isinstance(task, Function) else task.floor


def _facts(part: FunctionPart | SmallPart) -> dict[str, Any]:
    task = part.task
    return {
        "title": task.title or task.name,
        "formula": task.formula,
        "source": task.source,
        "dim": task.dim,
        "start": part.start.tolist(),
        "spread": part.spread,
        "bounds": list(task.bounds),
        "minima": [list(point) for point in task.minima],
        "floor": _floor(task),
        "errors": list(task.errors),
        "printed": dict(task.printed),
        "classes": isinstance(task, Small) and task.labels,
    }


@torch.no_grad()
def _boundary(task: Small, weights: Tensor) -> dict[str, Any]:
    """The probability of class 1 over the region of the samples."""
    model = task.model()
    assign(list(model.parameters()), weights)
    axes = [
        torch.linspace(float(column.min()) - 0.5, float(column.max()) + 0.5, GRID, dtype=torch.float64)
        for column in task.x.T
    ]
    points = torch.cartesian_prod(*axes)
    return {"x": points[:, 0], "y": points[:, 1], "probability": torch.sigmoid(model(points))}


def _table(blocks: Iterable[Mapping[str, Any]]) -> pl.DataFrame | None:
    """The blocks one below the other, columns of one value repeated; None if there is no block."""
    frames = []
    for block in blocks:
        columns = {name: _column(values) for name, values in block.items()}
        rows = max(len(values) for values in columns.values())
        frames.append(
            pl.DataFrame(
                [
                    pl.Series(name, values if len(values) == rows else [values[0]] * rows)
                    for name, values in columns.items()
                ]
            )
        )
    return pl.concat(frames, how="vertical_relaxed") if frames else None


def _column(values: Any) -> list[Any] | NDArray[Any]:
    if isinstance(values, Tensor):
        return values.detach().numpy()
    return values

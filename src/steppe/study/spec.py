"""The spec of a study: a strict TOML file, resolved into the trials it asks for."""

from __future__ import annotations

import hashlib
import inspect
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steppe.core.errors import SpecError, explain_validation, unknown
from steppe.optim.registry import OPTIMIZERS, optimizer_class
from steppe.problems.problem import StudyProblem
from steppe.problems.registry import PROBLEMS

__all__ = ["LandscapeSpec", "StudySpec", "TrialSpec", "plan", "read_spec"]

IDENTITY = 3
"""Raised when the meaning of a trial changes, so that no stale result is taken for a new one."""


class LandscapeSpec(BaseModel):
    """Which landscapes and flatness measures of finished trials are wanted (`steppe.study.landscape`).

    A trained model takes about 90 CPU seconds with the defaults (GRU 6 -> 64 x 2, the native kernel).

    Attributes:
        optimizers: labels; empty for all.
        seeds: empty for the study's first. Surfaces, densities and lines between optimizers are drawn for the first
            one, measures taken for all.
        part: of the problem; None for the last daily one, or the last of all.
        surfaces: whether to draw the loss in a plane through each trial's weights, on train and test data.
        plane: of the surfaces. ``"trajectory"``: the one that holds most of the trial's way through training;
            ``"random"``: two filter-normalised directions (Li et al. 2018), the same draw for every optimizer;
            ``"eigenvectors"``: the two leading ones of the train loss's Hessian. One by one, a study may have all.
        lines: the loss on straight ways between trained weights, on train and test data, with the barrier.
            ``"optimizers"``: from the baseline (the first one where it is not among them) to each other optimizer of
            the same seed; ``"seeds"``: from the first seed to each other seed of the same optimizer.
        density: whether to estimate the spectral density of the Hessian of the train loss; about 45 CPU seconds
            more.
        measures: keys of `steppe.landscape.measures.MEASURES`; by default curvature, sharpness along the gradient and
            on average, and across time.
        measure_on: splits to take them on.
        dates, stocks: batches of a split, and samples of each, at most; evenly spaced. Fewer cost less; the largest
            eigenvalue of 1,000 samples is about 4 % above that of 4,000.
        resolution: points of a surface along each axis.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    optimizers: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    part: str | None = None
    surfaces: bool = True
    plane: Literal["trajectory", "random", "eigenvectors"] = "trajectory"
    lines: tuple[Literal["optimizers", "seeds"], ...] = ()
    density: bool = False
    measures: tuple[str, ...] = (
        "lambda_max",
        "trace",
        "sam",
        "adaptive_sam",
        "adaptive_average_case",
        "time_dispersion",
    )
    measure_on: tuple[Literal["train", "validation", "test"], ...] = ("train",)
    dates: int = Field(default=12, ge=1)
    stocks: int = Field(default=125, ge=20)
    resolution: int = Field(default=25, ge=2)

    @model_validator(mode="after")
    def _two_ends(self) -> LandscapeSpec:
        if "optimizers" in self.lines and len(self.optimizers) == 1:
            raise ValueError("lines between optimizers need two of them or more")
        if "seeds" in self.lines and len(self.seeds) < 2:
            raise ValueError("lines between seeds need two of them or more: name them in seeds")
        return self


class StudySpec(BaseModel):
    """What a study compares. Everything but the optimizer is held equal.

    Attributes:
        name: short name; the study's folder is called after it.
        title: the report's headline.
        problem: ``kind`` (a registry key) and the problem's own settings.
        base: ``kind`` and hyper-parameters of the base optimizer that every sharpness-aware optimizer wraps.
        optimizers: label -> settings; ``kind`` (a registry key or ``package.module:Class``) defaults to the label.
            An optimizer of the base's own kind, or over it, takes the base's hyper-parameters; a setting given here
            wins, ``base`` included.
        baseline: the label all others are compared with.
        seeds: initial weights and batch orders; comparisons are paired by seed.
        epochs: the budget, in passes over the training dates by the training loop.
        evaluations: a second budget, in forward passes of which a gradient is worth three; a trial ends with the step
            that reaches it. None for none.
        patience: epochs without a better validation metric before a trial stops.
        workers: local processes, one torch thread each; 0 runs in this process.
        landscape: what to look at when all is trained; None for nothing. No part of what a trial is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    title: str = ""
    problem: dict[str, Any]
    base: dict[str, Any] = Field(default_factory=dict)
    optimizers: dict[str, dict[str, Any]] = Field(min_length=1)
    baseline: str
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    epochs: int = Field(default=20, ge=1)
    evaluations: int | None = Field(default=None, ge=1)
    patience: int = Field(default=5, ge=1)
    workers: int = Field(default=2, ge=0)
    landscape: LandscapeSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> StudySpec:
        if self.baseline not in self.optimizers:
            raise ValueError(
                f"baseline {self.baseline!r} is not among the optimizers: {', '.join(self.optimizers)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} repeat themselves")
        if self.landscape:
            if "optimizers" in self.landscape.lines and len(self.optimizers) < 2:
                raise ValueError("[landscape] lines between optimizers need two of them or more")
            for what, wanted, known in (
                ("optimizer", self.landscape.optimizers, self.optimizers),
                ("seed", self.landscape.seeds, self.seeds),
            ):
                for one in wanted:
                    if one not in known:
                        raise ValueError(f"[landscape] {unknown(what, str(one), map(str, known))}")
        if "kind" not in self.problem:
            raise ValueError(f"[problem] needs a kind: one of {', '.join(PROBLEMS)}")
        return self

    def optimizer(self, label: str) -> dict[str, Any]:
        """The settings of an optimizer: ``kind``, ``base`` (or None) and ``hyper``, the base's shared ones included."""
        given = dict(self.optimizers[label])
        shared = dict(self.base)
        shared_kind = shared.pop("kind", None)
        kind = given.pop("kind", label)
        # an import path is taken at its word; a key must be known
        wraps = ":" not in kind and OPTIMIZERS[kind].family == "sharpness-aware"
        base = given.pop("base", shared_kind if wraps else None)
        if wraps and base is None:
            raise SpecError(f"optimizer {label!r} is sharpness-aware and needs a [base] table with a kind.")
        return {
            "kind": kind,
            "base": base,
            "hyper": (shared if (base or kind) == shared_kind else {}) | given,
        }

    def resolved(self) -> dict[str, Any]:
        """The spec with every default written out, as stored in the study's folder."""
        flat = {}
        for label in self.optimizers:
            optimizer = self.optimizer(label)
            base = {"base": optimizer["base"]} if optimizer["base"] else {}
            flat[label] = {"kind": optimizer["kind"]} | base | with_defaults(optimizer)
        dump: dict[str, Any] = self.model_dump(mode="json", exclude={"base", "optimizers"})
        return dump | {"optimizers": flat}


def with_defaults(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a resolved optimizer, those that were not given included.

    Of torch's own signatures the numbers count; switches such as ``foreach`` do not change the algorithm.
    """
    hyper: dict[str, Any] = {}
    for kind, plain in ((optimizer["base"], True), (optimizer["kind"], optimizer["base"] is None)):
        if kind is None:
            continue
        for name, parameter in inspect.signature(optimizer_class(kind)).parameters.items():
            value = parameter.default
            number = isinstance(value, int | float | tuple) and not isinstance(value, bool)
            if number or (not plain and isinstance(value, bool | str)):
                hyper[name] = list(value) if isinstance(value, tuple) else value
    return hyper | optimizer["hyper"]


@dataclass(frozen=True)
class TrialSpec:
    """One part of the problem under one optimizer from one seed.

    Attributes:
        id: ends in the hash of everything that the trained model depends on.
        outputs: hash of what its outputs depend on beside the model.
    """

    id: str
    part: str
    label: str
    optimizer: Mapping[str, Any]
    seed: int
    epochs: int
    patience: int
    outputs: str
    evaluations: int | None = None

    @property
    def passes(self) -> float:
        """Gradient evaluations per step, as declared: used to order the queue, never as a measured cost."""
        kind = self.optimizer["kind"]
        # without gradients a step is a population, whose size the declaration does not know
        return (OPTIMIZERS[kind].evals if kind in OPTIMIZERS else 0.0) or 1.0


def plan(spec: StudySpec, problem: StudyProblem) -> list[TrialSpec]:
    """All trials of a study, each identified by what its own part reads: other parts and later data do not matter."""

    def trials() -> Iterator[TrialSpec]:
        for seed in spec.seeds:
            for part, trained in problem.parts.items():
                outputs = _digest(trained.output_identity)
                for label in spec.optimizers:
                    optimizer = spec.optimizer(label)
                    content = {
                        "identity": IDENTITY,
                        "problem": trained.identity,
                        "part": part,
                        "optimizer": optimizer | {"hyper": with_defaults(optimizer)},
                        "seed": seed,
                        "epochs": spec.epochs,
                        "patience": spec.patience,
                    }
                    if spec.evaluations is not None:
                        content["evaluations"] = spec.evaluations
                    yield TrialSpec(
                        f"{part}-{label}-s{seed}-{_digest(content)}",
                        part,
                        label,
                        optimizer,
                        seed,
                        spec.epochs,
                        spec.patience,
                        outputs,
                        spec.evaluations,
                    )

    return list(trials())


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def read_spec(path: str | Path, overrides: Sequence[str] = ()) -> StudySpec:
    """Read a study file and apply ``key.sub=value`` overrides (values in TOML syntax, else taken as strings).

    Relative paths in ``problem.panel`` and ``problem.schema`` are taken from the study file's folder.

    Raises:
        SpecError: unreadable file, unknown key (with a did-you-mean), bad value; the message names the place.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read the study file {path}: {error.strerror}.") from error
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path} is not valid TOML: {error}.") from error
    for key in ("panel", "schema"):
        value = raw.get("problem", {}).get(key)
        if isinstance(value, str) and value != "simulated":
            raw["problem"][key] = str((path.parent / value).resolve())
    for override in overrides:
        _override(raw, override)
    try:
        return StudySpec.model_validate(raw)
    except ValidationError as error:
        raise SpecError(explain_validation(error, StudySpec, str(path))) from error


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SpecError(f"override {override!r} should read key.sub=value.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    table = raw
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise SpecError(f"override {override!r}: {parent!r} is not a table.")
    table[last] = value

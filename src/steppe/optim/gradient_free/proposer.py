"""Who says where to restart: recorded or running advisers in text, and controls that need none."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from steppe.core.errors import DataError, SpecError, unknown
from steppe.core.files import write_atomically
from steppe.core.seeding import generator

__all__ = [
    "PROPOSERS",
    "Adviser",
    "Command",
    "Jitter",
    "Proposer",
    "QuadraticFit",
    "RandomRestart",
    "Replay",
    "Trial",
    "parse",
    "proposer_of",
    "render",
]


@dataclass(frozen=True)
class Trial:
    """Weights ``[dim]`` (float64, CPU) and their loss; infinity where it is unknown or not finite."""

    weights: Tensor
    value: float


@runtime_checkable
class Proposer(Protocol):
    """Names weights to go on from. A function of its arguments: asked again, it proposes the same."""

    def propose(self, task: str, trace: Sequence[Trial], n: int) -> list[Tensor]:
        """At most `n` weights ``[dim]``, at least one.

        Args:
            task: what is known of the problem, in words.
            trace: what was tried so far, in order of time; not empty, the last is where the search stands.
            n: how many will be probed.
        """
        ...


class RandomRestart:
    """Control: weights drawn uniformly from [low, high], whatever was tried."""

    def __init__(self, low: float = -1.0, high: float = 1.0, seed: int = 0) -> None:
        self.low, self.high, self.seed = low, high, seed

    def propose(self, task: str, trace: Sequence[Trial], n: int) -> list[Tensor]:
        """See `Proposer`."""
        drawn = torch.rand(
            n, len(trace[-1].weights), generator=_stream(self.seed, trace), dtype=torch.float64
        )
        return list(self.low + (self.high - self.low) * drawn)


class Jitter:
    """Control: the best weights so far plus Gaussian noise with standard deviation `scale`."""

    def __init__(self, scale: float = 0.1, seed: int = 0) -> None:
        self.scale, self.seed = scale, seed

    def propose(self, task: str, trace: Sequence[Trial], n: int) -> list[Tensor]:
        """See `Proposer`."""
        best = _best(trace).weights
        noise = torch.randn(n, len(best), generator=_stream(self.seed, trace), dtype=torch.float64)
        return list(best + self.scale * noise)


class QuadraticFit:
    """Control: the minimum of a quadratic fitted to the trace by least squares.

    The quadratic lives in as many principal directions of the trace, seen from its best trial, as the trace has
    trials for: r directions have (r + 1)(r + 2) / 2 coefficients. A direction of negative curvature is followed
    downhill with its sign turned. The step is at most `reach` times as long as the farthest trial is away. The
    candidates are at 1, 1/2, 1/4 ... of the step.
    """

    def __init__(self, reach: float = 2.0) -> None:
        self.reach = reach

    def propose(self, task: str, trace: Sequence[Trial], n: int) -> list[Tensor]:
        """See `Proposer`."""
        best = _best(trace)
        known = [trial for trial in trace if math.isfinite(trial.value)]
        step = torch.zeros_like(best.weights)
        if known:
            away = torch.stack([trial.weights for trial in known]) - best.weights
            values = torch.tensor([trial.value for trial in known], dtype=torch.float64)
            step = self._step(away, values - best.value)
        return [best.weights + step / 2**number for number in range(n)]

    def _step(self, away: Tensor, rise: Tensor) -> Tensor:
        _, sizes, directions = torch.linalg.svd(away, full_matrices=False)
        most = int(
            (math.isqrt(8 * len(away) + 1) - 3) // 2
        )  # the largest r with (r + 1)(r + 2) / 2 <= trials
        rank = min(most, int((sizes > 1e-9 * sizes.max()).sum()))
        if rank < 1 or rise.max() == 0:
            return torch.zeros(away.shape[1], dtype=torch.float64)
        basis = directions[:rank]
        length = away.norm(dim=1).max()
        y = away @ basis.T / length
        one, two = torch.tril_indices(rank, rank)
        terms = torch.cat([torch.ones(len(y), 1, dtype=torch.float64), y, y[:, one] * y[:, two]], 1)
        # gelsd: trials on a line leave coefficients undetermined, which then are the smallest
        fit = torch.linalg.lstsq(terms, (rise / rise.max()).unsqueeze(1), driver="gelsd").solution.squeeze(1)
        slope, curve = fit[1 : rank + 1], torch.zeros(rank, rank, dtype=torch.float64)
        curve[one, two] = fit[rank + 1 :]
        bends, axes = torch.linalg.eigh(curve + curve.T)
        move = -axes @ ((axes.T @ slope) / bends.abs().clamp_min(1e-12))
        move = move * min(1.0, self.reach / max(float(move.norm()), 1e-300))
        return length * (move @ basis)


class Adviser(ABC):
    """A proposer that is asked in text and answers in text.

    Attributes:
        answers: what was answered, by the key of the prompt; no prompt is asked twice.
    """

    shown = 20
    """Trials of a prompt: the best ones."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}

    @abstractmethod
    def ask(self, prompt: str) -> str:
        """The answer to a prompt that has none yet."""

    def propose(self, task: str, trace: Sequence[Trial], n: int) -> list[Tensor]:
        """See `Proposer`.

        Raises:
            DataError: a line of the answer is not a vector of the right length, or there is none.
        """
        prompt = prompt_of(task, sorted(trace, key=lambda trial: -trial.value)[-self.shown :], n)
        key = key_of(prompt)
        answer = self.answers[key] if key in self.answers else self.ask(prompt)
        dim, found = len(trace[-1].weights), []
        for number, line in enumerate(answer.splitlines(), start=1):
            if line.strip():
                try:
                    found.append(parse(line, dim))
                except DataError as error:
                    raise DataError(f"line {number} of the answer to prompt {key}: {error}") from error
        if not found:
            raise DataError(f"the answer to prompt {key} is empty: it needs a line per candidate.")
        self.answers[key] = answer  # only once it is known to be usable
        return found[:n]

    def write(self, path: str | Path) -> None:
        """Write the answers as a transcript that `Replay` reads: a JSON object with key and answer per line."""
        lines = [json.dumps({"key": key, "answer": answer}) for key, answer in self.answers.items()]
        text = "".join(f"{line}\n" for line in lines)
        write_atomically(Path(path), lambda file: file.write_text(text, "utf-8"))


class Replay(Adviser):
    """A recorded adviser: the answers of a transcript, by the key of the prompt (`Adviser.write`).

    A prompt shows four digits of weights and losses, so another processor may now and then round to another prompt.

    Raises:
        DataError: a line is not an object with key and answer; or, when asked, the transcript lacks the prompt.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        try:
            text = self.path.read_text("utf-8")
        except OSError as error:
            raise DataError(f"cannot read the transcript {path}: {error.strerror}.") from error
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self.answers[str(entry["key"])] = str(entry["answer"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: need an object with key and answer: {error}."
                ) from error

    def ask(self, prompt: str) -> str:
        """Nothing but the transcript can answer."""
        raise DataError(
            f"{self.path} has no answer to prompt {key_of(prompt)}: record it anew under these settings. The prompt:\n"
            f"{prompt}"
        )


class Command(Adviser):
    """Any program of this machine: it reads the prompt from its input and prints a candidate per line.

    Args:
        argv: the program and its arguments; no shell is involved.
        timeout: seconds that it may take.

    Raises:
        SpecError: the program does not exist.
        DataError: it took too long, failed, or printed what is no candidate.
    """

    def __init__(self, argv: Sequence[str], timeout: float = 60.0) -> None:
        super().__init__()
        if isinstance(argv, str) or not argv:
            raise SpecError(f"Command: argv={argv!r} must be a list: the program and its arguments.")
        self.argv, self.timeout = list(argv), timeout

    def ask(self, prompt: str) -> str:
        """Run the program."""
        name = self.argv[0]
        try:
            done = subprocess.run(
                self.argv,
                input=prompt,
                capture_output=True,
                encoding="utf-8",
                timeout=self.timeout,
                check=False,
            )
        except OSError as error:
            raise SpecError(f"cannot run the proposer {name!r}: {error.strerror}.") from error
        except subprocess.TimeoutExpired as error:
            raise DataError(
                f"the proposer {name!r} gave no answer in {self.timeout:g} s: raise timeout."
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"the proposer {name!r} printed what is not UTF-8 text: {error}.") from error
        if done.returncode:
            told = done.stderr.strip()[-500:]
            raise DataError(f"the proposer {name!r} ended with status {done.returncode}: {told}")
        return done.stdout


def prompt_of(task: str, trace: Sequence[Trial], n: int) -> str:
    """What an adviser reads: the task, the trials in the order given, and what to answer."""
    dim = len(trace[-1].weights)
    tried = "\n".join(f"{trial.value:.4g}: {render(trial.weights)}" for trial in trace)
    return (
        f"{task}\nThe weights are {dim} numbers. Tried so far, worst first, as loss: weights\n{tried}\n"
        f"Answer with {n} lines and nothing else. Each line: {dim} numbers separated by spaces, weights whose loss you "
        "expect to be lower.\n"
    )


def key_of(prompt: str) -> str:
    """Sixteen hexadecimal digits of the prompt's SHA-256."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def render(weights: Tensor, digits: int = 4) -> str:
    """``weights [dim]`` as numbers with that many significant digits, separated by spaces."""
    return " ".join(f"{value:.{digits}g}" for value in weights.tolist())


def parse(line: str, dim: int) -> Tensor:
    """``[dim]`` from numbers separated by spaces or commas, in brackets or not.

    Raises:
        DataError: a word is no number, not finite, or the count is wrong.
    """
    numbers = []
    for word in line.strip().strip("[]()").replace(",", " ").split():
        try:
            numbers.append(float(word))
        except ValueError:
            raise DataError(f"{word!r} is not a number, in {line.strip()[:80]!r}.") from None
        if not math.isfinite(numbers[-1]):
            raise DataError(f"{word!r} is not finite, in {line.strip()[:80]!r}.")
    if len(numbers) != dim:
        raise DataError(f"need {dim} numbers, got {len(numbers)}, in {line.strip()[:80]!r}.")
    return torch.tensor(numbers, dtype=torch.float64)


PROPOSERS: dict[str, type[Any]] = {
    "random_restart": RandomRestart,
    "jitter": Jitter,
    "quadratic_fit": QuadraticFit,
    "replay": Replay,
    "command": Command,
}
"""The proposers by name."""


def proposer_of(given: str | Mapping[str, Any] | Proposer) -> Proposer:
    """The proposer behind a name, a table with ``kind`` and settings, or itself.

    Raises:
        SpecError: unknown name or setting.
    """
    if not isinstance(given, str | Mapping):
        return given
    settings = {"kind": given} if isinstance(given, str) else dict(given)
    kind = settings.pop("kind", None)
    if kind not in PROPOSERS:
        raise SpecError(unknown("proposer", kind, PROPOSERS))
    try:
        proposer: Proposer = PROPOSERS[kind](**settings)
    except TypeError as error:
        raise SpecError(f"proposer {kind!r}: {error}.") from error
    return proposer


def _best(trace: Sequence[Trial]) -> Trial:
    return min(trace, key=lambda trial: trial.value)


def _stream(seed: int, trace: Sequence[Trial]) -> torch.Generator:
    # the trace has a bounded length, so its place in time is told by where the search stands
    return generator(seed, "proposer", hashlib.sha256(trace[-1].weights.numpy().tobytes()).hexdigest())

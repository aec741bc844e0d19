"""The small learning problems of published comparisons, rebuilt to the digit from their random streams.

All in float64 and without touching a global random stream: the articles' ``np.random.seed(s)`` is a
``np.random.RandomState(s)`` of its own, their ``torch.manual_seed(s)`` a `torch.Generator`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from steppe.core.flat import assign

__all__ = ["SMALL", "Small", "autoencoder", "linear_regression", "logistic", "logistic_line", "xor"]

_NINE = "the nine-optimizers article"
_DEEPHUB = "the DeepHub comparison of SLSQP, PSO, CMA-ES and simulated annealing"


class Affine(nn.Module):
    """``[n, features] -> [n]``: a weighted sum. In the flat vector the bias stands first or last."""

    bias: Tensor
    weight: Tensor

    def __init__(self, features: int, *, bias_first: bool) -> None:
        super().__init__()
        shapes = [("bias", 1), ("weight", features)]
        for name, size in shapes if bias_first else reversed(shapes):
            self.register_parameter(name, _parameter(size))

    def forward(self, x: Tensor) -> Tensor:
        """Class 1's log-odds, where the criterion takes it as such."""
        return x @ self.weight + self.bias


class SigmoidNet(nn.Module):
    """``[n, 2] -> [n]``: 2-4-1 with sigmoids in the hidden layer; weights are ``[in, out]``, the output a log-odds."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = _parameter(2, 4), _parameter(4)
        self.w2, self.b2 = _parameter(4, 1), _parameter(1)

    def forward(self, x: Tensor) -> Tensor:
        """The log-odds of class 1."""
        return (torch.sigmoid(x @ self.w1 + self.b1) @ self.w2 + self.b2).squeeze(-1)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class Small:
    """A few samples, a model of a few weights, and what is known of them. `function_study` trains it.

    Attributes:
        name: letters, digits and ``_``.
        x, y: samples ``[samples, features]`` and targets ``[samples, ...]``, float64.
        make: builds the model, whatever its weights.
        start: the published initial weights ``[dim]``, in the order of the model's parameters.
        criterion: ``(output, target) -> scalar``, the mean loss.
        batch: samples of a step; None takes all. An epoch's order is then drawn anew.
        labels: whether `y` is a class, 0 or 1, and the model's output its log-odds.
        bounds: (lowest, highest) value of every weight: the region that is searched and drawn.
        minima, floor: the smallest loss over all samples, and where, if known.
        title, formula, source, errors, printed: as in `steppe.problems.function.Function`.
    """

    name: str
    x: Tensor
    y: Tensor
    make: Callable[[], nn.Module]
    start: Tensor
    criterion: Callable[[Tensor, Tensor], Tensor]
    bounds: tuple[float, float]
    title: str
    formula: str
    source: str
    batch: int | None = None
    labels: bool = False
    minima: Sequence[Sequence[float]] = ()
    floor: float | None = None
    errors: tuple[str, ...] = ()
    printed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """Number of weights."""
        return self.start.numel()

    def model(self) -> nn.Module:
        """The model at its published start."""
        model = self.make()
        assign(list(model.parameters()), self.start)
        return model

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean loss of a batch ``(x, y)``."""
        return self.criterion(model(batch[0]), batch[1])

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the samples."""
        if self.batch is None:
            yield self.x, self.y
            return
        for part in torch.randperm(len(self.x), generator=generator).split(self.batch):
            yield self.x[part], self.y[part]

    def full(self) -> Iterable[tuple[Tensor, Tensor]]:
        """All samples as one batch."""
        return [(self.x, self.y)]


def _mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def _square_of_sigmoid(output: Tensor, target: Tensor) -> Tensor:
    return (torch.sigmoid(output) - target).square().mean()


def linear_regression() -> Small:
    """``y = 4 + 3x + noise``, 100 points; weights (intercept, slope)."""
    random = np.random.RandomState(0)
    x = 2 * random.rand(100, 1)
    y = 4 + 3 * x + random.randn(100, 1)
    start = random.randn(2, 1)  # third from the same stream
    design = np.c_[np.ones(100), x]
    best = np.linalg.lstsq(design, y[:, 0], rcond=None)[0]
    return Small(
        "linear_regression",
        torch.from_numpy(x),
        torch.from_numpy(y[:, 0].copy()),
        lambda: Affine(1, bias_first=True),
        torch.from_numpy(start[:, 0].copy()),
        _mean_square,
        bounds=(-2.0, 6.0),
        minima=[best.tolist()],
        floor=float(np.square(design @ best - y[:, 0]).mean()),
        title="Linear regression",
        formula="mean (w₀ + w₁x − y)²",
        source=_NINE,
        printed={
            "slope after 1000 steps": 2.9827303563323175,
            "intercept after 1000 steps": 4.20607718142562,
        },
        errors=(
            "Gradient descent is not converged after the article's 1000 steps: its slope is 2.9827, least squares has "
            "2.9685.",
        ),
    )


def linear_regression_single() -> Small:
    """`linear_regression`, one point per step: SGD where the optimizer is plain descent."""
    return replace(
        linear_regression(),
        name="linear_regression_single",
        batch=1,
        title="Linear regression, one point per step",
        printed={
            "slope after 1000 steps": 3.052173302887621,
            "intercept after 1000 steps": 4.352670551847081,
        },
        errors=(),
    )


def linear_regression_batches() -> Small:
    """`linear_regression`, ten points per step; not in the article."""
    return replace(
        linear_regression(),
        name="linear_regression_batches",
        batch=10,
        title="Linear regression, ten points per step",
        source="",
        printed={},
        errors=(),
    )


def logistic() -> Small:
    """Two classes divided by ``x1 + x2 > 0``; weights (bias, w1, w2); mini-batches of ten."""
    random = np.random.RandomState(42)
    x = random.randn(100, 2)
    return Small(
        "logistic",
        torch.from_numpy(x),
        torch.from_numpy((x.sum(1) > 0).astype(np.float64)),
        lambda: Affine(2, bias_first=True),
        torch.from_numpy(random.randn(3)),
        binary_cross_entropy_with_logits,
        bounds=(-10.0, 10.0),
        batch=10,
        labels=True,
        floor=0.0,  # the classes can be separated: the loss falls towards 0 for ever
        title="Logistic regression, mini-batches",
        formula="mean cross-entropy of sigmoid(w₀ + w₁x₁ + w₂x₂)",
        source=_NINE,
        printed={"loss of the last batch of epoch 90": 0.05268405861771795, "accuracy": 0.99},
        errors=(
            "The losses that the article prints are those of one batch of ten, which is why they rise and fall; over "
            "all samples the loss falls from epoch to epoch.",
        ),
    )


def logistic_line() -> Small:
    """One feature, classes divided at 1; weights (w, b)."""
    x = 2 * np.random.RandomState(0).rand(100, 1)
    return Small(
        "logistic_line",
        torch.from_numpy(x),
        torch.from_numpy((x[:, 0] > 1).astype(np.float64)),
        lambda: Affine(1, bias_first=False),
        torch.zeros(2, dtype=torch.float64),
        binary_cross_entropy_with_logits,
        bounds=(-16.0, 16.0),
        labels=True,
        floor=0.0,
        title="Logistic regression of one feature",
        formula="mean cross-entropy of sigmoid(wx + b)",
        source=_NINE,
    )


def xor() -> Small:
    """XOR of two signs, 200 points, a 2-4-1 network of sigmoids with squared error."""
    random = np.random.RandomState(42)
    x = random.randn(200, 2)
    first, second = random.randn(2, 4), random.randn(4, 1)
    start = np.concatenate([first.ravel(), np.zeros(4), second.ravel(), np.zeros(1)])
    return Small(
        "xor",
        torch.from_numpy(x),
        torch.from_numpy(np.logical_xor(x[:, 0] > 0, x[:, 1] > 0).astype(np.float64)),
        SigmoidNet,
        torch.from_numpy(start),
        _square_of_sigmoid,
        bounds=(-10.0, 10.0),
        labels=True,
        title="XOR, 2-4-1",
        formula="mean (network(x) − y)²",
        source=_NINE,
        printed={"loss before step 9000": 0.03396667708959878},
        errors=(
            "The article descends half the sum of the squares and prints their mean: its learning rate of 0.01 is 1 on "
            "the loss that it prints, a factor of 100.",
        ),
    )


def autoencoder() -> Small:
    """Two inputs through two ReLUs and back, the second a thousand times as large; ten weights."""
    x = _article_inputs()

    def make() -> nn.Module:
        return nn.Sequential(_linear(2, 2, bias=False), nn.ReLU(), _linear(2, 2, bias=True))

    return Small(
        "autoencoder",
        x,
        x,
        make,
        torch.from_numpy(0.1 * np.random.RandomState(42).randn(10)),
        _mean_square,
        bounds=(-1.0, 1.0),
        floor=AUTOENCODER_FLOOR,
        title="Dead-ReLU autoencoder",
        formula="mean (W₂ relu(W₁x) + b₂ − x)², x₂ in thousands",
        source=_DEEPHUB,
        printed={
            "Adam": 91.527,
            "SLSQP": 3.0268,
            "PSO": 1.04032,
            "CMA-ES": 4.0896,
            "simulated annealing": 0.39689,
        },
        errors=(
            "No weights of the printed problem have a loss below 0.78305: the article's 0.39689 cannot come from its "
            "own listing, and the other four figures could not be reached from it either.",
            "The ranking reproduces, but the methods had between 100 and 10,100 evaluations; with 10,000 each, Adam "
            "with a cosine schedule ends at the floor too.",
            "Its simulated annealing polishes with L-BFGS-B, and SLSQP differentiates numerically: neither is free of "
            "gradients.",
            "CMA-ES is stopped by its 100 iterations before it has converged.",
        ),
    )


AUTOENCODER_FLOOR = 0.7830541615008594
"""The smallest loss of `autoencoder`, from 2,000 Levenberg-Marquardt starts of which 926 end here and none below."""


def _linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    # no initial draw: nn.Linear would take it from the global stream
    return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=torch.float64)


def _article_inputs() -> Tensor:
    """``[32, 2]``: drawn in float32 from seed 42 after the weights of the article's network, then float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42)
        nn.Linear(2, 2, bias=False), nn.Linear(2, 2)
        inputs = torch.randn(32, 2).double()
    return inputs * torch.tensor([1.0, 1e3], dtype=torch.float64)


SMALL: dict[str, Callable[[], Small]] = {
    make.__name__: make
    for make in (
        linear_regression,
        linear_regression_single,
        linear_regression_batches,
        logistic,
        logistic_line,
        xor,
        autoencoder,
    )
}
"""The small problems by name."""

"""The numbers of the nine-optimizers article and of the Adam/AdaMax note, through the registered classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steppe.optim import create

FILE = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden" / "published_examples.json"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs shared/golden beside the repository")
GOLDEN: dict[str, Any] = json.loads(FILE.read_text("utf-8"))["experiments"] if FILE.exists() else {}


def close(got: Any, expected: Any, atol: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(got, dtype=float), np.asarray(expected), rtol=1e-12, atol=atol)


def leaf(values: Any) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64).requires_grad_()


def descend(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> float:
    """One step; the loss before it."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.detach()

    return float(optimizer.step(closure))


def path(key: str, f: Callable[[Tensor], Tensor], x0: Any, steps: int, **hyper: Any) -> list[list[float]]:
    """The points of a function's descent, the start included."""
    x = leaf(x0)
    optimizer = create(key, [x], **hyper)
    points = [x.tolist()]
    for _ in range(steps):
        descend(optimizer, lambda: f(x))
        points.append(x.tolist())
    return points


def line() -> tuple[np.random.RandomState, Tensor, Tensor, Tensor]:
    """y = 4 + 3 x + noise, and the weights' start from the same stream."""
    stream = np.random.RandomState(0)
    x = 2 * stream.rand(100, 1)
    y = 4 + 3 * x + stream.randn(100, 1)
    return stream, torch.tensor(np.hstack([np.ones((100, 1)), x])), torch.tensor(y), leaf(stream.randn(2, 1))


def test_gd_linear_regression() -> None:
    golden = GOLDEN["nine_optimizers_gd_linear_regression"]
    _, x, y, w = line()
    assert w.flatten().tolist() == golden["init"]
    optimizer = create("gd", [w], lr=0.01)
    losses = [descend(optimizer, lambda: (x @ w - y).square().mean()) for _ in range(1000)]
    close([losses[i] for i in golden["iterations"]], golden["loss"])
    close(w.detach().flatten(), [golden["final"]["intercept"], golden["final"]["slope"]])


def test_sgd_linear_regression() -> None:
    golden = GOLDEN["nine_optimizers_sgd_linear_regression"]
    stream, x, y, w = line()
    optimizer = create("sgd", [w], lr=0.01)
    losses = []
    for _ in range(1000):
        i = stream.randint(100)
        descend(optimizer, lambda i=i: (x[i] @ w - y[i]).square().sum())
        losses.append((x @ w - y).square().mean().item())
    close([losses[i] for i in golden["iterations"]], golden["loss"])
    close(w.detach().flatten(), [golden["final"]["intercept"], golden["final"]["slope"]])


def cross_entropy(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y)


def test_minibatch_logistic_regression() -> None:
    golden = GOLDEN["nine_optimizers_minibatch_logistic"]
    stream = np.random.RandomState(42)
    data = stream.randn(100, 2)
    x = torch.tensor(np.hstack([np.ones((100, 1)), data]))
    y = torch.tensor((data.sum(axis=1) > 0).astype(float))
    theta = leaf(stream.randn(3))
    assert theta.tolist() == golden["init"]
    optimizer = create("minibatch_sgd", [theta], lr=0.1)
    last, full = [], []
    for _ in range(100):
        for rows in stream.permutation(100).reshape(10, 10):
            descend(optimizer, lambda rows=rows: cross_entropy(x[rows], y[rows], theta))
        last.append(cross_entropy(x[rows], y[rows], theta).item())
        full.append(cross_entropy(x, y, theta).item())
    close([last[i] for i in golden["epochs"]], golden["loss"])
    close([full[i] for i in golden["epochs"]], golden["full_data_loss_same_epochs"])
    close(theta.detach(), golden["final"]["theta"])
    assert float(((x @ theta > 0) == (y > 0.5)).double().mean()) == golden["final"]["accuracy"]


def test_momentum_xor() -> None:
    golden = GOLDEN["nine_optimizers_momentum_xor"]
    stream = np.random.RandomState(42)
    data = stream.randn(200, 2)
    x, y = (
        torch.tensor(data),
        torch.tensor(np.logical_xor(data[:, :1] > 0, data[:, 1:] > 0).astype(float)),
    )
    w1, b1 = leaf(stream.randn(2, 4)), leaf(np.zeros((1, 4)))
    w2, b2 = leaf(stream.randn(4, 1)), leaf(np.zeros((1, 1)))
    assert w1.tolist() == golden["init"]["W1"]

    def squares() -> Tensor:  # the article descends half their sum and prints their mean
        return 0.5 * (torch.sigmoid(torch.sigmoid(x @ w1 + b1) @ w2 + b2) - y).square().sum()

    optimizer = create("momentum", [w1, b1, w2, b2], lr=0.01)
    losses = [descend(optimizer, squares) / 100 for _ in range(9001)]
    close([losses[i] for i in golden["iterations"]], golden["loss"])


def test_nag_is_at_the_look_ahead_points() -> None:
    golden = GOLDEN["nine_optimizers_nag_logistic"]
    points = 2 * np.random.RandomState(0).rand(100, 1)
    x = torch.tensor(np.hstack([points, np.ones((100, 1))]))
    y = torch.tensor((points[:, 0] > 1).astype(float))
    w = leaf(np.zeros(2))
    optimizer = create("nag", [w], lr=0.1)
    losses = [descend(optimizer, lambda: cross_entropy(x, y, w)) for _ in range(1000)]
    close([losses[i] for i in golden["iterations"]], golden["loss"])
    own = w.detach() + 0.1 * 0.9 * optimizer.state[w]["momentum_buffer"]
    close(own, [golden["final"]["w"][0], golden["final"]["b"]])


def test_adagrad_quadratic() -> None:
    golden = GOLDEN["nine_optimizers_adagrad_quadratic"]
    points = path("adagrad", lambda x: x.square().sum(), [1.0, 1.0], 49, lr=0.1, eps=1e-8)
    close([points[i][0] for i in golden["iterations"]], golden["x1"])
    close([a * a + b * b for a, b in (points[i] for i in golden["iterations"])], golden["f"])


def test_adadelta_rosenbrock() -> None:
    golden = GOLDEN["nine_optimizers_adadelta_rosenbrock"]

    def rosenbrock(x: Any) -> Any:
        return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2

    points = path("adadelta", rosenbrock, [-1.5, 1.5], 1000, lr=1.0, rho=0.9, eps=1e-8)
    close([points[i] for i in golden["iterations"]], golden["x"])
    close([rosenbrock(points[i]) for i in golden["iterations"]], golden["f"])
    close(points[1000], golden["longer_run"]["x"][0])


def test_rmsprop_himmelblau() -> None:
    golden = GOLDEN["nine_optimizers_rmsprop_himmelblau"]

    def himmelblau(x: Any) -> Any:
        return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2

    points = path("rmsprop", himmelblau, [0.0, 0.0], 1000, lr=1e-3, alpha=0.9, eps=1e-8)
    close([points[i] for i in golden["iterations"]], golden["x"])
    close([himmelblau(points[i]) for i in golden["iterations"]], golden["f"])
    close(points[1000], golden["longer_run"]["x"][0])


@pytest.mark.parametrize("key", ["adam", "classic_adam"])
def test_adam_quadratic_stops_where_the_article_does(key: str) -> None:
    golden = GOLDEN["nine_optimizers_adam_quadratic"]

    def f(x: Any) -> Any:
        return 5 * x[0] ** 2 + 2 * x[1] ** 2 + 3 * x[0] - 10 * x[1] + 4

    def norm(x: list[float]) -> float:
        return float(np.hypot(10 * x[0] + 3, 4 * x[1] - 10))

    points = path(key, f, [1.0, 1.0], 300, lr=0.1)
    close([points[i] for i in golden["iterations"]], golden["x"])
    close([f(points[i]) for i in golden["iterations"]], golden["f"])
    stop = next(i for i, x in enumerate(points) if norm(x) < 1e-6)
    assert stop == golden["iterations_to_stop"]
    close(points[stop], golden["x_final"])


def note(curvature: float, **hyper: Any) -> list[list[float]]:
    """Descent with the gradient (2 x, curvature y)."""
    return path(
        "classic_adam",
        lambda x: x[0] ** 2 + curvature / 2 * x[1] ** 2,
        [10.0, 10.0],
        100,
        lr=0.4,
        **hyper,
    )


@pytest.mark.parametrize(
    ("name", "curvature"),
    [("adam_adamax_note_adam_as_printed", 100.0), ("adam_adamax_note_adam_gradient_fixed", 10.0)],
)
def test_adam_of_the_note_is_the_efficient_form(name: str, curvature: float) -> None:
    golden = GOLDEN[name]
    points = note(curvature, form="efficient")
    values = [x * x + 5 * y * y for x, y in points]
    close([points[i] for i in golden["iterations"]], golden["x"], atol=1e-13)  # it swings through zero
    close([values[i] for i in golden["iterations"]], golden["f"], atol=1e-14)
    assert int(np.argmin(values)) == golden["argmin"]
    algorithm = np.array(note(curvature))
    assert 1e-9 < np.abs(algorithm - points).max() < 1e-6  # the place of eps, and nothing else


def test_adam_hides_the_wrong_gradient_of_the_note() -> None:
    golden = GOLDEN["adam_adamax_note_adam_as_printed"]
    apart = np.array(note(100.0, form="efficient")) - note(10.0, form="efficient")
    assert np.abs(apart).max() == pytest.approx(golden["max_abs_trajectory_difference_to_fixed"], rel=1e-5)

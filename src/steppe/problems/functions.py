"""Test functions with known minima."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steppe.core.errors import SpecError, unknown
from steppe.core.seeding import generator
from steppe.problems.function import FUNCTIONS, Function, register

__all__ = ["FAMILIES", "FUNCTIONS", "find_function"]


def find_function(name: str) -> Function:
    """The function `name`: one of `FUNCTIONS`, or ``"rosenbrock-10"``: a family of `FAMILIES` and a dimension.

    Raises:
        SpecError: there is no such function; with a did-you-mean.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    family, dash, digits = name.rpartition("-")
    if not dash or family not in FAMILIES or not digits.isdigit() or int(digits) < 2:
        known = [*FUNCTIONS, *(f"{family}-10" for family in FAMILIES)]
        raise SpecError(unknown("function", name, known))
    return register(FAMILIES[family](name, int(digits)))


def bowl(name: str, dim: int) -> Function:
    """The sum of squares."""
    return Function(
        name,
        lambda x: x.square().sum(-1),
        dim,
        start=(1.0,) * dim,
        minima=[(0.0,) * dim],
        minimum=0.0,
        bounds=(-2.0, 2.0),
        gradient=lambda x: 2 * x,
        hessian=lambda x: 2 * torch.eye(dim, dtype=x.dtype),
        title="Quadratic bowl",
        formula="Σ xᵢ²",
    )


def ill_conditioned(name: str, dim: int) -> Function:
    """A quadratic whose curvatures span six orders of magnitude, in axes that are not those of the variables."""
    drawn = torch.randn(dim, dim, dtype=torch.float64, generator=generator(0, "rotation", dim))
    axes, _ = torch.linalg.qr(drawn)
    matrix = axes @ torch.diag(torch.logspace(0, 6, dim, dtype=torch.float64)) @ axes.T
    matrix = (matrix + matrix.T) / 2
    return Function(
        name,
        lambda x: ((x @ matrix) * x).sum(-1) / 2,
        dim,
        start=(1.0,) * dim,
        minima=[(0.0,) * dim],
        minimum=0.0,
        bounds=(-2.0, 2.0),
        gradient=lambda x: matrix @ x,
        hessian=lambda x: matrix,
        title="Ill-conditioned quadratic, rotated",
        formula="½ xᵀ Q diag(1 … 10⁶) Qᵀ x",
    )


def rosenbrock(name: str, dim: int) -> Function:
    """The curved valley: its floor is easily found, its end is not."""

    def gradient(x: Tensor) -> Tensor:
        bend = x[1:] - x[:-1].square()
        slope = torch.zeros_like(x)
        slope[:-1] = -400 * x[:-1] * bend - 2 * (1 - x[:-1])
        slope[1:] += 200 * bend
        return slope

    def hessian(x: Tensor) -> Tensor:
        diagonal = torch.zeros_like(x)
        diagonal[:-1] = 1200 * x[:-1].square() - 400 * x[1:] + 2
        diagonal[1:] += 200
        beside = torch.diag(-400 * x[:-1], 1)
        return torch.diag(diagonal) + beside + beside.T

    return Function(
        name,
        lambda x: (100 * (x[..., 1:] - x[..., :-1].square()).square() + (1 - x[..., :-1]).square()).sum(-1),
        dim,
        start=(-1.5, 1.5) * (dim // 2) + (-1.5,) * (dim % 2),
        minima=[(1.0,) * dim],
        minimum=0.0,
        bounds=(-2.0, 2.0),
        gradient=gradient,
        hessian=hessian,
        title="Rosenbrock's valley",
        formula="Σ 100 (xᵢ₊₁ − xᵢ²)² + (1 − xᵢ)²",
        source="Rosenbrock 1960, The Computer Journal 3(3)",
        errors=(
            "The nine-optimizers article runs AdaDelta for 100 steps from (−1.5, 1.5): the value falls from 62.5 to "
            "42.35 only, so its figure cannot show convergence.",
            "Its listing changes the starting point in place, so that a second run starts where the first one ended.",
        )
        if dim == 2
        else (),
    )


def rastrigin(name: str, dim: int) -> Function:
    """A bowl under waves: a local minimum near every point of the integer grid."""
    turn = 2 * math.pi
    return Function(
        name,
        lambda x: (x.square() + 10 * (1 - torch.cos(turn * x))).sum(-1),
        dim,
        start=(3.2,) * dim,
        minima=[(0.0,) * dim],
        minimum=0.0,
        bounds=(-5.12, 5.12),
        gradient=lambda x: 2 * x + 10 * turn * torch.sin(turn * x),
        hessian=lambda x: torch.diag(2 + 10 * turn**2 * torch.cos(turn * x)),
        title="Rastrigin's function",
        formula="Σ xᵢ² + 10 (1 − cos 2πxᵢ)",
        source="Rastrigin 1974, Systems of Extremal Control",
    )


def ackley(name: str, dim: int) -> Function:
    """Almost flat far away, a funnel with waves near the minimum, and a kink in it."""

    def fn(x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1) / math.sqrt(dim)  # its gradient at 0 is 0, not NaN
        waves = torch.cos(2 * math.pi * x).mean(-1)
        return 20 * (1 - torch.exp(-0.2 * length)) + math.e - torch.exp(waves)

    return Function(
        name,
        fn,
        dim,
        start=(3.2,) * dim,
        minima=[(0.0,) * dim],
        minimum=0.0,
        bounds=(-5.0, 5.0),
        title="Ackley's function",
        formula="20 (1 − exp(−0.2 √mean x²)) + e − exp(mean cos 2πx)",
        source="Ackley 1987, A Connectionist Machine for Genetic Hillclimbing",
    )


FAMILIES: dict[str, Callable[[str, int], Function]] = {
    "bowl": bowl,
    "ill_conditioned": ill_conditioned,
    "rosenbrock": rosenbrock,
    "rastrigin": rastrigin,
    "ackley": ackley,
}
"""Functions of any number of variables, made for one by `find_function`. Their plain names have two."""

for _name, _make in FAMILIES.items():
    register(_make(_name, 2))


def _quadratic(
    name: str, a: Sequence[float], b: Sequence[float] = (0.0, 0.0), c: float = 0.0, **known: Any
) -> Function:
    """Σ aᵢxᵢ² + bᵢxᵢ + c."""
    square, linear = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    return Function(
        name,
        lambda x: (square * x.square() + linear * x).sum(-1) + c,
        len(a),
        gradient=lambda x: 2 * square * x + linear,
        hessian=lambda x: torch.diag(2 * square),
        **known,
    )


register(
    _quadratic(
        "noisy_bowl",
        (1.0, 1.0),
        start=(1.0, 1.0),
        minima=[(0.0, 0.0)],
        minimum=0.0,
        bounds=(-2.0, 2.0),
        noise=0.1,
        title="Noisy quadratic bowl",
        formula="Σ (xᵢ − 0.1 nᵢ)², n drawn from N(0, 1) for each step",
    )
)
register(
    _quadratic(
        "adam_note",
        (1.0, 5.0),
        start=(10.0, 10.0),
        minima=[(0.0, 0.0)],
        minimum=0.0,
        bounds=(-12.0, 12.0),
        title="The Adam note's quadratic",
        formula="x² + 5y²",
        source="the Adam/AdaMax note",
        errors=(
            "The note's listing differentiates x² + 5y² to (2x, 100y); the gradient is (2x, 10y). Adam divides each "
            "coordinate by its own scale, so its path moves by 8e-9 and the figure looks right; gradient descent would "
            "have shown it at once.",
            "It adds epsilon before the bias correction, which the Adam paper calls the efficient form.",
            "Its beta decay also decays the second beta, and its bias correction uses powers of the decayed beta.",
            "Its AdaDelta formula carries a learning rate that the method does not have.",
        ),
    )
)
register(
    _quadratic(
        "adam_article",
        (5.0, 2.0),
        (3.0, -10.0),
        4.0,
        start=(1.0, 1.0),
        minima=[(-0.3, 2.5)],
        minimum=-8.95,
        bounds=(-3.0, 5.0),
        title="The nine-optimizers article's quadratic",
        formula="5x² + 2y² + 3x − 10y + 4",
        source="the nine-optimizers article",
        errors=(
            "The article's stopping rule lost its comparison in print; its signature says gradient norm below 1e-6, "
            "which Adam reaches after 297 steps.",
            "Its single-step snippet of Adam cannot be run: it rebinds a name and uses arrays as dictionary keys.",
        ),
    )
)


def _himmelblau(x: Tensor) -> Tensor:
    return (x[..., 0].square() + x[..., 1] - 11).square() + (x[..., 0] + x[..., 1].square() - 7).square()


def _himmelblau_gradient(x: Tensor) -> Tensor:
    first, second = x[0] ** 2 + x[1] - 11, x[0] + x[1] ** 2 - 7
    return torch.stack((4 * x[0] * first + 2 * second, 2 * first + 4 * x[1] * second))


def _himmelblau_hessian(x: Tensor) -> Tensor:
    cross = 4 * (x[0] + x[1])
    return torch.stack(
        (
            torch.stack((12 * x[0] ** 2 + 4 * x[1] - 42, cross)),
            torch.stack((cross, 12 * x[1] ** 2 + 4 * x[0] - 26)),
        )
    )


register(
    Function(
        "himmelblau",
        _himmelblau,
        2,
        start=(0.0, 0.0),
        minima=[
            (3.0, 2.0),
            (-2.805118086952745, 3.131312518250573),
            (-3.779310253377747, -3.283185991286170),
            (3.584428340330492, -1.848126526964404),
        ],
        minimum=0.0,
        bounds=(-6.0, 6.0),
        gradient=_himmelblau_gradient,
        hessian=_himmelblau_hessian,
        title="Himmelblau's function",
        formula="(x² + y − 11)² + (x + y² − 7)²",
        source="Himmelblau 1972, Applied Nonlinear Programming; the nine-optimizers article",
        errors=(
            "The nine-optimizers article calls (3, 2) the global minimum and the other three local: all four have the "
            "value 0.",
            "Its RMSprop takes 100 steps of about 0.001 and ends at 165.61 (170 at the start), nowhere near a minimum.",
            "Its listing changes the starting point in place, so that a second run starts where the first one ended.",
        ),
    )
)


def _beale(x: Tensor) -> Tensor:
    a, b = x[..., 0], x[..., 1]
    parts = (c - a + a * b**power for power, c in enumerate((1.5, 2.25, 2.625), start=1))
    return torch.stack([part.square() for part in parts]).sum(0)


def _beale_gradient(x: Tensor) -> Tensor:
    a, b = x
    slope = torch.zeros_like(x)
    for power, c in enumerate((1.5, 2.25, 2.625), start=1):
        part = c - a + a * b**power
        slope = slope + 2 * part * torch.stack((b**power - 1, power * a * b ** (power - 1)))
    return slope


register(
    Function(
        "beale",
        _beale,
        2,
        start=(1.0, 1.0),
        minima=[(3.0, 0.5)],
        minimum=0.0,
        bounds=(-4.5, 4.5),
        gradient=_beale_gradient,
        title="Beale's function",
        formula="(1.5 − x + xy)² + (2.25 − x + xy²)² + (2.625 − x + xy³)²",
        source="Beale 1958, technical report 25, Princeton",
    )
)

"""One entry per measure, and `measure`, which runs any of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch

from steppe.core.errors import SpecError, unknown
from steppe.core.spec import Registry, Spec
from steppe.landscape.point import Cost, Measurement, Point

__all__ = ["MEASURES", "Measure", "measure"]


@dataclass(frozen=True, kw_only=True)
class Measure(Spec):
    """What there is to know of a measure.

    Attributes:
        cost: what it takes with the defaults, in passes over all data; where `random`, the most that is usual.
        invariant: whether rescaling the layers of a net, which leaves its function as it is, leaves it too.
        partner: the key of a measure of the same kind that is invariant, where this one is not.
        larger: what a larger value means.
        hyper: keyword arguments by which this measure differs from others of the same function.
        needs: arguments without a default.
    """

    cost: Cost
    invariant: bool
    partner: str = ""
    larger: Literal["sharper", "flatter"] = "sharper"
    hyper: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


class _Measures(Registry):
    def __getitem__(self, key: str) -> Measure:
        return cast(Measure, super().__getitem__(key))


_HERE = "steppe.landscape.measures"
_CURVATURE, _WORST, _AVERAGE, _LINES, _TIME = "curvature", "worst case", "average case", "lines", "time"
_KWON = "Kwon et al. 2021, arXiv:2102.11600"
_MODERN = "Andriushchenko et al. 2023, arXiv:2302.07011"
_JIANG = "Jiang et al. 2020, arXiv:1912.02178"
_CHAUDHARI = "Chaudhari et al. 2017, arXiv:1611.01838"

MEASURES = _Measures(
    "measure",
    {
        "lambda_max": Measure(
            "steppe.landscape.spectrum:lambda_max",
            _CURVATURE,
            "largest eigenvalue of the Hessian",
            cost=Cost(gradient=40),
            random=True,
            invariant=False,
            partner="worst_case_l2",
        ),
        "trace": Measure(
            "steppe.landscape.spectrum:trace",
            _CURVATURE,
            "trace of the Hessian",
            "Hutchinson 1989",
            cost=Cost(gradient=200),
            random=True,
            invariant=False,
            partner="adaptive_average_case",
        ),
        "relative_flatness": Measure(
            f"{_HERE}.relative:relative_flatness",
            _CURVATURE,
            "curvature of one layer, weighed by its weights",
            "Petzka et al. 2021, arXiv:2001.00939",
            cost=Cost(gradient=200),
            random=True,
            invariant=True,
        ),
        "fisher_rao": Measure(
            f"{_HERE}.relative:fisher_rao_norm",
            _CURVATURE,
            "squared length of the weights in the Fisher metric",
            "Liang et al. 2019, arXiv:1711.01530",
            cost=Cost(forward=2),
            invariant=True,
        ),
        "sam": Measure(
            f"{_HERE}.sam:sam_sharpness",
            _WORST,
            "rise of each batch's loss after one ascent step (m-sharpness)",
            "Foret et al. 2021, arXiv:2010.01412",
            cost=Cost(forward=1, gradient=1),
            invariant=False,
            partner="adaptive_sam",
        ),
        "adaptive_sam": Measure(
            f"{_HERE}.sam:sam_sharpness",
            _WORST,
            "the same in a ball that scales with the weights",
            _KWON,
            cost=Cost(forward=1, gradient=1),
            invariant=True,
            hyper={"adaptive": True},
        ),
        "epsilon_sharpness": Measure(
            f"{_HERE}.apgd:epsilon_sharpness",
            _WORST,
            "largest relative rise of the loss in a box",
            "Keskar et al. 2017, arXiv:1609.04836",
            cost=Cost(gradient=21),
            invariant=False,
            partner="worst_case_linf",
        ),
        "worst_case_l2": Measure(
            f"{_HERE}.apgd:worst_case_sharpness",
            _WORST,
            "largest rise of each batch's loss in a ball that scales with the weights",
            _MODERN,
            cost=Cost(gradient=21),
            invariant=True,
        ),
        "worst_case_linf": Measure(
            f"{_HERE}.apgd:worst_case_sharpness",
            _WORST,
            "the same, each weight moving by at most a share of itself",
            _MODERN,
            cost=Cost(gradient=21),
            invariant=True,
            hyper={"norm": "linf"},
        ),
        "average_case": Measure(
            f"{_HERE}.average:average_case_sharpness",
            _AVERAGE,
            "mean rise of the loss under normal noise",
            _MODERN,
            cost=Cost(forward=101),
            random=True,
            invariant=False,
            partner="adaptive_average_case",
        ),
        "adaptive_average_case": Measure(
            f"{_HERE}.average:average_case_sharpness",
            _AVERAGE,
            "mean rise of the loss under noise relative to each weight",
            _MODERN,
            cost=Cost(forward=101),
            random=True,
            invariant=True,
            hyper={"adaptive": True},
        ),
        "pac_bayes": Measure(
            f"{_HERE}.average:pac_bayes_flatness",
            _AVERAGE,
            "1 / sigma², sigma the noise under which the loss rises by a given amount",
            _JIANG,
            cost=Cost(forward=150),
            random=True,
            invariant=False,
            partner="magnitude_pac_bayes",
        ),
        "magnitude_pac_bayes": Measure(
            f"{_HERE}.average:pac_bayes_flatness",
            _AVERAGE,
            "the same with noise relative to each weight",
            _JIANG,
            cost=Cost(forward=150),
            random=True,
            invariant=True,
            hyper={"adaptive": True},
        ),
        "local_entropy": Measure(
            f"{_HERE}.entropy:local_entropy",
            _AVERAGE,
            "minus the log-volume of low loss around the weights, by Langevin dynamics",
            _CHAUDHARI,
            cost=Cost(gradient=261),
            random=True,
            invariant=False,
            partner="adaptive_local_entropy",
        ),
        "adaptive_local_entropy": Measure(
            f"{_HERE}.entropy:local_entropy",
            _AVERAGE,
            "the same with noise relative to each weight",
            _CHAUDHARI,
            cost=Cost(gradient=261),
            random=True,
            invariant=True,
            hyper={"adaptive": True},
        ),
        "basin_width": Measure(
            f"{_HERE}.lines:basin_width",
            _LINES,
            "radius of the basin along filter-normalised lines (flat volume)",
            "Huang et al. 2020, arXiv:1906.03291",
            cost=Cost(forward=250),
            random=True,
            invariant=True,
            larger="flatter",
        ),
        "barrier": Measure(
            f"{_HERE}.lines:barrier",
            _LINES,
            "highest rise of the loss on the straight way to other weights",
            "Frankle et al. 2020, arXiv:1912.05671",
            cost=Cost(forward=21),
            invariant=False,
            needs=("other",),
        ),
        "time_dispersion": Measure(
            f"{_HERE}.blocks:time_dispersion",
            _TIME,
            "standard deviation of the loss between blocks of time",
            cost=Cost(forward=1),
            invariant=True,
        ),
    },
)


def measure(key: str, point: Point, generator: torch.Generator, **hyper: Any) -> Measurement:
    """Run the measure `key` at a point.

    Args:
        key: of `MEASURES`.
        point: where.
        generator: all that is drawn at random is drawn from it.
        hyper: what the measure's function takes; goes before what the entry sets.

    Raises:
        SpecError: an unknown key or argument, one that is missing, or a value out of its range.
    """
    spec = MEASURES[key]
    function = spec.load()
    known = [name for name in inspect.signature(function).parameters if name not in ("point", "generator")]
    for name in hyper:
        if name not in known:
            raise SpecError(unknown(f"argument of measure {key!r}", name, known))
    if missing := [name for name in spec.needs if name not in hyper]:
        raise SpecError(f"measure {key!r} needs {', '.join(missing)}=...; see {spec.path}.")
    found: Measurement = function(point, generator, **{**spec.hyper, **hyper})
    return found

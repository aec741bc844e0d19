"""One line per gradient-free optimizer. Importing this module does not import torch."""

from __future__ import annotations

from steppe.core.spec import Spec

__all__ = ["GRADIENT_FREE"]

_FAMILY = "gradient-free"
_HYBRID = "hybrid"
_PROBES = (
    "values are passes of a plain closure, besides the gradients; of an Objective they are forward passes"
)
_REAL = "all weights are one vector of real numbers: complex ones are refused"

GRADIENT_FREE: dict[str, Spec] = {
    "slsqp": Spec(
        "steppe.optim.gradient_free.slsqp:SLSQP",
        _FAMILY,
        "quadratic models under bounds and constraints; exact gradients or differences",
        "Kraft 1988, DFVLR-FB 88-28",
        demos=({"gradient": "difference"}, {"gradient": "difference", "bounds": (-2.0, 2.0), "eps": 1e-4}),
        xfail={
            "descends_without_gradients": "the differences of a loss that is flat almost everywhere are zero"
        },
    ),
    "annealing": Spec(
        "steppe.optim.gradient_free.annealing:Annealing",
        _FAMILY,
        "classical simulated annealing on independent chains",
        "Kirkpatrick et al. 1983, Science 220:671",
        demos=(
            {"bounds": (-2.0, 2.0)},
            {
                "bounds": (-2.0, 2.0),
                "moves": "cauchy",
                "cooling": "logarithmic",
                "chains": 4,
                "initial_temp": 0.1,
            },
        ),
    ),
    "dual_annealing": Spec(
        "steppe.optim.gradient_free.annealing:DualAnnealing",
        _FAMILY,
        "generalized annealing with a local search (L-BFGS-B) or none",
        "Xiang et al. 1997, Phys. Lett. A 233:216",
        demos=({"bounds": (-2.0, 2.0)}, {"bounds": (-2.0, 2.0), "local_search": "none"}),
    ),
    "pso": Spec(
        "steppe.optim.gradient_free.pso:PSO",
        _FAMILY,
        "particles drawn to the best places that they and their neighbours saw",
        "Kennedy & Eberhart 1995; Clerc & Kennedy 2002, doi:10.1109/4235.985692",
        demos=({}, {"population": 10, "topology": "ring", "walls": "absorb", "bounds": (-2.0, 2.0)}),
    ),
    "differential_evolution": Spec(
        "steppe.optim.gradient_free.differential_evolution:DifferentialEvolution",
        _FAMILY,
        "tries steps that are differences between members of the population",
        "Storn & Price 1997, doi:10.1023/A:1008202821328",
        demos=({}, {"population": 10, "strategy": "rand1bin", "mutation": 0.5, "bounds": (-2.0, 2.0)}),
    ),
    "cma_es": Spec(
        "steppe.optim.gradient_free.cma_es:CMAES",
        _FAMILY,
        "a normal distribution that adapts its covariance to the ranks of its samples",
        "Hansen 2016, arXiv:1604.00772",
        demos=(
            {},
            {"covariance": "separable", "sigma": 0.2},
            {"restarts": "ipop", "population": 6},
            {"restarts": "bipop", "bounds": (-3.0, 3.0)},
        ),
    ),
    "then_gradient": Spec(
        "steppe.optim.gradient_free.hybrid:ThenGradient",
        _HYBRID,
        "a gradient-free start, then gradient steps from the best weights found",
        evals=1,
        demos=({"first": "pso", "base": "sgd", "lr": 0.05, "switch": 5},),
        xfail={
            "counts_passes": _PROBES,
            "obeys_schedulers": "the search has no learning rate",
            "takes_groups": "the search draws a weight's candidates by its place, which groups change",
            "takes_dtypes": _REAL,
        },
    ),
    "basin_hopping": Spec(
        "steppe.optim.gradient_free.stages:BasinHopping",
        _HYBRID,
        "gradient steps in stages; after each it accepts or goes back, and jumps",
        "Wales & Doye 1997, doi:10.1021/jp970984n",
        evals=1,
        copies=(2, 1),
        demos=(
            {"base": "sgd", "lr": 0.05, "momentum": 0.5, "every": 4, "hop": 0.05},
            {"lr": 0.05, "every": 4, "hop": 0.05, "temperature": 0.0},
        ),
        xfail={"counts_passes": _PROBES, "takes_dtypes": _REAL},
    ),
    "proposed": Spec(
        "steppe.optim.gradient_free.stages:Proposed",
        _HYBRID,
        "gradient steps in stages; each starts from the best of an adviser's candidates",
        "Guo et al. 2024, arXiv:2405.19732",
        evals=1,
        copies=(101, 1),
        demos=(
            {"lr": 0.05, "every": 4, "keep": 5, "proposer": {"kind": "jitter", "scale": 0.02}},
            {
                "base": "sgd",
                "lr": 0.02,
                "proposer": {"kind": "quadratic_fit", "reach": 0.1},
                "every": 4,
                "candidates": 1,
            },
        ),
        xfail={"counts_passes": _PROBES, "takes_dtypes": _REAL},
    ),
}

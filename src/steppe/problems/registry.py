"""One line per problem. Free of torch: lists and help read it."""

from __future__ import annotations

from steppe.core.spec import Registry, Spec

__all__ = ["PROBLEMS"]

PROBLEMS = Registry(
    "problem",
    {
        "stock_factor": Spec(
            path="steppe.quant.stock_factor:StockFactor",
            family="quant",
            summary="Daily and weekly GRU price-volume factors, trained on minus the IC of each date's cross-section",
        ),
        "functions": Spec(
            path="steppe.problems.function_study:FunctionStudy",
            family="functions",
            summary="Test functions with known minima and the small problems of published optimizer comparisons",
        ),
    },
)

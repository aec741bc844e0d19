"""Index-enhanced portfolios: the holdings with the best scores that stay close to an index.

One rebalance is a linear programme (the published setting: maximise the portfolio's score within limits on stocks,
industries, size, in-index weight and turnover), a quadratic one (less a charge for active risk) or one under a
tracking-error cap. `IndexEnhancement` solves one rebalance after another; `Market` is what it is told about a date.

The problem is written in trades: buys u >= 0 and sells v >= 0 with w = w0 + u - v, whose limits are bounds of
single variables, so that only 4 + industries rows are left. See `trades` for the form, `linear` and `interior`
for the two methods, `relaxation` for what gives way when a date cannot satisfy every limit.
"""

from steppe.quant.portfolio.market import FactorRisk, Limits, Market, Relaxed, Solution
from steppe.quant.portfolio.rebalance import IndexEnhancement

__all__ = ["FactorRisk", "IndexEnhancement", "Limits", "Market", "Relaxed", "Solution"]

"""Flatness measures: `MEASURES` lists them, `measure` runs one at a point.

Each is a function ``(point, generator, **hyper) -> Measurement`` that draws from the generator alone and leaves the
weights as they were, bit for bit.
"""

from steppe.landscape.measures.registry import MEASURES, Measure, measure

__all__ = ["MEASURES", "Measure", "measure"]

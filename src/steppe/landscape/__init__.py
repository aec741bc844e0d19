"""What the loss looks like around trained weights: curvature, flatness, surfaces, trajectories.

`Point` joins a model, its loss and its data; everything else measures or draws at a point.
"""

from steppe.landscape.point import Cost, Measurement, Point

__all__ = ["Cost", "Measurement", "Point"]

"""One line per gradient-free optimizer. Importing this module does not import torch."""

from __future__ import annotations

from steppe.core.spec import Spec

__all__ = ["GRADIENT_FREE"]

_FAMILY = "gradient-free"

GRADIENT_FREE: dict[str, Spec] = {}

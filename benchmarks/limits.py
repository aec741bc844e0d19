"""What each method costs at least: gradients, sweeps through memory, copies."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LIMITS", "Limit"]


@dataclass(frozen=True)
class Limit:
    """The least a method can do with.

    Attributes:
        passes: gradients per step.
        accesses: numbers read and written besides the passes and the base's step, over the number of weights, by
            kernels that fuse all that can be fused, and that put the weights back.
        how: the accesses, sweep by sweep.
        peak, persistent: copies of the weights besides weights, gradients and the base's state, within a step and
            between steps. `peak` needs one more where a "+" stands if weights are to come back bit for bit.
    """

    passes: float
    accesses: float
    how: str
    peak: str
    persistent: str


_SAM = "norm 1, there 4 (or 3), back 2 (or 3)"
"""There: w and e are read, w + e and the copy of w written, 4; without copy 3. Back: a copy, 2, or w − e, 3."""

LIMITS = {
    "sam": Limit(2, 7, _SAM, "1", "0"),
    "usam": Limit(2, 7, _SAM, "1", "0"),
    "asam": Limit(2, 8, "norm of w ⊙ g 2, there 4, back 2", "1", "0"),
    "ssam": Limit(2, 7.25, _SAM + ", a byte of mask", "1¼", "¼"),
    "sam_on": Limit(2, 0.0, "the normalisation layers alone", "0", "0"),
    "functional_sam": Limit(2, 7, _SAM, "1", "0"),
    "gsam": Limit(2, 12, _SAM + "; norm and ⟨g, p⟩ 2, combination 3", "1+", "0"),
    "wsam": Limit(2, 11, _SAM + "; w − a (p − g) 4", "1+", "0"),
    "sagm": Limit(2, 10, _SAM + "; combination 3", "1+", "0"),
    "gnp": Limit(2, 10, _SAM + "; combination 3", "1+", "0"),
    "imbsam": Limit(3, 10, _SAM + "; sum 3", "1+", "0"),
    "friendly_sam": Limit(2, 10, "norm of g − m 2, there with the new m 6, back 2", "2", "1"),
    "vasso": Limit(2, 9, "new d and its norm 3, there 4, back 2", "2", "1"),
    "looksam": Limit(1.2, 5.6, "every 5th: SAM 7, norm and ⟨g, p⟩ 2, v 3; else: norm 1, g + v 3", "1+", "1"),
    "esam": Limit(2, 4.2, _SAM + ", of 0.6 of the tensors", "1", "0"),
    "msam": Limit(1, 7, _SAM + ", of the momentum", "0", "0"),
    "rwp": Limit(2, 9, "norm 1, there 3 (noise is not read), back 2, combination 3", "1", "0"),
    "cr_sam": Limit(3, 14, "norm 1, there 4, across 3, back 2, combination 4", "1", "0"),
    "gam": Limit(
        4,
        29,
        "norm 1, there and back 6; norm of g1 − g0 2, there 5, norm 1, on 3, back 2; dots 4, sum 5",
        "3",
        "0",
    ),
    "sampa": Limit(2, 16, "there and back 6, combination 3; norm 1, there and back 6", "2", "1"),
    "lookbehind": Limit(4, 12, "norm 1, there 4; norm 1, on 3; slow + alpha (fast − slow) 3", "2", "0"),
    "bsam": Limit(2, 21, "noise there 4, back 2; there 5, back 2; the base's step 8", "1", "2"),
}

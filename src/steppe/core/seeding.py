"""Named, independent random streams from one seed.

A stream is a pure function of (seed, names), so nothing has to be stored to resume one: the batch order of
epoch 7 is ``generator(seed, "batches", 7)`` whenever it is asked for.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["derive", "generator"]


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream ``names`` of ``seed`` (SHA-256 of both)."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for the stream ``names`` of ``seed``; the global RNG is not touched."""
    return torch.Generator().manual_seed(derive(seed, *names))

"""A GRU's last state and its gradients on CPUs, in native code. `steppe.quant.gru` is its user."""

from steppe_kernels._gru import backward, forward, paths, tape_size

__all__ = ["backward", "forward", "paths", "tape_size"]

"""Sharpness-aware optimizers: algorithms that ask for gradients at perturbed weights, over any base optimizer."""

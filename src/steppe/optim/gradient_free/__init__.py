"""Optimizers that ask for values of the loss alone, and hybrids that mix them with gradients."""

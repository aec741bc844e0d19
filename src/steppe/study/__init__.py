"""Studies: what is compared, the training loop, trials, executors, their folder and the statistics."""

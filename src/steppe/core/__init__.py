"""The words all layers share: errors, seeds, specs, objectives, checkpoints."""

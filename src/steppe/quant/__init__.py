"""Stock selection: market panels, the GRU factor, factor tests."""

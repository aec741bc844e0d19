"""Adapters to training loops that cannot run a closure. Lightning, Accelerate and skorch need none: see examples/."""

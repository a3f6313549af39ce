"""Bugs planted in the kernels' sources, and whether the gate sees them."""

"""Planted bugs in the kernels' sources, and whether the gate sees them. `mxref mutants` runs them."""

"""Ways of asking that only this project's kernels offer: their operators, tables, and every address that they touch."""

"""Cases that only this project's kernels are asked about."""

"""Checks of this project's kernels alone."""

"""The arithmetic of what only this project's kernels are asked."""

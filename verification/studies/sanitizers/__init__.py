"""The kernels under tools that watch memory and order: compute-sanitizer's, and Triton's concurrency sanitizer."""

"""What the gate does for this project's own kernels alone."""

"""Who answers: the shipped kernels, PyTorch baselines, foreign callables. Nothing here judges."""

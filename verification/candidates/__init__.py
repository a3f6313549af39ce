"""Who answers: the shipped kernels, PyTorch baselines, foreign callables. Nothing here judges."""

from mxref.moved import names_of

__getattr__ = names_of(__name__)

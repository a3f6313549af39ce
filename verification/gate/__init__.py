"""Which checks on which cases, and the verdict."""

from mxref.moved import names_of

__getattr__ = names_of(__name__)

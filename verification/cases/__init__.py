"""What is asked: cases as data, and the numbers drawn for them. Nothing here judges."""

from mxref.moved import names_of

__getattr__ = names_of(__name__)

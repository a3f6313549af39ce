"""How an implementation declines what it does not support."""

from __future__ import annotations

__all__ = ["NotCovered"]


class NotCovered(Exception):  # noqa: N818
    """Raised by an implementation under judgement for a call that it does not support; says which.

    The gate counts what is declined against the domain; a subset that is declared beforehand (`mxref gate --covers`) is
    not asked for at all. Any other exception, NotImplementedError included, is a failure.
    """

"""How an implementation declines what it does not support."""

from __future__ import annotations


class NotCovered(Exception):  # noqa: N818
    """Raised by an implementation under judgement for a call that it does not support; says which class of calls.

        raise mxref.NotCovered("gates")

    The gate counts what is declined against the domain and exits 1. What lies outside a subset that is declared
    beforehand (`mxref gate --covers`, or an attribute `mxref_covers`) is not asked for, and exits 0. Any other
    exception, NotImplementedError included, is a failure.
    """

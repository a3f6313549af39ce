"""The error that means: the command was used wrongly."""


class UsageError(Exception):
    """Wrong use of the command line; the message is one line for the person who typed it. Ends with exit code 2."""

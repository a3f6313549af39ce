"""Which checks on which cases, and the verdict."""

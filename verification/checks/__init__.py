"""Each check compares outputs with an expectation and returns findings."""

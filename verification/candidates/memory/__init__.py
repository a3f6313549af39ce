"""Memory that candidates run in: red zones, guard pages, a watched interpreter."""

"""Pure functions: declared rounding points and accumulation, bounds, thresholds, metrics."""

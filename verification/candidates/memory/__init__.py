"""Memory that candidates run in: red zones, fresh memory; and the order in which programs run."""

"""How fast: what is timed, the clocks, the race beside the composite, the record and its history."""

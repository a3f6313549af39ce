"""Studies of the gate itself and of other implementations."""

"""Implementations from elsewhere, for the scoreboard and the benchmarks."""

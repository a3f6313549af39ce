"""Ahead-of-time compilation, and what the machine code shows."""

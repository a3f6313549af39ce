"""Judges any implementation of the layer: cases, metrics, bounds and guards, and the commands that run them."""

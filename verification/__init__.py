"""Judges any implementation of the layer: cases, candidates, checks, the gate, and the commands that run them."""

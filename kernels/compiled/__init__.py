"""Recorded launches, compiled ahead of time."""

"""Implementations from elsewhere, judged by the gate's checks."""

"""Whole models of published sizes with random weights, trained on packed and on dense experts: how fast, how large."""

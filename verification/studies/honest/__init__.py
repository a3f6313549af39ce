"""Implementations that conform to the contract, which no check may reject."""

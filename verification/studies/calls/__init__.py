"""Planted bugs of how a layer is called, as foreign candidates: the gate must fail every one."""

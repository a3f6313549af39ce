"""Packed experts in the modules of transformers and PEFT."""

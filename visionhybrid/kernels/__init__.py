"""Operators. Each folder: `reference.py` is the definition, `eager.py` the CPU path, `triton.py` the GPU path."""

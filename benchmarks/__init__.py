"""Benchmarks of the operators, ``python -m benchmarks.NAME``; README.md says how they measure."""

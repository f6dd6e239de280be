"""Measurements of accuracy, speed and memory; their results are in `benchmarks/results`."""

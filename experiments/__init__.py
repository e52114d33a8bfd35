"""Experiment files, one a run, and benchmarks."""

"""Benchmarks of the promises: the bound of each step, long runs, several GPUs."""

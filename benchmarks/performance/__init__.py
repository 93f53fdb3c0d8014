"""Benchmarks of time and memory of a step."""

"""Kronecker factors of the Fisher matrix: what they are (factors) and how they are measured (capture, hutchinson)."""

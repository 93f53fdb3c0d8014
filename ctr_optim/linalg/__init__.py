"""Batched linear algebra on stacks of matrices."""

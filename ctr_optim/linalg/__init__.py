"""Linear algebra on stacks of matrices, which every part may use."""

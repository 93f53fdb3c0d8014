"""From gradients to a step: Adam in an orthonormal basis, batched over parameters of one shape."""

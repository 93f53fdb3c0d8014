"""Steps from gradients: Adam in an orthonormal basis, batched over parameters of one shape."""

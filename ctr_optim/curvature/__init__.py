"""Curvature metrics: Kronecker factors from hooks (kfac), Adam's second moments (gradient), the Hessian's diagonal."""

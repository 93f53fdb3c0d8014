"""No curvature: there are no hooks, no metric and no trust region."""

from __future__ import annotations

from ctr_optim.curvature.defaults import CurvatureBase


class NoCurvature(CurvatureBase):
    """No metric: the optimizer takes Adam's steps unchanged."""

    measures = False

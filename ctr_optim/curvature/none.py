"""No curvature: nothing is observed, no step has a length, and no trust region holds."""

from __future__ import annotations

from ctr_optim.curvature.defaults import CurvatureBase


class NoCurvature(CurvatureBase):
    """No metric: steps are Adam's own."""

    measures = False

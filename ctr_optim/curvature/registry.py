"""Registry of the values of the option ``curvature``."""

from __future__ import annotations

from ctr_optim.curvature.defaults import CurvatureBase
from ctr_optim.curvature.gradient import Gradient
from ctr_optim.curvature.hutchinson import Hutchinson
from ctr_optim.curvature.kfac import KFAC
from ctr_optim.curvature.none import NoCurvature

CURVATURES: dict[str, type[CurvatureBase]] = {
    "kfac": KFAC,
    "gradient": Gradient,
    "hutchinson": Hutchinson,
    "none": NoCurvature,
}

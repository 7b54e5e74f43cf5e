"""Normalizing flows: layers that carry the score along, and flows made of them.

=====================================================  =========================================================================
layer                                                  score rule
=====================================================  =========================================================================
`AffineCoupling`, `SplineCoupling`                     one derivative of the network by its input
`LogisticMixtureCoupling`, `CircularCoupling`,         one derivative of the network by its input; roots on the way back only
`PlaquetteCoupling`
`ElementwiseAffine`, `SinhArcsinh`, `ElementwiseSpline`  division by the slope
`Permutation`, `Householder`                           the map itself
`LinearLU`                                             two triangular solves
`Continuous` (needs diffrax)                           the equation of the score, solved along
`Autoregressive`                                       a triangular solve; the other way one derivative
`Chain`, `Stacked`, `Inverted`                         those of what they are made of
=====================================================  =========================================================================
"""

from ergodica.core.flow import AbstractLayer, Chain, Flow, StandardNormal, UniformTorus
from ergodica.models.flows.autoregressive import Autoregressive
from ergodica.models.flows.builders import (
    inverse_autoregressive_flow,
    masked_autoregressive_flow,
    real_nvp,
    spline_flow,
)
from ergodica.models.flows.composition import Inverted, Stacked
from ergodica.models.flows.continuous import Continuous, Hutchinson, VelocityField, continuous_flow
from ergodica.models.flows.coupling import AffineCoupling, SplineCoupling
from ergodica.models.flows.elementwise import ElementwiseAffine, ElementwiseSpline, SinhArcsinh
from ergodica.models.flows.gauge import PlaquetteCoupling, u1_flow
from ergodica.models.flows.implicit import CircularCoupling, LogisticMixtureCoupling
from ergodica.models.flows.linear import Householder, LinearLU, Permutation
from ergodica.models.flows.masks import alternating_mask, checkerboard_mask, half_mask
from ergodica.models.flows.neutra import neutra

__all__ = [
    "AbstractLayer",
    "AffineCoupling",
    "Autoregressive",
    "Chain",
    "CircularCoupling",
    "Continuous",
    "ElementwiseAffine",
    "ElementwiseSpline",
    "Flow",
    "Householder",
    "Hutchinson",
    "Inverted",
    "LinearLU",
    "LogisticMixtureCoupling",
    "Permutation",
    "PlaquetteCoupling",
    "SinhArcsinh",
    "SplineCoupling",
    "Stacked",
    "StandardNormal",
    "UniformTorus",
    "VelocityField",
    "alternating_mask",
    "checkerboard_mask",
    "continuous_flow",
    "half_mask",
    "inverse_autoregressive_flow",
    "masked_autoregressive_flow",
    "neutra",
    "real_nvp",
    "spline_flow",
    "u1_flow",
]

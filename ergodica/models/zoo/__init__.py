"""Named problems: data for models, and targets whose answers are known.

====================  ========  ==========  =======================================================
name                  data      parameters  what
====================  ========  ==========  =======================================================
`doctor_visits`       20,190    10          did a person see a doctor in a year? Logistic regression
`auto_mpg`            392                   how far does a car go on a gallon? Nonlinear regression
`digits`              1,797                 handwritten digits of 8 x 8 pixels, ten classes
====================  ========  ==========  =======================================================

Targets, for flows and for samplers: each has a log density, its normaliser, expectations of named observables (exact, or with
standard errors), and independent draws where there are some.

=======================  ==========  ==================  ======  ======================================================
name                     dimension   reference           draws   what
=======================  ==========  ==================  ======  ======================================================
`gaussian_mixture_cube`  any         closed form         yes     2^D modes at the corners of a cube
`gaussian_mixture`       any         closed form         yes     any mixture of Gaussians
`many_well`              even        quadrature          yes     2^(D/2) modes: double wells, as in molecules
`phi4`                   T x L       closed form (free   free    a scalar field on a periodic lattice, with one phase or
                                     theory), transfer           two signs
                                     matrices, chains
`u1_gauge`               2 T x L     closed form         yes     a gauge field of angles, with topological charges
`eight_schools`          10          quadrature          no      a hierarchical posterior with a funnel
`visit_regression`       10          importance          no      posterior of the regression of `doctor_visits`
                                     sampling
=======================  ==========  ==================  ======  ======================================================
"""

from ergodica.models.zoo.auto_mpg import auto_mpg
from ergodica.models.zoo.digits import digits
from ergodica.models.zoo.doctor_visits import doctor_visits, logistic_regression
from ergodica.models.zoo.lattice_field import phi4
from ergodica.models.zoo.mixtures import gaussian_mixture, gaussian_mixture_cube
from ergodica.models.zoo.schools import eight_schools
from ergodica.models.zoo.u1 import u1_gauge
from ergodica.models.zoo.visits import visit_regression
from ergodica.models.zoo.wells import many_well

__all__ = [
    "auto_mpg",
    "digits",
    "doctor_visits",
    "eight_schools",
    "gaussian_mixture",
    "gaussian_mixture_cube",
    "logistic_regression",
    "many_well",
    "phi4",
    "u1_gauge",
    "visit_regression",
]

"""Named problems with their data.

====================  ========  ==========  =======================================================
name                  data      parameters  what
====================  ========  ==========  =======================================================
`doctor_visits`       20,190    10          did a person see a doctor in a year? Logistic regression
`auto_mpg`            392                   how far does a car go on a gallon? Nonlinear regression
`digits`              1,797                 handwritten digits of 8 x 8 pixels, ten classes
====================  ========  ==========  =======================================================
"""

from ergodica.models.zoo.auto_mpg import auto_mpg
from ergodica.models.zoo.digits import digits
from ergodica.models.zoo.doctor_visits import doctor_visits, logistic_regression

__all__ = ["auto_mpg", "digits", "doctor_visits", "logistic_regression"]

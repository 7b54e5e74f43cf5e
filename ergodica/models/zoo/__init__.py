"""Named problems with their data.

====================  ========  ==========  =======================================================
name                  data      parameters  what
====================  ========  ==========  =======================================================
`doctor_visits`       20,190    10          did a person see a doctor in a year? Logistic regression
====================  ========  ==========  =======================================================
"""

from ergodica.models.zoo.doctor_visits import doctor_visits, logistic_regression

__all__ = ["doctor_visits", "logistic_regression"]

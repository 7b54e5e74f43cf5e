"""Gradients of a log posterior whose data are spread over clients."""

from ergodica.estimators.federated.build import fsgld
from ergodica.estimators.federated.conducive import Conducive
from ergodica.estimators.federated.fit import laplace_surrogates
from ergodica.estimators.federated.local_runs import moment_surrogates
from ergodica.estimators.federated.private import GaussianPrivacy, PrivateConducive, gaussian_privacy
from ergodica.estimators.federated.surrogates import ExponentialSurrogates, GaussianSurrogates

__all__ = [
    "Conducive",
    "ExponentialSurrogates",
    "GaussianPrivacy",
    "GaussianSurrogates",
    "PrivateConducive",
    "fsgld",
    "gaussian_privacy",
    "laplace_surrogates",
    "moment_surrogates",
]

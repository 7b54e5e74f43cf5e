"""What to cite for the methods that a run used."""

from collections.abc import Iterator
from typing import Any

import equinox as eqx

BIBLIOGRAPHY: dict[str, str] = {
    "alamo2016": """@article{alamo2016,
  author = {Alamo, A. and Sanz-Serna, J. M.},
  title = {A Technique for Studying Strong and Weak Local Errors of Splitting Stochastic Integrators},
  journal = {SIAM Journal on Numerical Analysis}, volume = {54}, number = {6}, pages = {3239--3257}, year = {2016}
}""",
    "baker2019": """@article{baker2019,
  author = {Baker, Jack and Fearnhead, Paul and Fox, Emily B. and Nemeth, Christopher},
  title = {Control Variates for Stochastic Gradient {MCMC}},
  journal = {Statistics and Computing}, volume = {29}, pages = {599--615}, year = {2019}
}""",
    "leimkuhler2013": """@article{leimkuhler2013,
  author = {Leimkuhler, Benedict and Matthews, Charles},
  title = {Rational Construction of Stochastic Numerical Methods for Molecular Sampling},
  journal = {Applied Mathematics Research eXpress}, volume = {2013}, number = {1}, pages = {34--56}, year = {2013}
}""",
    "welling2011": """@inproceedings{welling2011,
  author = {Welling, Max and Teh, Yee Whye},
  title = {Bayesian Learning via Stochastic Gradient {L}angevin Dynamics},
  booktitle = {Proceedings of the 28th International Conference on Machine Learning}, pages = {681--688}, year = {2011}
}""",
}


def cite(*algorithms: Any) -> str:
    """Give BibTeX entries for the methods in some samplers or estimators, and in all that they hold.

    Parameters
    ----------
    *algorithms : AbstractKernel or AbstractGradientEstimator

    Returns
    -------
    str

    Examples
    --------
    >>> import ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, initial=0.0)
    >>> print(cite(erg.samplers.SGLD(erg.estimators.Minibatch(posterior, scheme="full"), 0.1)).splitlines()[0])
    @inproceedings{welling2011,
    """
    keys = sorted({key for algorithm in algorithms for key in _keys(algorithm)})
    return "\n\n".join(BIBLIOGRAPHY[key] for key in keys)


def _keys(algorithm: Any) -> Iterator[str]:
    yield from getattr(algorithm, "references", ())
    if isinstance(algorithm, eqx.Module):
        for value in vars(algorithm).values():
            yield from _keys(value)

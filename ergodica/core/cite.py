"""What to cite for the methods that a run used."""

import functools
import importlib.resources
import re
from collections.abc import Iterator
from typing import Any

import equinox as eqx

_ENTRY = re.compile(r"^@\w+\{([\w-]+),\n.*?^\}$", re.MULTILINE | re.DOTALL)


@functools.cache
def bibliography() -> dict[str, str]:
    """BibTeX entries by key, from ``ergodica/core/bibliography.bib``."""
    text = importlib.resources.files("ergodica.core").joinpath("bibliography.bib").read_text(encoding="utf-8")
    return {found.group(1): found.group(0) for found in _ENTRY.finditer(text)}


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
    return "\n\n".join(bibliography()[key] for key in keys)


def _keys(algorithm: Any) -> Iterator[str]:
    yield from getattr(algorithm, "references", ())
    if isinstance(algorithm, eqx.Module):
        for value in vars(algorithm).values():
            yield from _keys(value)
    if isinstance(algorithm, dict | list | tuple):
        for value in algorithm.values() if isinstance(algorithm, dict) else algorithm:
            yield from _keys(value)

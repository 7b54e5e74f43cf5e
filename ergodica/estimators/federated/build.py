"""FSGLD in one call."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from ergodica.core import check
from ergodica.core.posterior import Posterior
from ergodica.core.shards import Shards
from ergodica.core.types import Key
from ergodica.estimators.federated.conducive import Conducive, client_probabilities
from ergodica.estimators.federated.fit import laplace_surrogates
from ergodica.estimators.federated.local_runs import moment_surrogates
from ergodica.estimators.federated.surrogates import AbstractSurrogates
from ergodica.samplers.federated import Federated
from ergodica.samplers.langevin import SGLD
from ergodica.samplers.visits import balanced_local_steps


def fsgld(
    shards: Shards | Posterior | Sequence[Posterior],
    client: Any = None,
    *,
    step_size: Any,
    local_steps: Any = 1,
    batch_size: int | None = None,
    surrogates: Literal["laplace", "moments"] | AbstractSurrogates | None = "laplace",
    covariance: Literal["full", "diagonal"] | int = "full",
    probabilities: Any = "sizes",
    strength: Any = 1.0,
    schedule: Any = "independent",
    seconds: Any = None,
    temperature: Any = 1.0,
    key: Key | None = None,
) -> Federated:
    r"""Make a federated SGLD: shards, surrogates, gradient, kernel and visits in one call.

    Parameters
    ----------
    shards : Shards, Posterior or list of Posterior
        A posterior (from `ergodica.from_numpyro`, say) with ``client``; or one posterior a client, each with the whole prior.
        For one data set a client, `Shards.from_datasets`.
    client : array (N,), optional
        Which client each datum belongs to.
    step_size : float or schedule
        :math:`h` of `SGLD`; papers on FSGLD write :math:`2h`.
    local_steps : int or int array (S,)
        Steps of a visit; with ``seconds`` their mean over the clients.
    batch_size : int, optional
        Rows a gradient; all of the client's unless given.
    surrogates : {"laplace", "moments"}, AbstractSurrogates or None
        `laplace_surrogates` at the posterior's mode, `moment_surrogates` of local runs with step ``step_size`` over :math:`f_s`,
        surrogates at hand, or none (DSGLD).
    covariance : {"full", "diagonal"} or int
        Of surrogates made here.
    probabilities, strength
        As for `Conducive`.
    schedule : {"independent", "permutation"}
        As for `Federated`.
    seconds : array (S,), optional
        Time of a step at each client: visits are then given lengths that take all the same time, and ``probabilities`` are the
        shares of steps that follow (`ergodica.samplers.visits.balanced_local_steps`).
    temperature : float or schedule
    key : typed PRNG key, optional
        For fits that are random; a fixed key unless given.

    Returns
    -------
    Federated
        A sampler, for `ergodica.sample` and `ergodica.predict_federated`.

    Raises
    ------
    ValueError, TypeError
        For arguments that do not fit each other.

    References
    ----------
    El Mekkaoui, Mesquita, Blomstedt and Kaski (2021), Algorithm 1.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.array(0.0))
    >>> sampler = fsgld(posterior, client=[0, 0, 1, 1, 1, 1], step_size=0.01, local_steps=20)
    >>> dt = erg.sample(jax.random.key(0), sampler, num_samples=4000, num_warmup=200, thin=20)
    >>> round(float(dt.posterior["position"].mean()), 1), round(15 / 7, 1)
    (2.1, 2.1)
    """
    shards = as_shards(shards, client)
    if seconds is not None:
        if np.ndim(local_steps) != 0 or not isinstance(probabilities, str) or probabilities != "sizes":
            raise ValueError(
                "seconds choose local_steps for each client, and probabilities; give their mean as local_steps alone."
            )
        if np.shape(seconds) != (shards.num_clients,):
            raise ValueError(
                f"seconds must have one entry a client, shape ({shards.num_clients},); got {np.shape(seconds)}."
            )
        local_steps, probabilities = balanced_local_steps(seconds, local_steps)
    if isinstance(surrogates, str):
        check.one_of("surrogates", surrogates, ("laplace", "moments"))
        key = jax.random.key(0) if key is None else key
        if surrogates == "laplace":
            surrogates = laplace_surrogates(shards, covariance=covariance, probabilities=probabilities, key=key)
        else:
            if callable(step_size):
                raise ValueError(
                    "surrogates='moments' needs a number for step_size; for a schedule, give moment_surrogates(…)."
                )
            local = np.asarray(step_size, np.float64) / client_probabilities(shards, probabilities)
            surrogates = moment_surrogates(
                key, shards, local, batch_size=batch_size, covariance=covariance, probabilities=probabilities
            )
    gradient = Conducive(shards, surrogates, batch_size, probabilities=probabilities, strength=strength)
    return Federated(SGLD(gradient, step_size, temperature=temperature), local_steps, schedule)


def as_shards(shards: Any, client: Any) -> Shards:
    """Make shards of what a user has."""
    if isinstance(shards, Posterior):
        if client is None:
            raise ValueError("client must say whose each datum is, where one posterior of all the data is given.")
        return Shards(shards, client)
    if client is not None:
        raise ValueError(
            "client belongs to a posterior of all the data; shards and lists of posteriors have their own."
        )
    if isinstance(shards, Shards):
        return shards
    return Shards.from_posteriors(shards)

"""Samplers of both libraries under one face: replicates side by side.

Replicates have noises of their own and share the batches, which makes a run of 8 cost little more than a run of one. Where the
bias is small, injected noise is most of the noise: the errors of two replicates then have a correlation of about the excess
of the variance, 0.1 at the settings found here. Thermostats and noise correction put gradient noise in the place of injected
noise; their replicates have batches of their own, and half as many are run in the search.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import blackjax
import equinox as eqx
import jax
import jax.numpy as jnp

import ergodica as erg
from accuracy import laws
from accuracy.problems import Problem


class Ergodica(eqx.Module):
    """A kernel of this library; its own estimator draws the batches."""

    kernel: Any
    shared: bool = eqx.field(static=True, default=True)

    def init(self, key, starts):
        if not self.shared:
            return jax.vmap(self.kernel.init)(jax.random.split(key, len(starts)), starts), None
        key_cursor, key_batch, key_init = jax.random.split(key, 3)
        batch, cursor = self.kernel.gradient.draw(key_batch, self.kernel.gradient.init(key_cursor, starts[0]))
        states = jax.vmap(self.kernel.init, (0, 0, None))(jax.random.split(key_init, len(starts)), starts, batch)
        return states, cursor

    def step(self, key, carry):
        states, cursor = carry
        if not self.shared:
            states, info = jax.vmap(self.kernel.step)(jax.random.split(key, states.position.shape[0]), states)
            return (states, None), states.position, info.n_grad[0]
        key_batch, key_noise = jax.random.split(key)
        batch, cursor = self.kernel.gradient.draw(key_batch, cursor)
        keys = jax.random.split(key_noise, states.position.shape[0])
        states, info = jax.vmap(self.kernel.step, (0, 0, None))(keys, states, batch)
        return (states, cursor), states.position, info.n_grad[0]


class BlackJAX(eqx.Module):
    """A kernel of BlackJAX, fed with independent rows drawn with replacement."""

    rows: erg.estimators.Minibatch
    step_size: jax.Array
    alpha: jax.Array
    shared: bool = eqx.field(static=True)
    gradient: Callable = eqx.field(static=True)
    algorithm: str = eqx.field(static=True)
    num_inner: int = eqx.field(static=True)
    cost: int = eqx.field(static=True)

    def init(self, key, starts):
        if self.algorithm == "sgnht":
            keys = jax.random.split(key, len(starts))
            return jax.vmap(blackjax.sgmcmc.sgnht.init, (0, 0, None))(starts, keys, self.alpha)
        return starts

    def step(self, key, states):
        key_rows, key_noise = jax.random.split(key)
        shared = self.rows.independent_batch(key_rows) if self.shared else None
        module = getattr(blackjax.sgmcmc, self.algorithm)
        kernel = module.build_kernel() if self.algorithm == "sgld" else module.build_kernel(self.alpha)
        more = (self.num_inner,) if self.algorithm == "sghmc" else ()

        def move(key, state):
            key_own, key = jax.random.split(key)
            batch = self.rows.independent_batch(key_own) if shared is None else shared
            return kernel(key, state, self.gradient, batch.data, self.step_size, *more)

        first = states.position if self.algorithm == "sgnht" else states
        states = jax.vmap(move)(jax.random.split(key_noise, len(first)), states)
        return states, states.position if self.algorithm == "sgnht" else states, jnp.asarray(self.cost)


class Family(NamedTuple):
    """What is tuned: a method, and its law, for each point ``(step size, friction, inner steps)``.

    Attributes
    ----------
    make, law : callable
        From a point, to a method and to a `laws.Law`, ``None`` where it is unstable.
    frictions, inner : tuple
        Values to choose from; ``(None,)`` where a method has none.
    batches : int
        Batches whose gradients a call needs, for each inner step.
    setup : int
        Datum-gradients before the first step.
    own_batches : bool
        Whether replicates do not share their batches.
    """

    make: Callable
    law: Callable
    frictions: tuple = (None,)
    inner: tuple = (None,)
    batches: int = 1
    setup: int = 0
    own_batches: bool = False


FRICTIONS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
INNER = (5, 10, 20, 50, 100)
CHEAP = 20_000  # data up to which methods are run that are known to do as blackjax.sgld does
MEASURED_BATCHES = 256  # whose gradients at the mode tell NoiseCorrectedSGLD the noise


def stable(law: Callable) -> Callable:
    """Give ``None`` where a law raises because its step is unstable."""

    def or_none(*point):
        try:
            return law(*point)
        except ValueError:
            return None

    return or_none


def of_ergodica(
    maker: Callable, gradient: Any, problem: Problem, share: float, *, damped: bool, setup: int = 0
) -> Family:
    """A family of a kernel of this library whose step is linear on a Gaussian."""
    minibatch = getattr(gradient, "minibatch", gradient)
    noise = share * minibatch.num_blocks * problem.curvatures

    def kernel(h, gamma, _):
        return maker(gradient, h, gamma) if damped else maker(gradient, h)

    return Family(
        lambda *point: Ergodica(kernel(*point)),
        stable(
            lambda *point: laws.law_of_kernel(
                kernel(*point), problem.curvatures, noise, minibatch.num_blocks if minibatch.reshuffles else None
            )
        ),
        FRICTIONS if damped else (None,),
        batches=2 if minibatch is not gradient else 1,
        setup=setup,
    )


def badodab(gradient: Any, problem: Problem) -> Family:
    """The thermostat, with independent rows."""
    noise = gradient.num_blocks * problem.curvatures
    return Family(
        lambda h, gamma, _: Ergodica(erg.samplers.BADODAB(gradient, h, gamma), shared=False),
        lambda h, gamma, _: laws.law_of_badodab(problem.curvatures, noise, h, gamma),
        frictions=FRICTIONS,
        own_batches=True,
    )


def noise_corrected(gradient: Any, problem: Problem) -> Family:
    """SGLD less the noise that some batches have at the mode, by coordinate."""

    @jax.jit
    def measured(gradient, mode):
        def one(key):
            return gradient.at(mode, gradient.independent_batch(key)).gradient

        return jnp.var(jax.lax.map(one, jax.random.split(jax.random.key(6), MEASURED_BATCHES)), axis=0, ddof=1)

    noise = measured(gradient, problem.mode)

    def law(h, *_):
        kernel = erg.samplers.NoiseCorrectedSGLD(gradient, h, noise=jnp.asarray(noise.mean()))
        return laws.law_of_kernel(kernel, problem.curvatures, gradient.num_blocks * problem.curvatures, None)

    return Family(
        lambda h, *_: Ergodica(erg.samplers.NoiseCorrectedSGLD(gradient, h, noise=noise), shared=False),
        stable(law),
        setup=MEASURED_BATCHES * problem.batch_size,
        own_batches=True,
    )


def of_blackjax(
    algorithm: str, problem: Problem, law: Callable, gradient: Any = None, batches: int = 1, setup: int = 0
) -> Family:
    """A family of a kernel of BlackJAX."""
    rows = erg.estimators.Minibatch(problem.posterior, problem.batch_size, "uniform")
    if gradient is None:
        gradient = blackjax_gradient(problem)

    def make(h, alpha, num_inner):
        alpha = jnp.asarray(0.0 if alpha is None else alpha)
        inner = 1 if num_inner is None else num_inner
        cost = batches * inner * problem.batch_size
        return BlackJAX(rows, jnp.asarray(h), alpha, algorithm != "sgnht", gradient, algorithm, inner, cost)

    return Family(
        make,
        law,
        (None,) if algorithm == "sgld" else FRICTIONS,
        INNER if algorithm == "sghmc" else (None,),
        batches,
        setup,
        own_batches=algorithm == "sgnht",
    )


def blackjax_gradient(problem: Problem) -> Callable:
    """BlackJAX's own minibatch estimator."""
    return blackjax.sgmcmc.gradients.grad_estimator(
        problem.posterior.log_prior, problem.log_likelihood_of_one, problem.num_data
    )


def families(problem: Problem) -> dict[str, Family]:
    """All that are compared, each with batches that suit it."""
    n, samplers, curvatures = problem.batch_size, erg.samplers, problem.curvatures
    rows, blocks, sweeps = (
        erg.estimators.Minibatch(problem.posterior, n, scheme) for scheme in ("uniform", "blocks", "symmetric")
    )
    noise = rows.num_blocks * curvatures

    def sgld_law(noise):
        return stable(lambda h, *_: laws.law_of_kernel(samplers.SGLD(rows, h), curvatures, noise, None))

    found = {
        "blackjax.sgld": of_blackjax("sgld", problem, sgld_law(noise)),
        "blackjax.sghmc": of_blackjax("sghmc", problem, lambda *p: laws.law_of_blackjax_sghmc(curvatures, noise, *p)),
        "blackjax.sgnht": of_blackjax(
            "sgnht", problem, lambda h, alpha, _: laws.law_of_blackjax_sgnht(curvatures, noise, h, alpha)
        ),
        "BADODAB, independent rows": badodab(rows, problem),
        "NoiseCorrectedSGLD, independent rows": noise_corrected(rows, problem),
        "SGLD, blocks": of_ergodica(samplers.SGLD, blocks, problem, 1.0, damped=False),
        "BAOAB, blocks": of_ergodica(samplers.BAOAB, blocks, problem, 1.0, damped=True),
        "BAOA, blocks": of_ergodica(samplers.BAOA, blocks, problem, 1.0, damped=True),
        "UBU, blocks": of_ergodica(samplers.UBU, blocks, problem, 1.0, damped=True),
        "UBU, symmetric sweeps": of_ergodica(samplers.UBU, sweeps, problem, 1.0, damped=True),
    }
    if problem.num_data <= CHEAP:
        found["SGLD, independent rows"] = of_ergodica(samplers.SGLD, rows, problem, 1.0, damped=False)
        found["BAOAB, independent rows"] = of_ergodica(samplers.BAOAB, rows, problem, 1.0, damped=True)
    ratio = laws.control_variate_noise(problem.posterior, problem.mode, problem.start(jax.random.key(5), 4))
    if ratio > 1e-6:  # on the Gaussian mean a control variate is the full gradient
        of_peer = blackjax.sgmcmc.gradients.control_variates(
            blackjax_gradient(problem), problem.mode, problem.posterior.data
        )
        found["blackjax.sgld, control variate"] = of_blackjax(
            "sgld", problem, sgld_law(ratio * noise), of_peer, 2, problem.num_data
        )
        for name, maker in (("SGLD", samplers.SGLD), ("BAOAB", samplers.BAOAB), ("UBU", samplers.UBU)):
            corrected = erg.estimators.ControlVariate(blocks, problem.mode)
            found[f"{name}, blocks, control variate"] = of_ergodica(
                maker, corrected, problem, ratio, damped=name != "SGLD", setup=problem.num_data
            )
    return found

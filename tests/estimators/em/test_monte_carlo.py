"""Gradients with remembered latents: mean and covariance at rest, by enumeration of all latents and proposals."""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.estimators import MonteCarloEM
from ergodica.estimators.em import monte_carlo
from tests.support.quadrature import moments
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("x64")

VALUES, NUM_ROWS = 4, 3
DATA = {"x": np.array([0, 1, 1]), "right": np.array([[1.0, 0, 0, 1], [0, 1, 0, 0], [1, 1, 0, 1]])}
LOGITS = np.array([[0.2, -0.4, 0.5, 0.1], [-0.3, 0.6, 0.0, 0.4]])


class Law(eqx.Module):
    """A categorical law of each row, whose draw may be given beforehand."""

    logits: jax.Array
    outcome: jax.Array | None = None

    def sample(self, key, sample_shape):
        assert sample_shape == ()
        return jax.random.categorical(key, self.logits) if self.outcome is None else self.outcome

    def log_prob(self, value):
        return jnp.sum(jax.nn.one_hot(value, VALUES) * jax.nn.log_softmax(self.logits), axis=-1)


def is_right(logits, z, rows):
    return jnp.where(jnp.sum(jax.nn.one_hot(z, VALUES) * rows["right"], axis=-1) > 0, 0.0, -jnp.inf)


def log_evidence(logits):
    prior = jax.nn.softmax(logits)[DATA["x"]]
    return jnp.sum(jnp.log(jnp.sum(prior * DATA["right"], axis=-1)))


BOTH = np.array(list(itertools.product(range(VALUES), repeat=2 * NUM_ROWS)))
MEMORY, PROPOSED = BOTH[:, :NUM_ROWS], BOTH[:, NUM_ROWS:]
RIGHT_SO_FAR = np.all(DATA["right"][np.arange(NUM_ROWS), MEMORY] > 0, axis=1)


@functools.cache
def compiled(*, control_variate, _mutant=None):
    """The shipped gradient as a function of logits, latents and proposals, over all of the latter two."""

    def of(logits, memory, proposed):
        gradient = MonteCarloEM(
            lambda logits, rows: Law(logits[rows["x"]], proposed),
            is_right,
            DATA,
            scheme="full",
            control_variate=control_variate,
            initial=memory,
        )
        state = gradient.init(jax.random.key(0), logits)
        estimate, after = gradient.estimate(jax.random.key(1), logits, state)
        return estimate.gradient.ravel(), after.latents, after.started, estimate.aux.acceptance_rate

    outcomes = jnp.asarray(MEMORY[RIGHT_SO_FAR]), jnp.asarray(PROPOSED[RIGHT_SO_FAR])
    return jax.jit(lambda logits: jax.vmap(of, (None, 0, 0))(logits, *outcomes))


def at_rest(logits, *, control_variate=True, mutant=None):
    """Mean and covariance of the shipped gradient over all latents from the posterior and all proposals."""
    prior = np.asarray(jax.nn.softmax(logits))[DATA["x"]]
    posterior = prior * DATA["right"]
    posterior /= posterior.sum(axis=1, keepdims=True)
    rows = np.arange(NUM_ROWS)
    weights = np.prod(posterior[rows, MEMORY] * prior[rows, PROPOSED], axis=1)[RIGHT_SO_FAR]
    gradients, latents, started, rates = compiled(control_variate=control_variate, _mutant=mutant)(logits)
    assert np.all(started)
    for row in rows:  # the chains keep their law
        law = np.bincount(np.asarray(latents)[:, row], weights, VALUES)
        np.testing.assert_allclose(law, posterior[row], atol=1e-12)
    np.testing.assert_allclose(weights @ np.asarray(rates), np.mean(np.sum(prior * DATA["right"], axis=1)), rtol=1e-10)
    return moments(gradients, weights)


@pytest.mark.parametrize("control_variate", [True, False])
def test_unbiased_at_rest(control_variate):
    """Exactly, at two points."""
    for scale in (1.0, 3.0):
        logits = jnp.asarray(scale * LOGITS)
        mean, _ = at_rest(logits, control_variate=control_variate)
        np.testing.assert_allclose(mean, np.ravel(jax.grad(log_evidence)(logits)), atol=1e-11)


def test_a_baseline_that_includes_its_own_row_is_biased(monkeypatch):
    monkeypatch.setattr(monte_carlo, "leave_one_out_mean", lambda x: jnp.broadcast_to(jnp.mean(x), x.shape))
    mean, _ = at_rest(jnp.asarray(LOGITS), mutant="own row")
    exact = np.ravel(jax.grad(log_evidence)(jnp.asarray(LOGITS)))
    assert np.max(np.abs(mean - exact)) > 0.05 * np.max(np.abs(exact))


def test_variance_vanishes_as_answers_become_right():
    """Towards right answers (two of row 0 keep equal weight): with the control variate to nothing, without it to a constant.

    Where few proposals are accepted, at the start, it does harm.
    """
    towards = np.array([[1.0, -1, -1, 1], [-1, 1, -1, -1]])
    total = {cv: [] for cv in (True, False)}
    for step in (0.0, 1.0, 3.0, 6.0):
        for cv, values in total.items():
            values.append(np.trace(at_rest(jnp.asarray(step * towards), control_variate=cv)[1]))
    with_it, without = np.array(total[True]), np.array(total[False])
    assert np.all(np.diff(with_it) < 0)
    assert with_it[-1] < 1e-3 * with_it[0]
    assert without[-1] > 0.4
    assert np.all((with_it < without) == [False, True, True, True])


# --- likelihoods of any value, guides, batches ---------------------------------------------------------------------------

TABLE = np.array([[0.1, 0.9, 0.3, 0.5], [1.2, 0.2, 0.7, 0.4], [0.05, 0.6, 0.3, 0.9]])
PARAMS = {"prior": LOGITS, "slope": np.array(0.8), "guide": np.array([[0.3, 0.1, -0.2, 0.4]] * NUM_ROWS)}


def general_prior(params, rows):
    return Law(params["prior"][rows["x"]])


def general_guide(params, rows):
    return Law(params["guide"][rows["number"]])


def general_likelihood(params, z, rows):
    return params["slope"] * jnp.log(jnp.sum(jax.nn.one_hot(z, VALUES) * rows["table"], axis=-1))


GENERAL = {"x": DATA["x"], "table": TABLE, "number": np.arange(NUM_ROWS)}


def general_log_joint(params):
    return jax.nn.log_softmax(params["prior"])[DATA["x"]] + params["slope"] * jnp.log(TABLE)


def exact_gradient(params, *, guided):
    posterior = jax.nn.softmax(general_log_joint(params))

    def objective(params):
        evidence = jnp.sum(jax.nn.logsumexp(general_log_joint(params), axis=-1))
        return evidence + float(guided) * jnp.sum(posterior * jax.nn.log_softmax(params["guide"]))

    return jax.grad(objective)(params)


def replicates(params, *, guided, batch_size=2, num_repeats=20_000):
    """Gradients and next latents from chains that have their law."""
    gradient = MonteCarloEM(
        general_prior, general_likelihood, GENERAL, batch_size, guide=general_guide if guided else None
    )
    log_joint = general_log_joint(params)

    def one(key):
        key_init, key_memory, key_step = jax.random.split(key, 3)
        memory = jax.random.categorical(key_memory, log_joint)
        state = gradient.init(key_init, params)._replace(latents=memory, started=jnp.ones(NUM_ROWS, bool))
        estimate, state = gradient.estimate(key_step, params, state)
        flat = [jnp.ravel(x) for x in jax.tree.leaves(estimate.gradient)]
        return jnp.concatenate([*flat, jnp.ravel(jax.nn.one_hot(state.latents, VALUES))])

    keys = jax.random.split(jax.random.key(3), num_repeats)
    exact = [np.ravel(x) for x in jax.tree.leaves(exact_gradient(params, guided=guided))]
    found = np.asarray(jax.jit(jax.vmap(one))(keys))
    return found, np.concatenate([*exact, np.ravel(jax.nn.softmax(log_joint))])


@pytest.mark.parametrize("guided", [pytest.param(False, marks=pytest.mark.slow), True])
def test_any_likelihood(guided):
    """Blocks of unequal length; prior and guide as proposals; latents keep their law. An error of 5% would be seen."""
    found, exact = replicates(jax.tree.map(jnp.asarray, PARAMS), guided=guided)
    varies = found.std(axis=0) > 0
    np.testing.assert_allclose(found.mean(axis=0)[~varies], exact[~varies], atol=1e-12)  # the guide, without one
    assert_mean(found[:, varies], exact[varies], smallest_error=0.05)


@pytest.mark.slow
def test_weights_of_other_parameters_are_rejected(monkeypatch):
    """A chain that accepts by the likelihood alone, though the guide proposes, has another law."""
    monkeypatch.setattr(monte_carlo.Rows, "log_weight", property(lambda self: self.log_likelihood))
    found, exact = replicates(jax.tree.map(jnp.asarray, PARAMS), guided=True)
    assert np.max(np.abs(z_scores(found, exact))) > REJECTION


def test_rows_without_a_right_latent_yet():
    """They take part by the control variate alone, and are counted once they have one."""
    wrong = {"x": np.array([0, 1]), "right": np.zeros((2, VALUES))}
    gradient = MonteCarloEM(lambda logits, rows: Law(logits[rows["x"]]), is_right, wrong, scheme="full")
    logits = jnp.asarray(LOGITS)
    state = gradient.init(jax.random.key(0), logits)
    step = jax.jit(lambda *given: gradient.estimate(*given))
    for i in range(5):
        estimate, state = step(jax.random.key(i), logits, state)
        np.testing.assert_array_equal(estimate.gradient, 0.0)  # no proposal is accepted: beta is 0
    assert not np.any(state.started)
    assert state.visits.tolist() == [0, 0]
    assert np.all(np.isnan(state.acceptance_rate))
    assert float(estimate.aux.started) == 0.0 == float(estimate.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MonteCarloEM(general_prior, general_likelihood, GENERAL, 1), "batch_size must be at least 2"),
        (
            lambda: MonteCarloEM(general_prior, general_likelihood, GENERAL, 2, initial=np.zeros(2, int)),
            "initial must hold the latents of all 3 rows",
        ),
        (
            lambda: MonteCarloEM(
                general_prior, lambda p, z, r: jnp.zeros(()), GENERAL, 2, initial=np.zeros(3, int)
            ).init(jax.random.key(0), PARAMS),
            r"log_likelihood must give one value a row, shape \(3,\); got shape \(\)",
        ),
    ],
)
def test_bad_input_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()

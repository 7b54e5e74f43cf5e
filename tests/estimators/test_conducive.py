"""Gradients at clients: what must hold of them exactly, for every client and every surrogate, and what must not pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core.types import Batch
from ergodica.estimators import Conducive, ExponentialSurrogates, GaussianSurrogates, laplace_surrogates
from tests.support.shards import client_log_likelihood, regression_shards

pytestmark = pytest.mark.usefixtures("x64")

SHARES = np.array([0.5, 0.2, 0.3])  # neither equal nor in proportion to the sizes 5, 9 and 4
THETA = np.array([0.3, -0.2, 1.0])


def at(gradient, client):
    return gradient.visit(gradient.init(jax.random.key(0), THETA), jnp.asarray(client, jnp.int32))


@jax.jit
def evaluate(gradient, state, theta):
    return gradient.at(theta, state, gradient.shards.whole(state.client)).gradient


def whole(gradient, client, theta=THETA):
    """The gradient of all of a client's rows."""
    return evaluate(gradient, at(gradient, client), theta)


@jax.jit
def at_each_row(gradient, state):
    rows = jax.tree.map(lambda x: x[:, None], gradient.shards.rows)
    return jax.vmap(lambda row: gradient.at(THETA, state, Batch(row, jnp.ones(1))).gradient)(rows)


def by_row(gradient, client):
    """The gradients of all batches of one row of a client: what its minibatches are means of."""
    begin, size = int(gradient.shards.offsets[client]), int(gradient.shards.sizes[client])
    return np.asarray(at_each_row(gradient, at(gradient, client)))[begin : begin + size]


def random_surrogates(kind, count=3, size=3):
    rng = np.random.default_rng(7)
    means, roots = rng.normal(size=(count, size)), rng.normal(size=(count, size, size))
    if kind == "diagonal":
        return GaussianSurrogates(means, rng.uniform(1, 3, (count, size)))
    if kind == "exponential":
        return ExponentialSurrogates(lambda t: jnp.concatenate([t, jnp.exp(t)]), rng.normal(size=(count, 2 * size)))
    full = GaussianSurrogates(means, np.eye(size) + roots @ roots.transpose(0, 2, 1))
    return full if kind == "full" else full.low_rank(1)


every_kind = pytest.mark.parametrize("kind", ["diagonal", "full", "low rank", "exponential"])


@every_kind
def test_conducive_gradients_cancel_over_clients(kind):
    """Identically, whatever the surrogates, the probabilities and the position."""
    q = random_surrogates(kind)
    pushes = [q.conducive(THETA, jnp.array(s), jnp.asarray(SHARES[s])) for s in range(3)]
    gradients = np.array([g for _, g in pushes])
    assert np.max(np.abs(gradients)) > 1
    np.testing.assert_allclose(SHARES @ gradients, 0, atol=1e-12)
    np.testing.assert_allclose(SHARES @ np.array([v for v, _ in pushes]), 0, atol=1e-12)


@every_kind
def test_surrogates_are_what_they_say(kind):
    """Value against gradient by automatic differentiation, and the total against the sum."""
    q = random_surrogates(kind)
    for natural in (q.of(0), q.of(2), q.total):
        value, gradient = q.evaluate(natural, THETA)
        np.testing.assert_allclose(jax.grad(lambda t, n=natural: q.evaluate(n, t)[0])(THETA), gradient, rtol=1e-12)
        assert np.isfinite(value)
    each = [q.evaluate(q.of(s), THETA)[0] for s in range(3)]
    np.testing.assert_allclose(q.evaluate(q.total, THETA)[0], sum(each), rtol=1e-12)


def test_gaussians_have_their_mean_and_precision():
    rng = np.random.default_rng(1)
    means = {"a": jnp.asarray(rng.normal(size=3)), "b": jnp.asarray(rng.normal(size=(3, 2)))}
    precisions = jax.tree.map(lambda x: 1.0 + x**2, means)
    q = GaussianSurrogates(means, precisions)
    for s in range(3):
        mode, precision = jax.tree.map(lambda x: x[s], (means, precisions))  # noqa: B023
        np.testing.assert_allclose(erg.core.tree.norm(q.evaluate(q.of(s), mode)[1]), 0, atol=1e-12)
        hessian = jax.hessian(lambda t, s=s: q.evaluate(q.of(s), t)[0])(mode)
        np.testing.assert_allclose(-hessian["a"]["a"], precision["a"], rtol=1e-12)
        np.testing.assert_allclose(-hessian["b"]["b"], np.diag(precision["b"]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prior_share", [False, True])
@pytest.mark.parametrize("centre", ["mode", "local", THETA + 1])
@pytest.mark.swept_after(2)
def test_exact_surrogates_give_the_full_gradient_at_every_client(centre, prior_share):
    """On a quadratic likelihood Laplace's method is exact, from any centre, with its share of the prior or without."""
    shards = regression_shards()
    q = laplace_surrogates(shards, centre, probabilities=SHARES, prior_share=prior_share)
    gradient = Conducive(shards, q, probabilities=SHARES)
    exact = jax.grad(shards.posterior.log_density)(THETA)
    for s in range(3):
        np.testing.assert_allclose(whole(gradient, s), exact, rtol=1e-9)


def partition_average(gradient):
    """Mean over clients, drawn with their probabilities, and over the rows of each."""
    return SHARES @ np.array([by_row(gradient, s).mean(0) for s in range(3)])


def test_minibatches_are_unbiased_by_partition():
    shards = regression_shards()
    exact = jax.grad(shards.posterior.log_density)(THETA)
    for q, strength in ((None, 1.0), (random_surrogates("full"), 1.0), (random_surrogates("full"), 0.3)):
        gradient = Conducive(shards, q, 1, probabilities=SHARES, strength=strength)
        np.testing.assert_allclose(partition_average(gradient), exact, rtol=1e-10)


class Mutants:
    """Variants that published or plausible code has; the checks above must see each."""

    class WithoutProbability(Conducive):
        def at(self, params, state, batch):
            return super().at(params, state._replace(share=jnp.ones_like(state.share)), batch)

    class AllDataForOwn(Conducive):
        """N/m in place of N_s/m."""

        def at(self, params, state, batch):
            own = self.shards.sizes[state.client].astype(float)
            share = state.share * own / self.posterior.num_data
            return super().at(params, state._replace(share=share), batch)

    class PriorEachTime(Conducive):
        """The prior is divided by f_s too, so that it counts S times."""

        def at(self, params, state, batch):
            found = super().at(params, state, batch)
            more = jax.grad(self.posterior.log_prior)(params)
            return found._replace(gradient=found.gradient + (1 / state.share - 1) * more)


@pytest.mark.parametrize("mutant", [Mutants.WithoutProbability, Mutants.AllDataForOwn, Mutants.PriorEachTime])
def test_partition_rejects(mutant):
    shards = regression_shards()
    exact = jax.grad(shards.posterior.log_density)(THETA)
    found = partition_average(mutant(shards, None, 1, probabilities=SHARES))
    assert np.max(np.abs(found - exact)) > 0.01 * np.max(np.abs(exact))


def test_surrogates_with_the_whole_prior_are_rejected():
    """With unequal probabilities they do not cancel (with equal ones they do, whatever share of the prior they have)."""
    shards = regression_shards()
    exact = np.asarray(jax.grad(shards.posterior.log_density)(THETA))

    def density(theta, client):
        return client_log_likelihood(shards, theta, client) + shards.posterior.log_prior(theta)

    def with_whole_prior(shares):
        gradients = [np.asarray(jax.grad(density)(THETA, s)) for s in range(3)]
        hessians = [-np.asarray(jax.hessian(density)(THETA, s)) for s in range(3)]
        q = GaussianSurrogates.expansion(THETA, np.array(gradients), np.array(hessians))
        elsewhere = THETA + 1
        full = np.asarray(jax.grad(shards.posterior.log_density)(elsewhere))
        gradient = Conducive(shards, q, probabilities=shares)
        found = [whole(gradient, s, elsewhere) for s in range(3)]
        return np.max(np.abs(np.array(found) - full)) / np.max(np.abs(full))

    assert with_whole_prior(np.full(3, 1 / 3)) < 1e-9
    assert with_whole_prior(SHARES) > 0.05
    assert np.all(np.isfinite(exact))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_covariance_of_a_gradient(batch_size):
    """Against all batches of one row; m rows have one m-th."""
    gradient = Conducive(regression_shards(), random_surrogates("full"), batch_size, probabilities=SHARES)
    for s in range(3):
        rows = by_row(gradient, s)
        found = gradient.covariance(THETA, jnp.array(s))
        np.testing.assert_allclose(found, np.cov(rows.T, bias=True) / batch_size, rtol=1e-9)
        np.testing.assert_allclose(gradient.covariance(THETA, jnp.array(s), diagonal=True), np.diag(found), rtol=1e-9)


def test_value_and_mean_gradient():
    """The value is what is differentiated, and the mean over clients of both is the posterior's."""
    shards = regression_shards()
    gradient = Conducive(shards, random_surrogates("full"), probabilities=SHARES, strength=0.7)
    values = [jax.value_and_grad(gradient.mean_log_density)(THETA, jnp.array(s)) for s in range(3)]
    for s, (value, slope) in enumerate(values):
        found = gradient.at(THETA, at(gradient, s), shards.whole(s))
        np.testing.assert_allclose(found.value, value, rtol=1e-12)
        np.testing.assert_allclose(found.gradient, slope, rtol=1e-10)
    np.testing.assert_allclose(
        SHARES @ np.array([v for v, _ in values]), shards.posterior.log_density(THETA), rtol=1e-12
    )


def test_what_a_client_is_sent_is_enough():
    """Its rows, its own surrogate and the sum of all give the gradients that it gives in company."""
    shards = regression_shards()
    for q in (None, random_surrogates("diagonal"), random_surrogates("low rank")):
        gradient = Conducive(shards, q, 3, probabilities=SHARES, strength=0.7)
        for s in range(3):
            alone = gradient.only(s)
            assert jax.tree.leaves(alone.shards.rows)[0].shape[0] == shards.sizes[s]
            for key in jax.random.split(jax.random.key(1), 3):
                expected, _ = gradient.estimate(key, THETA, at(gradient, s))
                found, _ = alone.estimate(key, THETA, at(alone, 0))
                np.testing.assert_allclose(found.gradient, expected.gradient, rtol=1e-12)


def test_an_estimated_share_goes_in_by_the_visit():
    shards = regression_shards()
    gradient, other = (
        Conducive(shards, random_surrogates("full"), probabilities=p) for p in (SHARES, np.full(3, 1 / 3))
    )
    state = gradient.visit(at(gradient, 1), jnp.array(1), jnp.asarray(1 / 3))
    found = gradient.at(THETA, state, shards.whole(1)).gradient
    np.testing.assert_allclose(found, whole(other, 1), rtol=1e-12)


class TestLowRank:
    def test_all_directions_are_the_matrix(self):
        full = random_surrogates("full")
        for s in range(3):
            share = jnp.asarray(SHARES[s])
            expected = full.conducive(THETA, jnp.array(s), share)[1]
            np.testing.assert_allclose(full.low_rank(3).conducive(THETA, jnp.array(s), share)[1], expected, rtol=1e-9)

    def test_diagonals_are_kept(self):
        full, low = random_surrogates("full"), random_surrogates("low rank")
        for s in range(3):
            hessians = [-jax.hessian(lambda t, q=q, s=s: q.evaluate(q.of(s), t)[0])(THETA) for q in (full, low)]
            np.testing.assert_allclose(np.diag(hessians[1]), np.diag(hessians[0]), rtol=1e-9)
            assert np.max(np.abs(hessians[1] - hessians[0])) > 0.01

    def test_diagonals_have_no_directions(self):
        with pytest.raises(ValueError, match="these are diagonal already"):
            random_surrogates("diagonal").low_rank(1)


def test_counts_with_an_exponential_family():
    """A Poisson likelihood is a member, and its surrogates exact: full gradient at every client."""
    rng = np.random.default_rng(2)
    counts = jnp.asarray(rng.poisson(3.0, 12).astype(float))
    posterior = erg.Posterior(
        lambda t: -0.5 * (t - 1) ** 2, lambda t, y: y * t - jnp.exp(t), counts, initial=jnp.array(0.0)
    )
    shards = erg.Shards(posterior, np.repeat([0, 1, 2], (2, 7, 3)))
    q = ExponentialSurrogates.from_data(
        shards, lambda t: jnp.stack([t, jnp.exp(t)]), lambda y: jnp.stack([y, -jnp.ones_like(y)], axis=1)
    )
    gradient = Conducive(shards, q, probabilities=SHARES)
    for theta in (jnp.array(0.2), jnp.array(1.7)):
        exact = jax.grad(posterior.log_density)(theta)
        for s in range(3):
            np.testing.assert_allclose(whole(gradient, s, theta), exact, rtol=1e-10)


def test_bad_input():
    shards = regression_shards()
    with pytest.raises(TypeError, match="shards must be an Shards"):
        Conducive(shards.posterior)
    with pytest.raises(TypeError, match="surrogates must be an AbstractSurrogates"):
        Conducive(shards, "laplace")
    with pytest.raises(ValueError, match="probabilities must have one entry a client"):
        Conducive(shards, probabilities=[0.5, 0.5])
    with pytest.raises(ValueError, match="strength must be finite and at least 0"):
        Conducive(shards, strength=-1.0)
    with pytest.raises(ValueError, match="precision must have the structure and shapes of mean"):
        GaussianSurrogates(np.zeros((3, 2)), np.ones(3))
    with pytest.raises(ValueError, match="must be finite"):
        GaussianSurrogates(np.zeros((3, 2)), np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="natural must be finite, of shape"):
        ExponentialSurrogates(lambda t: t, np.zeros(3))

"""Data cut by client: nothing is lost, nothing is mixed, whatever the sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

import ergodica as erg
from ergodica.core.permutation import AliasTable
from tests.support.shards import client_log_likelihood, regression_shards


def linear_model(x, y):
    import numpyro
    import numpyro.distributions as dist

    slope = numpyro.sample("slope", dist.Normal(0, 2).expand([2]).to_event(1))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ slope, 1.0), obs=y)


def datasets():
    rng = np.random.default_rng(0)
    return [
        {"x": rng.normal(size=(n, 2)).astype("float32"), "y": rng.normal(size=n).astype("float32")} for n in (3, 5, 2)
    ]


def joined(sets):
    return {name: np.concatenate([data[name] for data in sets]) for name in sets[0]}


@pytest.mark.usefixtures("x64")
def test_shards_add_up_to_the_posterior():
    shards = regression_shards()
    theta = jnp.array([0.3, -0.2, 1.0])
    whole = sum(shards.log_likelihood(theta, s, shards.whole(s)) for s in range(3))
    np.testing.assert_allclose(
        whole + shards.posterior.log_prior(theta), shards.posterior.log_density(theta), rtol=1e-13
    )
    for s in range(3):
        own = client_log_likelihood(shards, theta, s)
        np.testing.assert_allclose(shards.log_likelihood(theta, s, shards.whole(s)), own, rtol=1e-13)
        alone = shards.only(s)
        np.testing.assert_allclose(alone.log_likelihood(theta, 0, alone.whole(0)), own, rtol=1e-13)
        assert alone.posterior.num_data == shards.sizes[s]
        assert alone.names == (s,)


def test_draws_are_of_the_client_alone_and_uniform():
    rows = np.repeat([0, 1, 2], (3, 50, 7)) * 100.0 + np.concatenate([np.arange(n) for n in (3, 50, 7)])
    order = np.random.default_rng(0).permutation(60)
    posterior = erg.Posterior(lambda t: -(t**2), lambda t, x: x - t, jnp.asarray(rows[order]), initial=jnp.array(0.0))
    shards = erg.Shards(posterior, np.repeat(["c", "a", "b"], (3, 50, 7))[order])
    assert shards.names == ("a", "b", "c")
    for client, (label, size) in enumerate(((1, 50), (2, 7), (0, 3))):
        batch = shards.draw(jax.random.key(client), jnp.array(client), 20_000)
        place = np.asarray(batch.data) - 100 * label
        counts = np.bincount(place.astype(int), minlength=size)
        assert counts.size == size
        expected = 20_000 / size
        assert np.sum((counts - expected) ** 2 / expected) < chi2.isf(1e-6, size - 1)
        whole = shards.whole(client)
        assert np.sum(np.asarray(whole.weight) > 0) == size
        assert set(np.asarray(whole.data)[np.asarray(whole.weight) > 0]) == set(100 * label + np.arange(size))


def test_moments_of_the_gradients_of_single_data():
    shards = regression_shards()
    theta = jnp.array([0.3, -0.2, 1.0])
    for s, size in enumerate((5, 9, 4)):
        begin = int(shards.offsets[s])
        values = jax.jacobian(lambda t: shards.posterior.log_likelihood(t, shards.rows))(theta)
        gradients = np.asarray(values, np.float64)[begin : begin + size]
        mean, covariance = shards.gradient_moments(theta, s)
        np.testing.assert_allclose(mean, gradients.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(covariance, np.cov(gradients.T, bias=True), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(
            shards.gradient_moments(theta, s, diagonal=True)[1], gradients.var(0), rtol=1e-3, atol=1e-3
        )


def test_three_ways_in_are_one():
    """A NumPyro model with a client array, a list of data sets, and a list of posteriors."""
    sets = datasets()

    def make(data):
        return erg.from_numpyro(linear_model, data=data)

    ways = [
        erg.Shards(make(joined(sets)), [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]),
        erg.Shards.from_datasets(make, sets),
        erg.Shards.from_posteriors([make(data) for data in sets]),
    ]
    theta = {"slope": jnp.array([0.3, -1.0])}
    exact = ways[0].posterior.log_density(theta)
    for shards in ways:
        assert shards.sizes.tolist() == [3, 5, 2]
        np.testing.assert_allclose(shards.posterior.log_density(theta), exact, rtol=1e-6)
        np.testing.assert_allclose(
            shards.log_likelihood(theta, 1, shards.whole(1)),
            ways[0].log_likelihood(theta, 1, ways[0].whole(1)),
            rtol=1e-6,
        )
    assert set(ways[2].posterior.constrain(theta)) == {"slope"}


def test_bad_input():
    posterior = regression_shards().posterior
    with pytest.raises(
        ValueError, match=r"client must say for each datum whose it is, shape \(18,\); got shape \(3,\)"
    ):
        erg.Shards(posterior, [0, 1, 2])
    with pytest.raises(TypeError, match="posterior must be an Posterior"):
        erg.Shards(3, [0])
    with pytest.raises(ValueError, match="datasets must be a list"):
        erg.Shards.from_datasets(lambda data: posterior, {})
    with pytest.raises(ValueError, match=r"datasets\[1\] must have the structure of the first"):
        erg.Shards.from_datasets(lambda data: posterior, [{"x": jnp.ones(2)}, {"y": jnp.ones(2)}])
    with pytest.raises(TypeError, match="posteriors must be a list"):
        erg.Shards.from_posteriors(posterior)


@pytest.mark.parametrize("share", [True, False])
def test_posteriors_that_share_the_prior_out_are_refused(share):
    """Each client has the whole prior; a share of it would count it too little."""

    def make(scale, data):
        return erg.Posterior(
            lambda t: -0.5 * (scale if share else 1.0) * (t - 1) ** 2,
            lambda t, x: -0.5 * (1.0 if share else scale) * (x - t) ** 2,
            data,
            initial=jnp.array(0.5),
        )

    with pytest.raises(ValueError, match=f"must have the {'prior' if share else 'likelihood'} of the first"):
        erg.Shards.from_posteriors([make(1.0, jnp.ones(3)), make(0.5, jnp.zeros(2))])


class TestAliasTable:
    @pytest.mark.parametrize("probabilities", [[1.0], [0.5, 0.5], [0.1, 0.2, 0.7], np.arange(1.0, 1001) / 500_500])
    def test_law_of_the_table_is_the_law_asked_for(self, probabilities):
        np.testing.assert_allclose(AliasTable(np.asarray(probabilities)).probabilities(), probabilities, rtol=1e-6)

    def test_draws(self):
        table = AliasTable(np.array([0.1, 0.2, 0.7]))
        words = jax.random.bits(jax.random.key(0), (100_000, 2), jnp.uint32)
        counts = np.bincount(np.asarray(jax.jit(jax.vmap(table.draw))(words)), minlength=3)
        expected = 1e5 * np.array([0.1, 0.2, 0.7])
        assert np.sum((counts - expected) ** 2 / expected) < chi2.isf(1e-6, 2)

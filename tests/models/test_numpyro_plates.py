"""Models with several subsampled plates: which indices are the data, and that any partition of them averages to the full."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import potential_energy

import ergodica as erg

pytestmark = pytest.mark.usefixtures("x64")

PEOPLE, VISITS, ITEMS = 7, 4, 5
RNG = np.random.default_rng(20260802)
SCORES, AGES, PRICES = RNG.normal(size=(PEOPLE, VISITS)), RNG.normal(size=PEOPLE), RNG.normal(size=ITEMS)
PERSON_BLOCKS = [np.array([4, 0]), np.array([6, 1, 5]), np.array([2, 3])]


def nested(scores, ages, people=None, visits=None):
    """Visits within people, both subsampled; people have a term of their own."""
    mu = numpyro.sample("mu", dist.Normal())
    sigma = numpyro.sample("sigma", dist.HalfNormal())
    with numpyro.plate("people", scores.shape[0], subsample_size=people, dim=-2) as i:
        numpyro.sample("age", dist.Normal(mu, 2.0), obs=ages[i][:, None])
        with numpyro.plate("visits", scores.shape[1], subsample_size=visits, dim=-1) as j:
            numpyro.sample(
                "score", dist.Normal(mu + 0.1 * j[None].astype(float), sigma), obs=scores[i[:, None], j[None]]
            )


def item_effects(scores, people=None, visits=None):
    """Items with a latent effect each are no data, but people are: the effects are global."""
    with numpyro.plate("visits", scores.shape[1], subsample_size=visits, dim=-1) as j:
        effect = numpyro.sample("effect", dist.Normal())
    with (
        numpyro.plate("people", scores.shape[0], subsample_size=people, dim=-2) as i,
        numpyro.plate("columns", scores.shape[1], dim=-1),
    ):
        numpyro.sample("score", dist.Normal(effect[None], 1.0), obs=scores[i[:, None], j[None]])


def siblings(ages, prices, people=None, items=None):
    """Two kinds of data, of different number, on one parameter."""
    mu = numpyro.sample("mu", dist.Normal())
    sigma = numpyro.sample("sigma", dist.HalfNormal())
    numpyro.sample("pilot", dist.Normal(mu, 1.0), obs=0.3)
    with numpyro.plate("people", ages.shape[0], subsample_size=people) as i:
        numpyro.sample("age", dist.Normal(mu, sigma), obs=ages[i])
    with numpyro.plate("items", prices.shape[0], subsample_size=items) as j:
        numpyro.sample("price", dist.Normal(mu**2, 1.0), obs=prices[j])


def numpyros(model, arguments, position):
    arguments = {name: jnp.asarray(x) for name, x in arguments.items()}
    return -potential_energy(handlers.seed(model, 0), (), arguments, position)


def assert_partition_averages_to_full(posterior, blocks, model, arguments):
    """Values and gradients: prior + K * (sum of a block), averaged over the K blocks, is NumPyro's full density."""

    @jax.jit
    def compare(position):
        def average(position):
            sums = [posterior.log_likelihood(position, rows_at(posterior, block)).sum() for block in blocks]
            estimates = [posterior.log_prior(position) + len(blocks) * x for x in sums]
            return sum(estimates) / len(blocks)

        return [jax.value_and_grad(f)(position) for f in (average, lambda q: numpyros(model, arguments, q))]

    ours, expected = compare(posterior.start(jax.random.key(0)))
    for value, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-11)


def rows_at(posterior, indices):
    return jax.tree.map(lambda x: x[indices], posterior.data)


@pytest.mark.parametrize("visits", [None, 2])
@pytest.mark.swept_after(1)
def test_a_datum_of_nested_plates_is_an_index_of_the_outer_one(visits):
    data = {"scores": SCORES, "ages": AGES}
    posterior = erg.from_numpyro(nested, **data, people=3, visits=visits)
    assert posterior.num_data == PEOPLE
    assert_partition_averages_to_full(posterior, PERSON_BLOCKS, nested, data)
    position = {"mu": jnp.array(0.3), "sigma": jnp.array(-0.2)}
    normal = jax.scipy.stats.norm.logpdf
    scores = normal(SCORES, 0.3 + 0.1 * np.arange(VISITS)[None], np.exp(-0.2)).sum(1)
    np.testing.assert_allclose(
        posterior.log_likelihood(position, jnp.array([5, 2])),
        (scores + normal(AGES, 0.3, 2.0))[np.array([5, 2])],
        rtol=1e-12,
    )


def test_a_plate_within_rows_given_as_arguments_is_run_in_full():
    data = {"scores": SCORES, "ages": AGES}
    posterior = erg.from_numpyro(nested, data=data, visits=2)
    assert_partition_averages_to_full(posterior, PERSON_BLOCKS, nested, data)


def test_outer_plate_is_found_where_both_hold_the_same_sites():
    def model(scores):
        mu = numpyro.sample("mu", dist.Normal())
        with (
            numpyro.plate("people", PEOPLE, subsample_size=2, dim=-1) as i,
            numpyro.plate("visits", VISITS, subsample_size=2, dim=-2) as j,
        ):
            numpyro.sample("score", dist.Normal(mu, 1.0), obs=scores[i, j[:, None]])

    assert erg.from_numpyro(model, scores=SCORES).num_data == PEOPLE
    by_visit = erg.from_numpyro(model, scores=SCORES, plate="visits")
    assert by_visit.num_data == VISITS
    expected = jax.scipy.stats.norm.logpdf(SCORES, 0.5, 1.0).sum(0)
    np.testing.assert_allclose(
        by_visit.log_likelihood({"mu": jnp.array(0.5)}, jnp.arange(VISITS)), expected, rtol=1e-12
    )


def test_latents_of_a_plate_that_is_run_in_full_are_global():
    data = {"scores": SCORES}
    posterior = erg.from_numpyro(item_effects, **data, people=2, visits=2, plate="people")
    assert {name: x.shape for name, x in posterior.shape().items()} == {"effect": (VISITS,)}
    assert_partition_averages_to_full(posterior, PERSON_BLOCKS, item_effects, data)


def test_rows_of_plates_side_by_side_are_counted_through():
    data = {"ages": AGES, "prices": PRICES}
    posterior = erg.from_numpyro(siblings, **data, people=3, items=2)
    assert posterior.num_data == PEOPLE + ITEMS
    blocks = [np.array([11, 0, 7]), np.array([8, 2, 1, 6]), np.array([3, 10, 9, 5, 4])]
    assert_partition_averages_to_full(posterior, blocks, siblings, data)
    position = {"mu": jnp.array(0.3), "sigma": jnp.array(-0.2)}
    normal = jax.scipy.stats.norm.logpdf
    terms = np.concatenate([normal(AGES, 0.3, np.exp(-0.2)), normal(PRICES, 0.09, 1.0)])
    rows = np.array([11, 0, 7, 6, 6])
    np.testing.assert_allclose(posterior.log_likelihood(position, rows), terms[rows], rtol=1e-12)
    assert posterior.dims == {"age": ("people",), "price": ("items",)}
    observed = posterior.observed_data()
    np.testing.assert_array_equal(observed["age"], AGES)
    np.testing.assert_array_equal(observed["price"], PRICES)


def test_one_of_two_plates_side_by_side_can_be_the_data():
    data = {"ages": AGES, "prices": PRICES}
    posterior = erg.from_numpyro(siblings, **data, people=3, items=2, plate="people")
    assert posterior.num_data == PEOPLE
    assert_partition_averages_to_full(posterior, PERSON_BLOCKS, siblings, data)


def test_source_of_plates_side_by_side():
    posterior = erg.from_numpyro(siblings, ages=AGES, prices=PRICES, people=3, items=2)
    samples = {"mu": np.full((2, 3), 0.3), "sigma": np.full((2, 3), 0.8)}
    values = posterior.source.log_likelihood(samples, batch_size=3)
    assert {name: x.shape for name, x in values.items()} == {"age": (2, 3, PEOPLE), "price": (2, 3, ITEMS)}
    np.testing.assert_allclose(values["price"][1, 2], jax.scipy.stats.norm.logpdf(PRICES, 0.09, 1.0), rtol=1e-12)
    predictions = posterior.source.predictive(jax.random.key(0), samples, batch_size=3)
    assert {name: x.shape for name, x in predictions.items()} == {
        "age": (2, 3, PEOPLE), "price": (2, 3, ITEMS), "pilot": (2, 3),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"several plates hold them: \['people', 'items'\]"):
        posterior.source.log_likelihood(samples, {"ages": AGES, "prices": PRICES})


def test_minibatches_over_plates_side_by_side_have_the_full_mean():
    posterior = erg.from_numpyro(siblings, ages=AGES, prices=PRICES, people=3, items=2)
    gradient = erg.estimators.Minibatch(posterior, 5)
    position = posterior.start(jax.random.key(3))

    @jax.jit
    def mean_over_blocks(position):
        gradients = [gradient.at(position, gradient.block(k)).gradient for k in range(gradient.num_blocks)]
        return jax.tree.map(lambda *g: sum(g) / len(g), *gradients), jax.grad(posterior.log_density)(position)

    for g, full in zip(*map(jax.tree.leaves, mean_over_blocks(position)), strict=True):
        np.testing.assert_allclose(g, full, rtol=1e-11)

"""Discrete latents inside the data plate, summed out: values and gradients against sums written by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.handlers import mask

import ergodica as erg
from tests.models.numpyro_cases import ARRAYS, N
from tests.support.marks import swept

pytestmark = pytest.mark.usefixtures("x64")

PARALLEL = {"enumerate": "parallel"}
Y, KNOWN, W = (ARRAYS[name] for name in ("y", "known", "w"))
BLOCKS = [np.array([7, 2, 9, 0]), np.array([1, 10, 3]), np.array([4, 8, 5, 6])]


def mixture(y, n=None):
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    means = numpyro.sample("means", dist.Normal(jnp.zeros(3), 2.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal())
    with numpyro.plate("data", y.shape[0], subsample_size=n) as i:
        which = numpyro.sample("which", dist.Categorical(weights), infer=PARALLEL)
        numpyro.sample("y", dist.Normal(means[which], sigma), obs=y[i])


def mixture_by_hand(p, y, _):
    terms = [jnp.log(p["weights"][k]) + normal(y, p["means"][k], p["sigma"]) for k in range(3)]
    return log_sum_exp(terms)


def two_sites(y, w, n=None):
    rate = numpyro.sample("rate", dist.Beta(2.0, 2.0))
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    with numpyro.plate("data", y.shape[0], subsample_size=n) as i:
        first = numpyro.sample("first", dist.Bernoulli(rate), infer=PARALLEL)
        second = numpyro.sample("second", dist.Binomial(2, 0.2 + 0.5 * first), infer=PARALLEL)
        numpyro.sample("y", dist.Normal(slope[0] * first + second, 1.0), obs=y[i])
        numpyro.sample("w", dist.Normal(slope[1] * second, 1.0), obs=w[i, 0])


def two_sites_by_hand(p, y, w):
    terms = []
    for first, second in itertools.product(range(2), range(3)):
        chance = 0.2 + 0.5 * first
        choices = (1, 2, 1)[second]
        terms.append(
            jnp.log(p["rate"] if first else 1 - p["rate"])
            + jnp.log(choices * chance**second * (1 - chance) ** (2 - second))
            + normal(y, p["slope"][0] * first + second, 1.0)
            + normal(w[:, 0], p["slope"][1] * second, 1.0)
        )
    return log_sum_exp(terms)


def masked(y, known, n=None):
    rate = numpyro.sample("rate", dist.Beta(2.0, 2.0))
    mu = numpyro.sample("mu", dist.Normal())
    with numpyro.plate("data", y.shape[0], subsample_size=n) as i:
        which = numpyro.sample("which", dist.Bernoulli(rate), infer=PARALLEL)
        with mask(mask=known[i]):
            numpyro.sample("y", dist.Normal(mu * which, 1.0), obs=y[i])


def masked_by_hand(p, y, known):
    of_one = jnp.log(p["rate"]) + jnp.where(known, normal(y, p["mu"], 1.0), 0.0)
    of_zero = jnp.log1p(-p["rate"]) + jnp.where(known, normal(y, 0.0, 1.0), 0.0)
    return log_sum_exp([of_one, of_zero])


def inner_plate(w, n=None):
    """Two discrete variables a datum, tied by what they have in common."""
    rate = numpyro.sample("rate", dist.Beta(2.0, 2.0))
    means = numpyro.sample("means", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    with numpyro.plate("data", w.shape[0], subsample_size=n, dim=-2) as i:
        with numpyro.plate("inner", 2, dim=-1):
            which = numpyro.sample("which", dist.Bernoulli(rate), infer=PARALLEL)
            numpyro.sample("w", dist.Normal(means[which], 1.0), obs=w[i])
        both = jnp.sum(which, axis=-1, keepdims=True)
        numpyro.factor("tie", -0.3 * both)


def inner_plate_by_hand(p, w, _):
    terms = []
    for values in itertools.product(range(2), repeat=2):
        term = -0.3 * sum(values)
        for j, value in enumerate(values):
            term += jnp.log(p["rate"] if value else 1 - p["rate"]) + normal(w[:, j], p["means"][value], 1.0)
        terms.append(term)
    return log_sum_exp(terms)


def normal(x, mean, sd):
    return jax.scipy.stats.norm.logpdf(x, mean, sd)


def log_sum_exp(terms):
    return jax.scipy.special.logsumexp(jnp.stack(terms), axis=0)


CASES = {
    "mixture": (mixture, {"y": Y}, mixture_by_hand),
    "two sites": (two_sites, {"y": Y, "w": W}, two_sites_by_hand),
    "masked": (masked, {"y": Y, "known": KNOWN}, masked_by_hand),
    "inner plate": (inner_plate, {"w": W}, inner_plate_by_hand),
}
RUNS = [("mixture", "A"), swept("mixture", "B"), ("two sites", "A"), ("masked", "B"), swept("inner plate", "A")]


def posterior_of(name, pattern):
    model, data, _ = CASES[name]
    return erg.from_numpyro(model, **data, n=4) if pattern == "A" else erg.from_numpyro(model, data=data)


def rows_at(posterior, indices):
    return jax.tree.map(lambda x: x[indices], posterior.data)


@pytest.mark.usefixtures("numpyro_promotion")
@pytest.mark.parametrize(("name", "pattern"), RUNS)
@pytest.mark.swept_after(1)
def test_each_datum_has_the_sum_by_hand_with_its_gradient(name, pattern):
    posterior, (_, data, by_hand) = posterior_of(name, pattern), CASES[name]

    def by_blocks(position):
        blocks = [posterior.log_likelihood(position, rows_at(posterior, block)) for block in BLOCKS]
        return jnp.concatenate(blocks), posterior.log_density(position) - posterior.log_prior(position)

    def summed(position):
        values = by_hand(posterior.constrain(position), *(*data.values(), None)[:2])
        return values[np.concatenate(BLOCKS)], values.sum()

    @jax.jit
    def compare(position):
        return by_blocks(position), summed(position), jax.jacrev(by_blocks)(position), jax.jacrev(summed)(position)

    values, expected, gradients, expected_gradients = compare(posterior.start(jax.random.key(0)))
    for value, other in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-12, atol=1e-14)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert gradient.keys() == other.keys()
        for site, g in gradient.items():
            np.testing.assert_allclose(g, other[site], rtol=1e-10, atol=1e-12, err_msg=site)


def test_scaling_before_the_sum_as_numpyro_does_is_rejected():
    """The mutant: logsumexp of (N/n) times the log joint, whose mean over a partition is not the full likelihood."""
    p = {"weights": jnp.array([0.5, 0.3, 0.2]), "means": jnp.array([-1.0, 0.0, 2.0]), "sigma": 0.7}
    full = mixture_by_hand(p, Y, None).sum()

    def scaled(block):
        terms = [jnp.log(p["weights"][k]) + normal(Y[block], p["means"][k], p["sigma"]) for k in range(3)]
        return log_sum_exp([len(BLOCKS) * term for term in terms]).sum()

    right = np.mean([len(BLOCKS) * mixture_by_hand(p, Y[block], None).sum() for block in BLOCKS])
    np.testing.assert_allclose(right, full, rtol=1e-12)
    wrong = np.mean([scaled(block) for block in BLOCKS])
    assert abs(wrong - full) > 1e-2 * abs(full)


def test_it_is_the_mixture_that_numpyro_marginalises():
    def marginalised(y):
        weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
        means = numpyro.sample("means", dist.Normal(jnp.zeros(3), 2.0).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfNormal())
        with numpyro.plate("data", y.shape[0]):
            law = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(means, sigma[None]))
            numpyro.sample("y", law, obs=y)

    enumerated = posterior_of("mixture", "B")
    with jax.numpy_rank_promotion("allow"):
        by_numpyro = erg.from_numpyro(marginalised, data={"y": Y})
        both = jax.jit(lambda q: [jax.value_and_grad(p.log_density)(q) for p in (enumerated, by_numpyro)])
        ours, numpyros = both(enumerated.start(jax.random.key(1)))
        for value, other in zip(jax.tree.leaves(ours), jax.tree.leaves(numpyros), strict=True):
            np.testing.assert_allclose(value, other, rtol=1e-10)


@pytest.mark.usefixtures("numpyro_promotion")
def test_pointwise_log_likelihood_is_the_marginal():
    posterior = posterior_of("two sites", "B")
    position = posterior.start(jax.random.key(2))
    samples = {name: np.asarray(x)[None, None] for name, x in posterior.constrain(position).items()}
    values = posterior.source.log_likelihood(samples, batch_size=4)
    assert set(values) == {"y+w"}
    expected = posterior.log_likelihood(position, posterior.data)
    np.testing.assert_allclose(values["y+w"][0, 0], expected, rtol=1e-12)


@pytest.mark.usefixtures("numpyro_promotion")
def test_predictions_draw_the_discrete_latents():
    posterior = posterior_of("mixture", "A")
    values = {"weights": np.array([0.5, 0.3, 0.2]), "means": np.array([-2.0, 0.0, 3.0]), "sigma": np.array(0.5)}
    samples = {name: np.broadcast_to(x, (2, 300, *x.shape)) for name, x in values.items()}
    y = posterior.source.predictive(jax.random.key(0), samples)["y"]
    assert y.shape == (2, 300, N)

    def law(x):
        parts = zip(values["weights"], values["means"], strict=True)
        return sum(weight * scipy.stats.norm.cdf(x, mean, 0.5) for weight, mean in parts)

    assert scipy.stats.kstest(y.ravel(), law).pvalue > 1e-6


def test_starts_at_draws_from_the_prior_leave_the_discrete_latents_out():
    posterior = erg.from_numpyro(mixture, data={"y": Y}, initial="prior")
    draws = jax.vmap(posterior.start)(jax.random.split(jax.random.key(0), 500))
    assert {name: x.shape for name, x in draws.items()} == {"weights": (500, 2), "means": (500, 3), "sigma": (500,)}
    assert scipy.stats.kstest(np.ravel(draws["means"]), scipy.stats.norm(0.0, 2.0).cdf).pvalue > 1e-6

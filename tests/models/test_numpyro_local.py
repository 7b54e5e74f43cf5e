"""Local latents: prior and complete-data terms make NumPyro's density of all latents, datum by datum."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import potential_energy

import ergodica as erg
from ergodica.models import LatentPosterior
from tests.models.numpyro_cases import ARRAYS, N
from tests.support.marks import swept

BLOCKS = [np.array([7, 2, 9, 0]), np.array([1, 10, 3]), np.array([4, 8, 5, 6])]


def hierarchy(y, n=None):
    mu = numpyro.sample("mu", dist.Normal())
    tau = numpyro.sample("tau", dist.HalfNormal())
    with numpyro.plate("data", y.shape[0], subsample_size=n) as i:
        z = numpyro.sample("z", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(z, 0.5), obs=y[i])


def constrained(y, w, n=None):
    """Positive, vector and simplex latents, which have Jacobians; one of them depends on another."""
    scale = numpyro.sample("scale", dist.LogNormal())
    with numpyro.plate("data", y.shape[0], subsample_size=n) as i:
        noise = numpyro.sample("noise", dist.Gamma(2.0, 1.0))
        shift = numpyro.sample("shift", dist.Normal(jnp.zeros(2), scale).to_event(1))
        share = numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))
        numpyro.sample("y", dist.Normal(shift[:, 0] + share[:, 0], noise), obs=y[i])
        numpyro.sample("w", dist.Normal(shift, 1.0).to_event(1), obs=w[i])


def with_inner_plate(w, known, n=None):
    mu = numpyro.sample("mu", dist.Normal())
    with numpyro.plate("columns", 2, dim=-1), numpyro.plate("data", w.shape[0], subsample_size=n, dim=-2) as i:
        rate = numpyro.sample("rate", dist.Exponential(jnp.exp(mu)))
        with handlers.mask(mask=known[i][:, None]):
            numpyro.sample("w", dist.Normal(mu, rate), obs=w[i])


def mixture(y, n=None):
    means = numpyro.sample("means", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    with numpyro.plate("data", y.shape[0], subsample_size=n) as i:
        z = numpyro.sample("z", dist.Normal())
        which = numpyro.sample("which", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(means[which] + z, 1.0), obs=y[i])


CASES = {
    "hierarchy": (hierarchy, ["y"]),
    "constrained": (constrained, ["y", "w"]),
    "inner plate": (with_inner_plate, ["w", "known"]),
}


def posterior_of(model, names, pattern):
    rows = {name: ARRAYS[name] for name in names}
    if pattern == "A":
        return erg.from_numpyro(model, **rows, n=4, local_latents=True)
    return erg.from_numpyro(model, data=rows, local_latents=True)


def some_latents(posterior):
    shapes = posterior.latent_shapes(posterior.num_data)
    return {name: jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, (name, x) in enumerate(shapes.items())}


@pytest.mark.usefixtures("x64", "numpyro_promotion")
@pytest.mark.parametrize("pattern", [swept("A"), "B"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.swept_after(1)
def test_prior_and_joint_terms_are_numpyros_density(name, pattern):
    model, names = CASES[name]
    posterior = posterior_of(model, names, pattern)
    assert isinstance(posterior, LatentPosterior)
    position, latents = posterior.start(jax.random.key(0)), some_latents(posterior)

    def ours(position, latents):
        terms = []
        for block in BLOCKS:
            of_block, rows = jax.tree.map(lambda x: x[block], (latents, posterior.data))  # noqa: B023
            terms.append(posterior.log_joint(position, of_block, rows).sum())
        return posterior.log_prior(position) + sum(terms)

    def numpyros(position, latents):
        everything = {name: jnp.asarray(ARRAYS[name]) for name in names}
        return -potential_energy(handlers.seed(model, 0), (), everything, {**position, **latents})

    compare = jax.jit(lambda q, z: [jax.value_and_grad(f, argnums=(0, 1))(q, z) for f in (ours, numpyros)])
    values, expected = compare(position, latents)
    for value, other in zip(jax.tree.leaves(values), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("x64")
def test_enumerated_sites_beside_local_latents_are_summed_out():
    posterior = posterior_of(mixture, ["y"], "B")
    position, latents = {"means": jnp.array([-1.0, 2.0])}, some_latents(posterior)
    normal, z, y = jax.scipy.stats.norm.logpdf, latents["z"], ARRAYS["y"]
    terms = [jnp.log(p) + normal(y, m + z, 1.0) for p, m in ((0.7, -1.0), (0.3, 2.0))]
    expected = jnp.logaddexp(*terms) + normal(z, 0.0, 1.0)
    np.testing.assert_allclose(posterior.log_joint(position, latents, posterior.data), expected, rtol=1e-12)


def test_a_run_reports_the_global_latents():
    posterior = posterior_of(hierarchy, ["y"], "B")
    gradient = erg.estimators.LocalLatents(posterior, 4, inner_step_size=0.5)
    sampler = erg.samplers.SGLD(gradient, 1e-3)
    dt = erg.sample(jax.random.key(0), sampler, num_samples=5, num_warmup=2, num_chains=2, progress=False)
    assert set(dt["posterior"].data_vars) == {"mu", "tau"}
    assert dt["observed_data"]["y"].shape == (N,)
    samples = {name: x.values for name, x in dt["posterior"].data_vars.items()}
    assert posterior.source.predictive(jax.random.key(1), samples)["y"].shape == (2, 5, N)
    with pytest.raises(ValueError, match=r"\['z'\] are local to the data and not among the draws"):
        posterior.source.log_likelihood(samples)


def test_a_site_outside_that_depends_on_local_latents():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", y.shape[0]):
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
        numpyro.deterministic("largest", jnp.max(z))

    with pytest.raises(ValueError, match=r"'largest' is outside the data plate but depends on the latent sites 'z'"):
        erg.from_numpyro(model, data={"y": ARRAYS["y"]}, local_latents=True)


def test_local_latents_take_one_data_plate():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal())
        for name, plate in (("a", "first"), ("b", "second")):
            with numpyro.plate(plate, y.shape[0], subsample_size=2) as i:
                z = numpyro.sample(f"z_{name}", dist.Normal(mu, 1.0))
                numpyro.sample(name, dist.Normal(z, 1.0), obs=y[i])

    with pytest.raises(ValueError, match=r"takes one data plate; the model has \['first', 'second'\]"):
        erg.from_numpyro(model, y=ARRAYS["y"], local_latents=True)

"""Fisher's identity on a conjugate hierarchy, whose marginal likelihood is known: z_i ~ N(mu, tau²), x_i ~ N(z_i, s²)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import ergodica as erg
from ergodica.core import rng
from ergodica.estimators import LocalLatents, rowwise_hmc
from ergodica.models import LatentPosterior
from tests.support.marks import swept

N, NOISE = 7, 0.7
X = np.random.default_rng(20260803).normal(1.0, 1.5, size=N).astype(np.float32)
PARAMS = {"mu": -1.0, "log_tau": -0.2}


def normal(x, mean, sd):
    return -0.5 * ((x - mean) / sd) ** 2 - jnp.log(sd)


def log_prior(theta):
    return -0.5 * theta["mu"] ** 2 - 0.5 * theta["log_tau"] ** 2


def log_joint(theta, latents, rows):
    z = latents["z"]
    return normal(z, theta["mu"], jnp.exp(theta["log_tau"])) + normal(rows, z, NOISE)


def log_marginal(theta, rows):
    return normal(rows, theta["mu"], jnp.sqrt(jnp.exp(2 * theta["log_tau"]) + NOISE**2))


def moments_of_latents(theta, rows):
    """Mean and standard deviation of z given x: the conjugate posterior."""
    precision = jnp.exp(-2 * theta["log_tau"]) + NOISE**-2
    mean = (theta["mu"] * jnp.exp(-2 * theta["log_tau"]) + rows * NOISE**-2) / precision
    return mean, jnp.broadcast_to(precision**-0.5, mean.shape)


def exact_draws(key, theta, rows):
    mean, sd = moments_of_latents(theta, rows)
    return {"z": mean + sd * jax.random.normal(key, mean.shape)}


def params():
    return {name: jnp.asarray(x) for name, x in PARAMS.items()}


def hierarchy():
    return LatentPosterior(log_prior, log_joint, jnp.asarray(X), latents={"z": ()}, initial=params())


def marginalised():
    return erg.Posterior(log_prior, log_marginal, jnp.asarray(X), initial=params())


def exact_gradient():
    gradient = jax.grad(marginalised().log_density)(params())
    return np.array([gradient["log_tau"], gradient["mu"]], np.float64)


def independent_gradients(estimator, num=4000):
    """First estimates of freshly opened states (num, 2)."""

    @jax.jit
    def first(estimator, keys):
        def one(key):
            key_init, key_estimate = jax.random.split(key)
            state = estimator.init(key_init, params())
            gradient = estimator.estimate(key_estimate, params(), state)[0].gradient
            return jnp.stack([gradient["log_tau"], gradient["mu"]])

        return jax.vmap(one)(keys)

    return np.asarray(first(estimator, jax.random.split(jax.random.key(0), num)), np.float64)


def z_scores(gradients):
    error = gradients.std(axis=0) / np.sqrt(len(gradients))
    return (gradients.mean(axis=0) - exact_gradient()) / error


@pytest.mark.usefixtures("x64")
def test_fishers_identity_by_quadrature():
    """The score of the complete data is quadratic in z, so three nodes of Gauss and Hermite integrate it exactly."""
    rows, theta = jnp.asarray(X, float), params()
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    mean, sd = moments_of_latents(theta, rows)

    def score(node):
        return jax.grad(lambda theta: log_joint(theta, {"z": mean + sd * node}, rows).sum())(theta)

    scores = [score(node) for node in nodes]
    expected = jax.grad(lambda theta: log_marginal(theta, rows).sum())(theta)
    for name, gradient in expected.items():
        average = sum(w * s[name] for w, s in zip(weights / weights.sum(), scores, strict=True))
        np.testing.assert_allclose(average, gradient, rtol=1e-12)


@pytest.mark.parametrize(
    ("num_inner_steps", "scheme"), [(0, "full"), (2, "blocks"), swept(0, "blocks"), swept(2, "full")]
)
@pytest.mark.swept_after(1)
def test_unbiased_from_exact_latents(num_inner_steps, scheme):
    """Draws of the latents' posterior, and what the inner chain makes of them at a step that rejects a third."""
    batch_size = 3 if scheme == "blocks" else None
    estimator = LocalLatents(
        hierarchy(), batch_size, scheme, inner_step_size=1.2, num_inner_steps=num_inner_steps, start="guess", guess=exact_draws
    )  # fmt: skip
    assert np.all(np.abs(z_scores(independent_gradients(estimator))) < 5)


@pytest.mark.sweep
def test_a_short_inner_run_is_biased_and_a_long_one_is_not():
    def from_standard_normals(num_inner_steps):
        return LocalLatents(
            hierarchy(), scheme="full", inner_step_size=0.6, num_inner_steps=num_inner_steps, start="guess"
        )

    estimators = {
        "marginal": erg.estimators.Minibatch(marginalised(), scheme="full"),
        "start": from_standard_normals(0),
        "short": from_standard_normals(1),
        "long": from_standard_normals(40),
    }
    table = erg.compare_gradients(jax.random.key(0), estimators, params(), num_timings=0)
    assert table.attrs["reference"] == "exact"
    assert table.verdict.sel(point=0).values.tolist() == ["unbiased", "biased", "biased", "unbiased"]
    size = np.abs(table.bias.sel(point=0)).max("coordinate").values
    assert size[3] < min(size[1:3])


@pytest.mark.sweep
def test_kept_latents_forget_their_start():
    """At rest, one step a visit suffices: the mean over a long run of estimates is exact, from a start far off."""
    estimator = LocalLatents(hierarchy(), 3, inner_step_size=0.9, num_initial_steps=100)

    @jax.jit
    def run(estimator, key):
        key_init, key_steps = jax.random.split(key)

        def body(state, key):
            estimate, state = estimator.estimate(key, params(), state)
            return state, jnp.stack([estimate.gradient["log_tau"], estimate.gradient["mu"]])

        keys = jax.random.split(key_steps, 3000)
        return jax.lax.scan(body, estimator.init(key_init, params()), keys)[1]

    chains = jax.vmap(run, in_axes=(None, 0))(estimator, jax.random.split(jax.random.key(1), 20))
    means = np.asarray(chains, np.float64).mean(axis=1)  # chains are independent
    error = means.std(axis=0, ddof=1) / np.sqrt(len(means))
    assert np.all(error < 0.02 * np.abs(exact_gradient()).max())
    np.testing.assert_array_less(np.abs(means.mean(axis=0) - exact_gradient()), scipy.stats.t.isf(1e-6, 19) * error)


def test_latents_are_kept_row_by_row():
    estimator = LocalLatents(hierarchy(), 3, inner_step_size=0.3)
    state = estimator.init(jax.random.key(0), params())
    before = state.latents["z"]
    changed = np.zeros(N, int)
    for i in range(estimator.minibatch.num_blocks):
        drawn, _ = estimator.minibatch.draw(jax.random.split(jax.random.key(i))[0], state.minibatch)
        _, state = estimator.estimate(jax.random.key(i), params(), state)
        moved = np.asarray(state.latents["z"] != before)
        assert set(np.flatnonzero(moved)) <= set(np.asarray(drawn.data["index"]))
        changed += moved
        before = state.latents["z"]
    assert changed.sum() >= N - 2  # an epoch visits all; few moves are rejected at this step


def test_weights_belong_to_the_rows():
    """Over an epoch without inner steps, the estimates average to the complete-data gradient at the latents."""
    estimator = LocalLatents(hierarchy(), 3, inner_step_size=1.0, num_inner_steps=0)
    state = estimator.init(jax.random.key(0), params())
    latents, gradients = state.latents, []
    for i in range(estimator.minibatch.num_blocks):
        estimate, state = estimator.estimate(jax.random.key(i), params(), state)
        gradients.append(estimate.gradient)
    expected = jax.grad(lambda t: log_prior(t) + log_joint(t, latents, jnp.asarray(X)).sum())(params())
    for name, g in expected.items():
        np.testing.assert_allclose(np.mean([x[name] for x in gradients]), g, rtol=1e-5)


# --- the inner chain -----------------------------------------------------------------------------------------------


def log_densities(position):
    """Targets of several shapes: a normal of its own mean and scale a row, tied to a vector."""
    a, b = position["a"], position["b"]
    scale = 1.0 + jnp.arange(a.shape[0], dtype=a.dtype)
    return -0.5 * ((a - scale) / scale) ** 2 - jnp.sum((b - jnp.sin(a)[:, None]) ** 2, axis=1)


def start_rows():
    return {"a": jnp.linspace(-1.0, 1.0, 5), "b": jnp.linspace(0.0, 2.0, 10).reshape(5, 2)}


@pytest.mark.usefixtures("x64")
def test_leapfrog_is_reversible():
    rows = rowwise_hmc.evaluate(log_densities, start_rows())
    momentum = rng.normal_like(jax.random.key(0), rows.position)
    there, end = rowwise_hmc.leapfrog(log_densities, rows, momentum, jnp.asarray(0.3), 4)
    back, again = rowwise_hmc.leapfrog(log_densities, there, jax.tree.map(jnp.negative, end), jnp.asarray(0.3), 4)
    for name, x in start_rows().items():
        np.testing.assert_allclose(back.position[name], x, atol=1e-12)
        np.testing.assert_allclose(again[name], -momentum[name], atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_acceptance_is_that_of_each_row_alone():
    key, rows = jax.random.key(3), rowwise_hmc.evaluate(log_densities, start_rows())
    momentum = rng.normal_like(jax.random.split(key)[0], rows.position)
    proposal, end = rowwise_hmc.leapfrog(log_densities, rows, momentum, jnp.asarray(1.1), 2)

    def energy(rows, momentum):
        return -rows.value + 0.5 * momentum["a"] ** 2 + 0.5 * (momentum["b"] ** 2).sum(1)

    expected = np.minimum(1.0, np.exp(energy(rows, momentum) - energy(proposal, end)))
    moved, probability = rowwise_hmc.step(key, log_densities, rows, jnp.asarray(1.1), 2)
    np.testing.assert_allclose(probability, expected, rtol=1e-12)
    accepted = np.asarray(moved.position["a"] != rows.position["a"])
    assert 0 < accepted.sum() < 5
    np.testing.assert_array_equal(moved.position["b"][accepted], proposal.position["b"][accepted])
    np.testing.assert_array_equal(moved.gradient["b"][~accepted], rows.gradient["b"][~accepted])


@pytest.mark.parametrize("adjusted", [True, False])
def test_the_law_is_kept_at_a_large_step_and_only_by_accepting(adjusted):
    num = 20_000
    draws = {"z": jax.random.normal(jax.random.key(0), (num,))}

    def standard_normals(position):
        return -0.5 * position["z"] ** 2

    def move(rows, key):
        if adjusted:
            return rowwise_hmc.step(key, standard_normals, rows, jnp.asarray(1.4), 1)[0], None
        momentum = rng.normal_like(key, rows.position)
        return rowwise_hmc.leapfrog(standard_normals, rows, momentum, jnp.asarray(1.4), 1)[0], None

    rows = rowwise_hmc.evaluate(standard_normals, draws)
    rows, _ = jax.lax.scan(move, rows, jax.random.split(jax.random.key(1), 5))
    p_value = scipy.stats.kstest(np.asarray(rows.position["z"], np.float64), scipy.stats.norm.cdf).pvalue
    assert (p_value > 1e-6) == adjusted


# --- bad input -----------------------------------------------------------------------------------------------------


def test_bad_input():
    def make(**options):
        return LocalLatents(hierarchy(), **{"batch_size": 3, "inner_step_size": 0.5, **options})

    with pytest.raises(ValueError, match="scheme must be one of"):
        make(scheme="uniform")
    with pytest.raises(ValueError, match="inner_step_size"):
        make(inner_step_size=0.0)
    with pytest.raises(ValueError, match="start must be one of"):
        make(start="first")
    with pytest.raises(ValueError, match=r"guess must return the latents of one row with shapes \{'z': \(1,\)\}; got"):
        make(guess=lambda key, theta, rows: {"z": jnp.zeros((rows.shape[0], 2))})
    with pytest.raises(ValueError, match="at least one latent"):
        LatentPosterior(log_prior, log_joint, X, latents={})
    with pytest.raises(ValueError, match=r"log_joint must return one value a datum, of shape \(7,\)"):
        LatentPosterior(log_prior, lambda t, z, x: jnp.sum(x), jnp.asarray(X), latents={"z": ()}, initial=params())


def test_likelihoods_that_are_integrals_raise():
    with pytest.raises(ValueError, match=r"integral over a latent variable.*LocalLatents"):
        hierarchy().log_density(params())
    minibatch = erg.estimators.Minibatch(hierarchy(), 3)
    with pytest.raises(ValueError, match=r"integral over a latent variable.*LocalLatents"):
        minibatch.estimate(jax.random.key(0), params(), minibatch.init(jax.random.key(1), params()))

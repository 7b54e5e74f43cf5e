"""Score climbing on NumPyro programs: gradients and states at rest against enumeration and closed forms, rows, and resumption."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI

from ergodica.core import tree
from ergodica.estimators import JointStochasticApproximation, MarkovianScoreClimbing, VariationalGradient
from ergodica.estimators.em import independence
from ergodica.estimators.variational.objectives.chains import Chains
from tests.support.exact_programs import Case
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")

X = jnp.array([0.7, 1.9, -0.4, 0.2])
N, BATCH = 4, 2
PRIOR = jnp.array([[0.2, 0.3, 0.5], [0.5, 0.1, 0.4]])
PARAMS = {
    "slope": jnp.array(0.8),
    "z_logits": jnp.array([0.3, -0.4, 0.2, 0.6]),
    "c_logits": jnp.array([[0.1, -0.3, 0.5], [0.4, 0.2, -0.6]]),
}
CONFIGURATIONS = np.array(list(itertools.product(range(2), range(3))))


def program(size=N):
    """A bit and a category that depends on it, for each of four data, ``size`` of them at a time."""

    def model(x):
        slope = numpyro.param("slope", 0.8)
        with numpyro.plate("data", N, subsample_size=size) as rows:
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            c = numpyro.sample("c", dist.Categorical(PRIOR[z]))
            numpyro.sample("x", dist.Normal(slope * c - z, 0.6), obs=x[rows])

    def guide(x):
        with numpyro.plate("data", N, subsample_size=size):
            z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("z_logits", jnp.zeros(N), event_dim=0)))
            numpyro.sample("c", dist.Categorical(logits=numpyro.param("c_logits", jnp.zeros((2, 3)))[z]))

    return Case("climbing", model, guide, (X,), PARAMS)


def log_tables(params):
    """Log joint and log guide (N, 6) of each datum's configurations."""
    z, c = CONFIGURATIONS.T
    log_p = jnp.log(jnp.where(z == 1, 0.4, 0.6)) + jnp.log(PRIOR[z, c])
    log_p = log_p + dist.Normal(params["slope"] * c - z, 0.6).log_prob(X[:, None])
    bits = jnp.stack([jax.nn.log_sigmoid(-params["z_logits"]), jax.nn.log_sigmoid(params["z_logits"])], axis=1)
    return log_p, bits[:, z] + jax.nn.log_softmax(params["c_logits"])[z, c]


def exact_gradient(params):
    """Of the log evidence, and of minus the inclusive divergence."""
    posterior = jax.nn.softmax(log_tables(params)[0])

    def objective(params):
        log_p, log_q = log_tables(params)
        return jnp.sum(jax.nn.logsumexp(log_p, axis=1)) + jnp.sum(posterior * log_q)

    return tree.ravel(jax.grad(objective)(params))


def at_rest(loss, size, num_repeats=30_000):
    """Gradients, and the next states and their products, from chains that have their law; and the means of all exactly."""
    case = program(size)
    gradient = VariationalGradient(loss, case.model, case.guide, X)
    log_p, _ = log_tables(PARAMS)
    empty = gradient.init(jax.random.key(0), PARAMS)["chains"]

    def one(key):
        key_state, key_step = jax.random.split(key)
        z, c = jnp.asarray(CONFIGURATIONS)[jax.random.categorical(key_state, log_p)].T
        values = {"z": z.astype(empty.values["z"].dtype), "c": c.astype(empty.values["c"].dtype)}
        state = {"chains": empty._replace(values=values, started=jnp.ones(N, bool))}
        estimate, after = gradient.estimate(key_step, PARAMS, state)
        z, c = (1.0 * after["chains"].values[name] for name in ("z", "c"))
        return jnp.concatenate([tree.ravel(estimate.gradient), z, c, z * c])

    keys = jax.random.split(jax.random.key(7), num_repeats)
    found = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=1000))(keys)
    moments = jax.nn.softmax(log_p) @ np.stack([*CONFIGURATIONS.T, CONFIGURATIONS.prod(axis=1)], axis=1)
    return np.asarray(found), np.concatenate([exact_gradient(PARAMS), moments.T.ravel()])


@pytest.mark.parametrize(
    ("loss", "size"),
    [
        (MarkovianScoreClimbing(2), BATCH),
        (JointStochasticApproximation(2), BATCH),
        pytest.param(MarkovianScoreClimbing(1, rao_blackwell=False), N, marks=pytest.mark.slow),
        pytest.param(JointStochasticApproximation(1, vectorize_particles=False), N, marks=pytest.mark.slow),
    ],
    ids=["MSC-batch", "JSA-batch", "MSC-state", "JSA-mapped"],
)
@pytest.mark.swept_after(1)
def test_unbiased_at_rest_and_states_keep_their_law(loss, size):
    """Of evidence and inclusive divergence at once, over all the data; an error of 15% of the largest would be seen."""
    found, exact = at_rest(loss, size)
    assert_mean(found, exact, smallest_error=0.15)


def without_the_retained_state(log_weights):
    weights = conditional_weights(log_weights[1:])
    return jnp.concatenate([jnp.zeros_like(weights[:1]), weights])


conditional_weights = independence.conditional_weights


def without_updating_the_weight(log_weights, uniforms):
    accept = jnp.log(uniforms) < log_weights[1:] - log_weights[:1]
    numbers = jnp.arange(1, log_weights.shape[0]).reshape(-1, *[1] * (uniforms.ndim - 1))
    return jax.lax.cummax(jnp.where(accept, numbers, 0), axis=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "name", "mutant"),
    [
        (MarkovianScoreClimbing(2), "conditional_weights", without_the_retained_state),
        (JointStochasticApproximation(3), "metropolis_path", without_updating_the_weight),
    ],
    ids=["retained", "weight"],
)
def test_mutants_are_rejected(loss, name, mutant, monkeypatch):
    """Importance sampling without the chain's state, and the accept test of published code; exactly in `test_independence`."""
    monkeypatch.setattr(independence, name, mutant)
    found, exact = at_rest(loss, N)
    assert np.max(np.abs(z_scores(found, exact))) > REJECTION


def test_the_first_step_is_importance_sampling():
    """Chains without a state start from the draws of the step; what they were filled with does not matter."""
    case, loss = program(N), MarkovianScoreClimbing(3)
    gradient = VariationalGradient(loss, case.model, case.guide, X)
    empty = gradient.init(jax.random.key(0), PARAMS)
    filled = {"chains": empty["chains"]._replace(values=jax.tree.map(jnp.ones_like, empty["chains"].values))}
    first_step = jax.jit(lambda state: gradient.estimate(jax.random.key(1), PARAMS, state))
    estimates = [first_step(state) for state in (empty, filled)]
    jax.tree.map(np.testing.assert_array_equal, *estimates)
    assert np.all(estimates[0][1]["chains"].started)
    assert not np.any(estimates[0][1]["chains"].visits)


def test_continuous_latents_outside_of_plates():
    """One chain over a bit and a normal; the posterior and both gradients in closed form. An error of 5% would be seen."""
    x, s = jnp.array(1.4), 0.9

    def model(x):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        w = numpyro.sample("w", dist.Normal(numpyro.param("shift", 1.0) * z, 1.0))
        numpyro.sample("x", dist.Normal(w, s), obs=x)

    def guide(x):
        z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.0)))
        numpyro.sample("w", dist.Normal(numpyro.param("loc", 0.0) + 0.3 * z, jnp.exp(numpyro.param("log_scale", 0.0))))

    params = {name: jnp.array(v) for name, v in {"shift": 0.8, "logit": -0.3, "loc": 0.4, "log_scale": 0.1}.items()}
    bits, variance = jnp.arange(2.0), 1 / (1 + 1 / s**2)

    def log_p(params):
        return jnp.log(jnp.array([0.7, 0.3])) + dist.Normal(params["shift"] * bits, jnp.sqrt(1 + s**2)).log_prob(x)

    posterior, means = jax.nn.softmax(log_p(params)), variance * (params["shift"] * bits + x / s**2)

    def objective(params):
        log_q = dist.Bernoulli(logits=params["logit"]).log_prob(bits)
        miss = (means - params["loc"] - 0.3 * bits) ** 2 + variance
        log_q = log_q - params["log_scale"] - 0.5 * miss * jnp.exp(-2 * params["log_scale"])
        return jax.nn.logsumexp(log_p(params)) + jnp.sum(posterior * log_q)

    gradient = VariationalGradient(MarkovianScoreClimbing(2), model, guide, x)
    empty = gradient.init(jax.random.key(0), params)["chains"]

    def one(key):
        key_bit, key_normal, key_step = jax.random.split(key, 3)
        z = jax.random.categorical(key_bit, jnp.log(posterior))
        w = means[z] + jnp.sqrt(variance) * jax.random.normal(key_normal)
        values = {"z": z.astype(empty.values["z"].dtype), "w": w}
        state = {"chains": empty._replace(values=values, started=jnp.ones((), bool))}
        estimate, after = gradient.estimate(key_step, params, state)
        end = after["chains"].values
        return jnp.concatenate([tree.ravel(estimate.gradient), jnp.stack([1.0 * end["z"], end["w"], end["w"] ** 2])])

    found = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 20_000)))
    moments = jnp.stack([posterior[1], posterior @ means, posterior @ (means**2 + variance)])
    assert_mean(found, np.concatenate([tree.ravel(jax.grad(objective)(params)), moments]), smallest_error=0.05)


def indexed_program():
    """Guide parameters of each datum, found by the plate's rows; latents in two nested plates, of which one is subsampled."""

    def model(x):
        with numpyro.plate("data", N, subsample_size=BATCH, dim=-2) as rows, numpyro.plate("columns", 3, dim=-1):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([1, 1, 2]).to_event(1))
            numpyro.sample("x", dist.Normal(jnp.sum(z, axis=-1), 1.0), obs=x[rows][:, None])

    def guide(x):
        loc = numpyro.param("loc", jnp.zeros((N, 1, 2)))
        with numpyro.plate("data", N, subsample_size=BATCH, dim=-2) as rows, numpyro.plate("columns", 3, dim=-1):
            numpyro.sample("z", dist.Normal(loc[rows], 1.0).to_event(1))

    return model, guide


def test_chains_stand_where_the_plate_says():
    """Those of the batch move, and no others; the gradient is that of the batch's rows, and each element has its own chain."""
    model, guide = indexed_program()
    loss = MarkovianScoreClimbing(4)
    rows = jnp.array([3, 1])
    fixed = [numpyro.handlers.substitute(f, data={"data": rows}) for f in (model, guide)]
    gradient = VariationalGradient(loss, *fixed, X)
    params = {"loc": jnp.zeros((N, 1, 2))}
    state = gradient.init(jax.random.key(0), params)
    before = state["chains"]
    assert before.values["z"].shape == (N, 3, 2)
    assert before.started.shape == (N, 3)
    step = jax.jit(lambda key, state: gradient.estimate(key, params, state))
    for i in range(8):
        estimate, state = step(jax.random.key(i), state)
    after = state["chains"]
    assert np.any(np.asarray(estimate.gradient["loc"])[[1, 3]])
    assert not np.any(np.asarray(estimate.gradient["loc"])[[0, 2]])
    np.testing.assert_array_equal(after.visits, np.array([0, 7, 0, 7])[:, None] * np.ones(3, int))
    np.testing.assert_array_equal(after.values["z"][jnp.array([0, 2])], 0.0)
    assert len(np.unique(after.values["z"][rows])) == 12
    assert np.all(after.acceptance_rate[rows] > 0)
    assert np.all(np.isnan(after.acceptance_rate[jnp.array([0, 2])]))
    sources = [step(jax.random.key(9), state)[0].gradient["loc"]]
    moved = after._replace(values={"z": after.values["z"].at[jnp.array([0, 2])].set(5.0)})
    sources.append(step(jax.random.key(9), {"chains": moved})[0].gradient["loc"])
    np.testing.assert_array_equal(*sources)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(MarkovianScoreClimbing(3), marks=pytest.mark.sweep),
        JointStochasticApproximation(2, num_warmup=2),
    ],
    ids=["MSC", "JSA"],
)
def test_svi_with_a_subsampled_plate_resumes_to_the_bit(loss, tmp_path):
    """Six steps at once, and three, saved and restored; every chain of a visited row has a state."""
    model, guide = indexed_program()
    svi = SVI(model, loss.guide(model, guide), optax.adam(0.05), loss)
    update = jax.jit(lambda state: svi.update(state, X)[0])
    first = svi.init(jax.random.key(0), X)

    def steps(state, number):
        for _ in range(number):
            state = update(state)
        return state

    whole, half = steps(first, 6), steps(first, 3)
    leaves, structure = jax.tree.flatten(half._replace(rng_key=jax.random.key_data(half.rng_key)))
    np.savez(tmp_path / "half.npz", *leaves)
    with np.load(tmp_path / "half.npz") as saved:
        restored = jax.tree.unflatten(structure, [jnp.asarray(saved[name]) for name in saved.files])
    resumed = steps(restored._replace(rng_key=jax.random.wrap_key_data(restored.rng_key)), 3)
    data = [s._replace(rng_key=jax.random.key_data(s.rng_key)) for s in (whole, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *data)
    chains = loss.chains(whole)
    assert isinstance(chains, Chains)
    assert int(chains.step) == 6
    counted = 6 - getattr(loss, "num_warmup", 0)
    assert int(chains.visits.sum()) <= counted * BATCH * 3
    np.testing.assert_array_equal(np.asarray(chains.started)[:, 0], np.any(chains.values["z"] != 0, axis=(1, 2)))


def test_svi_finds_the_posterior():
    """Guide and model of four data, two at a time, near the maximum of the evidence that enumeration gives."""
    case, loss = program(BATCH), MarkovianScoreClimbing(8)
    svi = SVI(case.model, loss.guide(case.model, case.guide), optax.adam(optax.exponential_decay(0.1, 500, 0.1)), loss)
    result = svi.run(jax.random.key(0), 1500, X, progress_bar=False)
    log_p, log_q = log_tables(result.params)
    ascent = jax.jit(
        jax.grad(lambda slope: jnp.sum(jax.nn.logsumexp(log_tables(PARAMS | {"slope": slope})[0], axis=1)))
    )
    slope = jnp.array(0.8)
    for _ in range(300):
        slope = slope + 0.02 * ascent(slope)
    np.testing.assert_allclose(result.params["slope"], slope, atol=0.05)
    bit = jax.nn.softmax(log_p) @ CONFIGURATIONS[:, 0]
    np.testing.assert_allclose(jnp.exp(log_q) @ CONFIGURATIONS[:, 0], bit, atol=0.1)
    assert np.all(loss.chains(result).acceptance_rate > 0.5)


# --- what is refused ---------------------------------------------------------------------------------------------------------


def _global_beside_a_batch():
    def model(x):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", N, subsample_size=BATCH) as rows:
            numpyro.sample("x", dist.Normal(mu, 1.0), obs=x[rows])

    def guide(x):
        numpyro.sample("mu", dist.Normal(numpyro.param("loc", 0.0), 1.0))

    return model, guide


def _point_mass():
    def model(x):
        numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("z", dist.Normal(0.0, 1.0))

    def guide(x):
        numpyro.sample("mu", dist.Delta(numpyro.param("loc", 0.0)))
        numpyro.sample("z", dist.Normal(0.0, 1.0))

    return model, guide


def _nothing():
    return lambda x: numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x[0]), lambda x: None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_global_beside_a_batch, "Plate 'data' of log p.x. is subsampled and does not enclose every site"),
        (_point_mass, "cannot be used at site 'mu' .Delta.: it is a point mass that parameters place"),
        (_nothing, "draws nothing that MarkovianScoreClimbing could hold in a chain"),
    ],
)
def test_refuses_programs_whose_chains_would_be_wrong(make, message):
    model, guide = make()
    loss = MarkovianScoreClimbing(2)
    svi = SVI(model, loss.guide(model, guide), optax.sgd(0.1), loss)
    with pytest.raises(ValueError, match=message):
        svi.update(svi.init(jax.random.key(0), X), X)

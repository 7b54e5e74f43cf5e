"""Inclusive divergence: means of two particles over all pairs of grid points, the order of the bias, and dreams by enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI

import ergodica as erg
from ergodica.core import tree
from ergodica.estimators import ForwardKL, VariationalGradient, WakeSleep
from tests.support.exact_programs import CASES, Case, Exact, exact_inclusive, exact_wake
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")

FAST = ("continuous", "plated")


def param(name, value):
    return numpyro.param(name, jnp.asarray(value, jnp.result_type(float)))


# --- wake phase ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.sweep) for n in CASES if n != "nested"]
)
def test_wake_phase_has_the_mean_of_two_particles(name):
    """The biased estimator's own mean, over all pairs; model and guide. Sees 20% of the largest entry, 45% in the sweep."""
    found = gradients(ForwardKL(2), CASES[name](), 15_000)
    assert_mean(found, exact_gradient(CASES[name], exact_wake), smallest_error=0.2 if name in FAST else 0.45)


PRIOR, SCALE, LABEL_LOGITS = np.array([0.2, 0.3, 0.5]), 0.8, np.array([0.9, -0.4, 0.2])


def label():
    def model(x):
        c = numpyro.sample("c", dist.Categorical(PRIOR))
        numpyro.sample("x", dist.Normal(1.0 * c, SCALE), obs=x)

    def guide(x):
        numpyro.sample("c", dist.Categorical(logits=param("logits", jnp.zeros(3))))

    return Case("label", model, guide, (jnp.array(1.6),), {"logits": jnp.asarray(LABEL_LOGITS)})


def mean_of_self_normalised(num_particles):
    """Exact mean of the wake phase's gradient by the logits, over all counts of labels among the particles."""
    q, weight, scores = weights_of_labels()
    counts = [(i, j, num_particles - i - j) for i in range(num_particles + 1) for j in range(num_particles + 1 - i)]
    counts = np.array(counts)
    ways = [math.factorial(num_particles) / math.prod(map(math.factorial, map(int, row))) for row in counts]
    probability = np.array(ways) * np.prod(q**counts, axis=1)
    weighted = counts * weight
    return probability @ (weighted @ scores / np.sum(weighted, axis=1, keepdims=True))


def weights_of_labels():
    """Probabilities of the three labels under the guide, their importance weights, and the scores of the logits."""
    q = np.exp(LABEL_LOGITS) / np.sum(np.exp(LABEL_LOGITS))
    return q, PRIOR * np.exp(-((np.arange(3.0) - 1.6) ** 2) / (2 * SCALE**2)) / q, np.eye(3) - q


def test_bias_falls_as_one_over_the_particles():
    """Exact: nothing is learnt from one particle, and K times the bias tends to its known limit; four particles by simulation."""
    case = label()
    limit = exact_gradient(label, exact_inclusive)
    bias = {k: mean_of_self_normalised(k) - limit for k in (1, 50, 100)}
    np.testing.assert_allclose(bias[1], -limit, rtol=1e-12)
    q, weight, scores = weights_of_labels()
    constant = (q * (weight / (q @ weight)) ** 2) @ (limit - scores)  # of a ratio of means, by the delta method
    extrapolated = 2 * 100 * bias[100] - 50 * bias[50]
    np.testing.assert_allclose(extrapolated, constant, atol=0.01 * np.max(np.abs(constant)))
    assert np.max(np.abs(constant)) > 0.1 * np.max(np.abs(limit))
    found = gradients(ForwardKL(4), case, 20_000)
    assert_mean(found, mean_of_self_normalised(4), smallest_error=0.1)
    assert np.max(np.abs(z_scores(found, limit))) > REJECTION  # the bias that is documented is seen


def test_comparison_says_that_it_is_biased():
    case = label()
    estimators = {
        "wake": VariationalGradient(ForwardKL(4), case.model, case.guide, *case.args),
        "posterior": Exact(lambda params: exact_inclusive(case, params)),
    }
    table = erg.compare_gradients(
        jax.random.key(0), estimators, case.params, reference="posterior", num_repeats=8000, num_timings=0
    )
    assert table.verdict.sel(point=0, estimator="wake").item() == "biased"


class TowardsIWELBO(ForwardKL):
    """The guide's gradient with the sign that it has in the importance-weighted bound at held draws."""

    @property
    def wake_share(self):
        return -1.0


class Unnormalised(ForwardKL):
    """Every particle counts the same."""

    def weights(self, run):
        log_weights, scale = super().weights(run)
        return 0 * log_weights, scale


@pytest.mark.parametrize("mutant", [TowardsIWELBO, Unnormalised], ids=lambda m: m.__name__)
def test_mutants_of_the_wake_phase_are_rejected(mutant):
    found = gradients(mutant(2), label(), 4_000)
    assert np.max(np.abs(z_scores(found, mean_of_self_normalised(2)))) > REJECTION


X, LOGITS = np.array([0.2, 1.3, -0.4, 0.9]), np.array([0.3, -0.2, 0.5, 0.1])


def bits(size=4):
    def model(x):
        with numpyro.plate("data", 4, subsample_size=size) as rows:
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            numpyro.sample("x", dist.Normal(1.0 * z, 0.8), obs=jnp.asarray(x)[rows])

    def guide(x):
        with numpyro.plate("data", 4, subsample_size=size) as rows:
            numpyro.sample("z", dist.Bernoulli(logits=param("logits", jnp.zeros(4))[rows]))

    return Case("bits", model, guide, (jnp.asarray(X),), {"logits": jnp.asarray(LOGITS)})


def wake_of_bits(logits):
    """Mean of two particles for each datum."""
    z = jnp.arange(2.0)[:, None]
    log_q = dist.Bernoulli(logits=logits).log_prob(z)
    log_w = jax.lax.stop_gradient(dist.Bernoulli(0.4).log_prob(z) + dist.Normal(z, 0.8).log_prob(X) - log_q)
    held = jnp.exp(jax.lax.stop_gradient(log_q))
    first = jax.nn.sigmoid(log_w[:, None] - log_w[None, :])
    return jnp.sum(2 * jnp.sum(held[:, None] * held[None, :] * first, axis=1) * log_q)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.sweep)])
def test_elements_of_a_common_plate_have_weights_of_their_own(size):
    """Subsampled or whole, against the whole plate. Sees 20% of the largest entry."""
    found = gradients(ForwardKL(2), bits(size), 12_000)
    assert_mean(found, np.asarray(jax.grad(wake_of_bits)(jnp.asarray(LOGITS))), smallest_error=0.2)


@pytest.mark.sweep
def test_draws_inside_a_scan_are_held():
    """A walk by NumPyro's scan, against all pairs of nodes: no derivative flows through its values. Sees 20%."""
    from numpyro.contrib.control_flow import scan

    def walk(law):
        def step(last, i):
            z = numpyro.sample("z", law(last, i))
            return z, None

        scan(step, 0.0, jnp.arange(2))

    def model():
        walk(lambda last, i: dist.Normal(0.5 * last, 1.0))
        numpyro.sample("x", dist.Normal(param("m", 0.2), 1.0), obs=0.7)

    def guide():
        loc = param("loc", jnp.zeros(2))
        walk(lambda last, i: dist.Normal(loc[i], 1.2))

    loc = np.array([0.4, -0.3])
    nodes, weights = np.polynomial.hermite_e.hermegauss(24)
    first, second = np.meshgrid(loc[0] + 1.2 * nodes, loc[1] + 1.2 * nodes, indexing="ij")
    log_q = -((first - loc[0]) ** 2 + (second - loc[1]) ** 2) / (2 * 1.2**2)
    log_w = (-(first**2 + (second - 0.5 * first) ** 2) / 2 - log_q).ravel()
    quadrature = np.outer(weights, weights).ravel() / weights.sum() ** 2
    share = 1 / (1 + np.exp(log_w[None, :] - log_w[:, None]))
    pair = 2 * quadrature * (share @ quadrature)
    exact = [pair @ ((z - m) / 1.2**2).ravel() for z, m in ((first, loc[0]), (second, loc[1]))]
    case = Case("walk", model, guide, (), {"loc": jnp.asarray(loc), "m": jnp.array(0.2)})
    found = gradients(ForwardKL(2), case, 12_000)
    np.testing.assert_allclose(found[:, 2], 0.5, rtol=1e-12)  # of the model's parameter
    assert_mean(found[:, :2], np.array(exact), smallest_error=0.2)


def test_a_particle_without_density_counts_nothing():
    """A model that forbids half of the guide's draws: finite gradients, which move the guide into the rest."""

    def model():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("above", jnp.where(z > 0, 0.0, -jnp.inf))

    def guide():
        numpyro.sample("z", dist.Normal(param("m", 0.0), 1.0))

    gradient = jax.jit(jax.grad(lambda p: ForwardKL(64).loss(jax.random.key(0), p, model, guide)))(
        {"m": jnp.array(0.0)}
    )
    np.testing.assert_allclose(gradient["m"], -np.sqrt(2 / np.pi), atol=0.3)


# --- sleep phase ---------------------------------------------------------------------------------------------------------------

TABLE = np.array([[0.9, -1.0, 0.3], [0.2, 0.8, -0.7]])


def dreamer(size=3, *, masked=False):
    """A global bit and a category for each of three data, which are bits; the guide reads them."""
    mask = jnp.array([True, False, True]) if masked else jnp.ones(3, bool)

    def model(x):
        table = param("table", TABLE)
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        with numpyro.plate("data", 3, subsample_size=size) as rows, numpyro.handlers.mask(mask=mask[rows]):
            c = numpyro.sample("c", dist.Categorical(PRIOR))
            numpyro.sample("x", dist.Bernoulli(logits=table[z, c]), obs=x[rows])

    def guide(x):
        numpyro.sample("z", dist.Bernoulli(logits=param("a", 0.3) + param("b", 0.5) * jnp.mean(1.0 * x)))
        with numpyro.plate("data", 3, subsample_size=size) as rows, numpyro.handlers.mask(mask=mask[rows]):
            numpyro.sample("c", dist.Categorical(logits=param("rows", jnp.zeros((2, 3)))[x[rows]]))

    params = {"table": TABLE, "a": 0.3, "b": 0.5, "rows": jnp.array([[0.2, -0.1, 0.4], [0.0, 0.5, -0.3]])}
    return Case("dreamer", model, guide, (jnp.array([1, 0, 1]),), jax.tree.map(jnp.asarray, params))


def exact_dreams(params, *, masked=False, share=1.0):
    """Mean of log q over all latents and data that the model draws: the masked datum is as it was, and its category not counted."""
    total, data = 0.0, np.array([1, 0, 1])
    shown = [0, 2] if masked else [0, 1, 2]
    for z in range(2):
        for x in itertools.product(range(2), repeat=len(shown)):
            seen = data.copy()
            seen[shown] = x
            log_z = dist.Bernoulli(logits=params["a"] + params["b"] * seen.mean()).log_prob(z)
            each = dist.Bernoulli(logits=TABLE[z][:, None]).log_prob(jnp.array(x))  # categories × data
            joint = PRIOR[:, None] * jnp.exp(each)
            log_c = jax.nn.log_softmax(params["rows"])[jnp.array(x)].T
            probability = dist.Bernoulli(0.3).log_prob(z) + jnp.sum(jnp.log(jnp.sum(joint, axis=0)))
            given = joint / jnp.sum(joint, axis=0)
            total += jnp.exp(probability) * (log_z + jnp.sum(given * log_c))
    return share * total


GUIDE = ("a", "b", "rows")


def guide_part(found, params):
    """Columns of the guide's parameters, and their order."""
    names = sorted(params)
    columns = np.concatenate([[n in GUIDE] * np.size(params[n]) for n in names]).astype(bool)
    return found[:, columns]


def exact_guide(params, **kwargs):
    gradient = jax.jit(jax.grad(lambda p: exact_dreams(params | p, **kwargs)))({n: params[n] for n in GUIDE})
    return np.asarray(tree.ravel(gradient))


@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.sweep)])
@pytest.mark.swept_after(1)
def test_sleep_phase_against_enumeration(masked):
    """Over all latents and data, with the model's gradient beside it: IWELBO's. Sees 10% of the largest entry."""
    case = dreamer(masked=masked)
    found = gradients(WakeSleep(2, {"x": "x"}, num_dreams=1), case, 20_000)
    assert_mean(guide_part(found, case.params), exact_guide(case.params, masked=masked), smallest_error=0.1)
    if not masked:
        model_part = found[:, -TABLE.size :]
        exact = exact_gradient(dreamer, exact_wake)[-TABLE.size :]
        assert_mean(model_part, exact, smallest_error=0.2)


@pytest.mark.sweep
def test_both_phases_are_half_of_each():
    case = dreamer()
    found = gradients(WakeSleep(2, {"x": "x"}, phase="both", num_dreams=1), case, 20_000)
    wake = guide_part(exact_gradient(dreamer, exact_wake)[None], case.params)[0]
    assert_mean(guide_part(found, case.params), 0.5 * exact_guide(case.params) + 0.5 * wake, smallest_error=0.1)


def local_dreamer(size):
    """Bits for each of three data, without anything global."""

    def model(x):
        with numpyro.plate("data", 3, subsample_size=size) as rows:
            c = numpyro.sample("c", dist.Categorical(PRIOR))
            numpyro.sample("x", dist.Bernoulli(logits=jnp.asarray(TABLE)[0][c]), obs=x[rows])

    def guide(x):
        with numpyro.plate("data", 3, subsample_size=size) as rows:
            logits = param("rows", jnp.zeros((3, 2, 3)))[rows, x[rows]]
            numpyro.sample("c", dist.Categorical(logits=logits))

    values = jnp.linspace(-0.5, 0.5, 18).reshape(3, 2, 3)
    return Case("local", model, guide, (jnp.array([1, 0, 1]),), {"rows": values})


def test_simulated_rows_of_a_subsample_go_to_their_places():
    """A guide with parameters for each row: the wrong place is the wrong gradient. Sees 20% of the largest entry."""
    case = local_dreamer(2)

    def exact(rows):
        x = jnp.arange(2)
        joint = PRIOR[:, None] * jnp.exp(dist.Bernoulli(logits=jnp.asarray(TABLE)[0][:, None]).log_prob(x))
        return jnp.sum(joint.T * jax.nn.log_softmax(rows, axis=-1))

    found = gradients(WakeSleep(1, {"x": "x"}, num_dreams=1), case, 15_000)
    expected = np.asarray(jax.grad(exact)(case.params["rows"]).ravel())
    assert_mean(found, expected, smallest_error=0.2)


class DreamsOfTheGuide(WakeSleep):
    """Shown the data at hand instead of those of the dream."""

    def __init__(self):
        super().__init__(1, lambda draws, x: ((x,), {}), num_dreams=1)

    def check(self, program, structure, estimators):
        return


def test_dreams_must_be_shown_to_the_guide():
    case = dreamer()
    found = gradients(DreamsOfTheGuide(), case, 4_000)
    z = z_scores(guide_part(found, case.params)[:, :2], exact_guide(case.params)[:2])
    assert np.max(np.abs(z)) > REJECTION


def test_a_function_hands_over_what_a_mapping_does():
    """For data in a dictionary, by keyword; the same dreams number by number."""
    case = dreamer()

    def gradient(loss, model, guide, *args, **kwargs):
        return jax.jit(jax.grad(lambda p: loss.loss(jax.random.key(3), p, model, guide, *args, **kwargs)))(case.params)

    expected = gradient(WakeSleep(1, {"x": "x"}), case.model, case.guide, *case.args)
    inside = gradient(
        WakeSleep(1, lambda draws, batch: ((), {"batch": {"x": draws["x"]}})),
        lambda batch: case.model(batch["x"]),
        lambda batch: case.guide(batch["x"]),
        batch={"x": case.args[0]},
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12), inside, expected)


@pytest.mark.sweep
def test_arguments_by_keyword():
    case, loss = dreamer(), WakeSleep(1, {"x": "x"})
    by_place, by_name = (
        loss.loss(jax.random.key(3), case.params, case.model, case.guide, *args, **kwargs)
        for args, kwargs in ((case.args, {}), ((), {"x": case.args[0]}))
    )
    assert by_place == by_name


def test_sleep_finds_the_posterior_of_every_datum():
    """Normal data of a normal mean, the guide a line: the exact posterior x / 2 with sd sqrt(1/2) at all data at once."""

    def model(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        numpyro.sample("z", dist.Normal(param("slope", 0.0) * x + param("shift", 0.5), jnp.exp(param("s", 0.0))))

    optimiser = optax.adam(optax.cosine_decay_schedule(0.05, 800))
    svi = SVI(model, guide, optimiser, WakeSleep(1, {"x": "x"}, num_dreams=64))
    fit = svi.run(jax.random.key(0), 800, jnp.array(3.0), progress_bar=False)
    found = [float(fit.params[n]) for n in ("slope", "shift", "s")]
    np.testing.assert_allclose(found, [0.5, 0.0, -0.5 * np.log(2.0)], atol=0.03)

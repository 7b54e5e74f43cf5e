"""The split of a NumPyro model: both parts together are NumPyro's density, and any batches average to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import constrain_fn, potential_energy

import ergodica as erg
from ergodica.models.numpyro_program import log_prob
from tests.models.numpyro_cases import ARRAYS, BATCH, CASES, Case, N, linear

# where a model can be written both ways, the sweep runs the second one too: `test_both_patterns_are_one_posterior`
RUNS = [
    pytest.param(case, p, id=f"{name}-{p}", marks=[pytest.mark.sweep] if case.patterns == "AB" and p == "A" else [])
    for name, case in CASES.items()
    for p in case.patterns
]
BLOCKS = [np.array([7, 2, 9, 0]), np.array([1, 10, 3]), np.array([4, 8, 5, 6])]

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(autouse=True)
def promotion_of_the_case(request):
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if case and case.relaxed:
        request.getfixturevalue("numpyro_promotion")


@functools.cache
def posterior_of(case: Case, pattern: str, **options):
    return erg.from_numpyro(case.model, **case.arguments(pattern), **options)


def numpyro_log_density(case: Case, position):
    # the model asks for a key only where it initialises parameters
    model = handlers.seed(case.model, 0)
    return -potential_energy(model, (), case.everything(), position)


def numpyro_terms(case: Case, position):
    """Log likelihood of each datum, from NumPyro's trace at the constrained values."""
    model = handlers.seed(case.model, 0)
    values = constrain_fn(model, (), case.everything(), position)
    sites = handlers.trace(handlers.substitute(model, data=values)).get_trace(**case.everything())
    terms = jnp.zeros(N)
    for name, axis in case.sites.items():
        terms += jnp.moveaxis(log_prob(sites[name]), axis, 0).reshape(N, -1).sum(1)
    return terms


def rows_at(posterior, indices):
    return jax.tree.map(lambda x: x[indices], posterior.data)


def assert_partition_averages_to_full(log_prior, sum_of_block, full):
    """The mean over blocks of prior + (number of blocks) * (sum of the block) is the full log density."""
    estimates = [log_prior + len(BLOCKS) * sum_of_block(block) for block in BLOCKS]
    np.testing.assert_allclose(np.mean(estimates), full, rtol=1e-12)


@pytest.mark.parametrize(("case", "pattern"), RUNS)
@pytest.mark.swept_after(6)
def test_sum_of_both_parts_is_numpyros_density(case, pattern):
    posterior = posterior_of(case, pattern)
    ours = jax.jit(jax.value_and_grad(posterior.log_density))
    numpyros = jax.jit(jax.value_and_grad(lambda q: numpyro_log_density(case, q)))
    for seed in range(3):
        position = posterior.start(jax.random.key(seed))
        value, gradient = ours(position)
        expected, expected_gradient = numpyros(position)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        assert gradient.keys() == expected_gradient.keys()
        for name, g in gradient.items():
            np.testing.assert_allclose(g, expected_gradient[name], rtol=1e-9, atol=1e-11, err_msg=name)


@pytest.mark.parametrize(("case", "pattern"), RUNS)
@pytest.mark.swept_after(6)
def test_each_datum_has_numpyros_log_probability(case, pattern):
    posterior = posterior_of(case, pattern)
    position = posterior.start(jax.random.key(0))
    terms = numpyro_terms(case, position)
    shuffled = np.array([3, 0, 10, 1, 2, 9, 4, 8, 5, 7, 6])
    repeated = np.array([5, 5, 0])
    for indices in (np.arange(N), np.array([2, 7]), np.array([10]), shuffled, repeated):
        # compiled: eager NumPyro would object to the scale 0 of a prior from the spread of one row
        values = jax.jit(posterior.log_likelihood)(position, rows_at(posterior, indices))
        np.testing.assert_allclose(values, terms[indices], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("case", "pattern"), RUNS)
@pytest.mark.swept_after(6)
def test_any_partition_averages_to_the_full_density(case, pattern):
    posterior = posterior_of(case, pattern)
    position = posterior.start(jax.random.key(0))
    assert_partition_averages_to_full(
        posterior.log_prior(position),
        lambda block: posterior.log_likelihood(position, rows_at(posterior, block)).sum(),
        numpyro_log_density(case, position),
    )


@pytest.mark.parametrize("name", ["linear", "factors", "several observed"])
def test_mutant_split_by_is_observed_is_rejected(name):
    # Jacobians, factors and observations outside the data plate count as observed too
    case = CASES[name]
    posterior = posterior_of(case, "B")
    position = posterior.start(jax.random.key(0))
    program = posterior.source.program

    def sum_where(observed, rows):
        sites = program.at(position, rows).values()
        return sum(log_prob(s).sum() for s in sites if s["type"] == "sample" and s["is_observed"] == observed)

    full = numpyro_log_density(case, position)
    split = sum_where(False, posterior.data) + sum_where(True, posterior.data)
    np.testing.assert_allclose(split, full, rtol=1e-12)
    with pytest.raises(AssertionError):
        assert_partition_averages_to_full(
            sum_where(False, posterior.data), lambda block: sum_where(True, rows_at(posterior, block)), full
        )


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if c.patterns == "AB"])
@pytest.mark.swept_after(4)
def test_both_patterns_are_one_posterior(case):
    by_index, by_row = posterior_of(case, "A"), posterior_of(case, "B")
    position = by_row.start(jax.random.key(1))
    assert jax.tree.structure(by_index.shape()) == jax.tree.structure(by_row.shape())
    np.testing.assert_allclose(by_index.log_prior(position), by_row.log_prior(position), rtol=1e-12)
    indices = np.array([9, 1, 4])
    np.testing.assert_allclose(
        by_index.log_likelihood(position, rows_at(by_index, indices)),
        by_row.log_likelihood(position, rows_at(by_row, indices)),
        rtol=1e-12,
    )


@pytest.mark.parametrize(("case", "pattern"), RUNS)
def test_constrain_is_numpyros(case, pattern):
    posterior = posterior_of(case, pattern, deterministic="all")
    position = posterior.start(jax.random.key(0))
    model = handlers.seed(case.model, 0)
    expected = constrain_fn(model, (), case.everything(), position, return_deterministic=True)
    values = posterior.constrain(position)
    expected = {name.replace("/", "."): value for name, value in expected.items()}  # xarray refuses slashes
    assert values.keys() == expected.keys()
    for name, value in values.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("pattern", ["A", "B"])
@pytest.mark.parametrize("batch_size", [4, 1, 6, 11])  # 4 and 6 do not divide 11
@pytest.mark.swept_after(3)
def test_blocks_average_to_the_full_gradient(pattern, batch_size):
    posterior = posterior_of(CASES["several observed"], pattern)
    gradient = erg.estimators.Minibatch(posterior, batch_size)
    position = posterior.start(jax.random.key(2))
    full = jax.grad(posterior.log_density)(position)
    of_block = jax.jit(lambda gradient, k: gradient.at(position, gradient.block(k)).gradient)
    estimates = [of_block(gradient, k) for k in range(gradient.num_blocks)]
    mean = jax.tree.map(lambda *g: sum(g) / len(g), *estimates)
    for name, g in mean.items():
        np.testing.assert_allclose(g, full[name], rtol=1e-10)


@pytest.mark.parametrize("pattern", ["A", "B"])
def test_jit_vmap_and_grad(pattern):
    posterior = posterior_of(CASES["decentred groups"], pattern)
    positions = jax.vmap(posterior.start)(jax.random.split(jax.random.key(0), 3))
    one = jax.tree.map(lambda x: x[1], positions)
    rows = rows_at(posterior, np.array([3, 8]))
    np.testing.assert_allclose(jax.vmap(posterior.log_prior)(positions)[1], posterior.log_prior(one), rtol=1e-12)
    vmapped = jax.vmap(posterior.log_likelihood, in_axes=(0, None))(positions, rows)
    np.testing.assert_allclose(vmapped[1], posterior.log_likelihood(one, rows), rtol=1e-12)
    np.testing.assert_allclose(jax.jit(posterior.log_density)(one), posterior.log_density(one), rtol=1e-12)

    def term(position, row):
        return posterior.log_likelihood(position, jax.tree.map(lambda x: x[None], row))[0]

    per_datum = jax.vmap(jax.grad(term), in_axes=(None, 0))(one, posterior.data)
    expected = jax.grad(lambda q: posterior.log_likelihood(q, posterior.data).sum())(one)
    for name, g in per_datum.items():
        np.testing.assert_allclose(g.sum(0), expected[name], rtol=1e-9, atol=1e-12)


def test_a_plate_without_subsample_size_can_be_named():
    def model(x, y):
        slope = numpyro.sample("slope", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        with numpyro.plate("rows", x.shape[0]) as i:
            numpyro.sample("y", dist.Normal(x[i] @ slope, 1.0), obs=y[i])

    by_index = erg.from_numpyro(model, x=ARRAYS["x"], y=ARRAYS["y"], plate="rows")
    by_row = erg.from_numpyro(model, data={"x": ARRAYS["x"], "y": ARRAYS["y"]}, plate="rows")
    position = by_row.start(jax.random.key(0))
    np.testing.assert_allclose(by_index.log_density(position), by_row.log_density(position), rtol=1e-12)


def test_arguments_by_position_are_taken():
    by_position = erg.from_numpyro(linear, args=(ARRAYS["x"], ARRAYS["y"]), n=BATCH)
    by_name = posterior_of(CASES["linear"], "A")
    position = by_name.start(jax.random.key(0))
    assert by_position.log_density(position) == by_name.log_density(position)


@pytest.mark.parametrize("pattern", ["A", "B"])
def test_same_model_and_shapes_do_not_trace_again(pattern):
    traces = []

    def model(x, y, n=None):
        traces.append(1)
        linear(x, y, n)

    @jax.jit
    def log_density(posterior, position):
        return posterior.log_density(position)

    case = Case(model, ("x", "y"), {"y": 0})
    first = posterior_of(case, pattern)
    moved = {**case.arguments(pattern)}
    if pattern == "A":
        moved["y"] = ARRAYS["y"] + 1
    else:
        moved["data"] = {"x": ARRAYS["x"], "y": ARRAYS["y"] + 1}
    second = erg.from_numpyro(model, **moved)
    position = first.start(jax.random.key(0))
    value = log_density(first, position)
    before = len(traces)
    other = log_density(second, position)
    assert len(traces) == before
    assert value != other
    np.testing.assert_allclose(other, second.log_density(position), rtol=1e-12)


def test_data_are_leaves():
    posterior = posterior_of(CASES["linear"], "A")
    shapes = [leaf.shape for leaf in jax.tree.leaves(posterior)]
    assert (N, 3) in shapes
    jaxpr = jax.make_jaxpr(lambda p, q: p.log_density(q))(posterior, posterior.start(jax.random.key(0)))
    assert all(np.size(constant) < N for constant in jaxpr.consts)

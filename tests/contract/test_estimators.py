"""The checks that every gradient estimator goes through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core.gradient import AbstractGradientEstimator
from tests.contract.black_box_table import BLACK_BOX
from tests.contract.checks import abstract, assert_close, assert_equal, differ
from tests.contract.em_table import EM
from tests.contract.table import ESTIMATORS, NUM_DATA, POSITIONS, Counter, posterior_of
from tests.contract.test_flow_gradients import public as flow_gradients

NUM_CALLS = 5
ROWS = [*ESTIMATORS, *BLACK_BOX, *EM]

SWEPT = ("DataParallel-full",)
"""Slow, and the same class as the row before it."""
every_estimator = pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.sweep) if row.label in SWEPT else row for row in ROWS],
    ids=lambda row: row.label,
)
every_position = pytest.mark.parametrize("structure", POSITIONS)


def away():
    """A position other than the initial one, where control variates that are centred there have no noise."""
    return jax.tree.map(lambda x: 1.5 - x, POSITIONS["dict"]())


def calls(estimator, key, params):
    """A few estimates in a scan."""
    key_init, key_steps = jax.random.split(key)

    def body(state, i):
        estimate, state = estimator.estimate(jax.random.fold_in(key_steps, i), params, state)
        return state, (estimate.gradient, estimate.value, state)

    return jax.lax.scan(body, estimator.init(key_init, params), jnp.arange(NUM_CALLS))[1]


run = jax.jit(calls)


@jax.jit
def estimate_once(estimator, key, params, state):
    return estimator.estimate(key, params, state)


@jax.jit
def probe_once(estimator, key, params, state):
    return estimator.probe(key, params, state)


def calls_in_python(estimator, key, params, estimate_once):
    key_init, key_steps = jax.random.split(key)
    state, path = estimator.init(key_init, params), []
    for i in range(NUM_CALLS):
        estimate, state = estimate_once(estimator, jax.random.fold_in(key_steps, i), params, state)
        path.append((estimate.gradient, estimate.value, state))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *path)


def test_table_is_complete():
    """The estimators of variational objectives and of flows have contracts of their own."""
    elsewhere = {"VariationalGradient", "ExactGradient"} | flow_gradients()
    assert {row.name for row in ROWS} | elsewhere == {
        name
        for name in erg.estimators.__all__
        if isinstance(getattr(erg.estimators, name), type)
        and issubclass(getattr(erg.estimators, name), AbstractGradientEstimator)
    }
    assert len({row.label for row in ROWS}) == len(ROWS)


@every_estimator
def test_scan_equals_loop_equals_eager(row):
    estimator, params, key = row.make(posterior_of("dict")), POSITIONS["dict"](), jax.random.key(1)
    scanned = run(estimator, key, params)
    assert_close(calls_in_python(estimator, key, params, estimate_once), scanned)
    assert_close(calls_in_python(estimator, key, params, lambda e, *args: e.estimate(*args)), scanned)


@every_estimator
def test_mapped_is_one_by_one(row):
    estimator = row.make(posterior_of("dict"))
    keys = jax.random.split(jax.random.key(2), 3)
    params = [jax.tree.map(lambda x, scale=scale: scale * x, POSITIONS["dict"]()) for scale in (1.0, -2.0, 0.5)]
    together = jax.vmap(run, in_axes=(None, 0, 0))(estimator, keys, jax.tree.map(lambda *xs: jnp.stack(xs), *params))
    alone = [run(estimator, key, theta) for key, theta in zip(keys, params, strict=True)]
    assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone))


@every_estimator
def test_keys_decide(row):
    estimator, params = row.make(posterior_of("dict")), away()
    first = run(estimator, jax.random.key(3), params)
    assert_equal(run(estimator, jax.random.key(3), params), first)
    others = [run(estimator, jax.random.key(i), params)[1] for i in range(4, 10)]
    assert any(differ(first[1], other) for other in others) == row.random


@every_position
@every_estimator
def test_structure_is_kept(row, structure):
    estimator, params = row.make(posterior_of(structure)), POSITIONS[structure]()
    state = jax.eval_shape(estimator.init, jax.random.key(0), params)
    estimate, after = jax.eval_shape(estimator.estimate, jax.random.key(1), params, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert abstract(after) == abstract(state)
    assert abstract(estimate.gradient) == abstract(jax.eval_shape(lambda: params))
    assert estimate.value.shape == ()
    assert not estimate.value.weak_type
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))


@pytest.mark.usefixtures("x64")
@every_estimator
def test_double_precision(row):
    estimator, params = row.make(posterior_of("dict")), POSITIONS["dict"]()
    gradient, value, _ = jax.eval_shape(run, estimator, jax.random.key(1), params)
    assert {x.dtype for x in jax.tree.leaves((gradient, value))} == {jnp.dtype("float64")}


@every_estimator
def test_one_trace_serves_all_data_of_one_shape(row):
    counter = Counter()
    posterior = posterior_of("array", counter=counter)
    other = jax.tree.map(lambda x: x, posterior)
    other.data = jax.tree.map(lambda x: x + 1.0, posterior.data)
    traced = jax.jit(lambda e, key, params: e.estimate(key, params, e.init(key, params))[0].gradient)
    first, second = row.make(posterior), row.make(other)
    before = counter.traces
    program = traced.lower(first, jax.random.key(0), POSITIONS["array"]()).as_text()
    once = counter.traces - before
    assert traced.lower(second, jax.random.key(0), POSITIONS["array"]()).as_text() == program
    assert counter.traces - before == once > 0
    assert differ(first, second)


@pytest.mark.usefixtures("key_reuse_checker")
@every_estimator
def test_no_key_is_used_twice(row):
    estimator = row.make(posterior_of("dict"))

    def use(estimator, key, params):
        key_init, key_first, key_second, key_probe = jax.random.split(key, 4)
        state = estimator.init(key_init, params)
        _, state = estimator.estimate(key_first, params, state)
        estimate, state = estimator.estimate(key_second, params, state)
        return estimate.gradient, estimator.probe(key_probe, params, state)

    jax.jit(use).trace(estimator, jax.random.key(0), POSITIONS["dict"]())


@every_estimator
def test_probe_leaves_the_state_alone(row):
    estimator, params = row.make(posterior_of("dict")), away()
    state = estimator.init(jax.random.key(0), params)
    before, after = estimate_once(estimator, jax.random.key(1), params, state)
    probes = [probe_once(estimator, jax.random.key(i), params, state) for i in range(8)]
    assert all((probe is not None) == row.probes for probe in probes)
    assert (len({float(p.value) for p in probes if p is not None}) > 1) == (row.random and row.probes)
    assert_equal(estimate_once(estimator, jax.random.key(1), params, state), (before, after))


@pytest.mark.usefixtures("x64")
@every_estimator
def test_unbiased(row):
    """Probes are independent: their mean over 2,000 keys against the full gradient; sees a missing N/n at once.

    Estimators without probes are seen at their first call.
    """
    posterior, params = posterior_of("array"), jnp.array([1.0, 2.0])
    estimator = row.make(posterior)
    state = estimator.init(jax.random.key(0), params)
    keys = jax.random.split(jax.random.key(6), 2_000)

    @jax.jit
    def independent(estimator, keys, state):
        if row.probes:
            return jax.vmap(lambda key: estimator.probe(key, params, state).gradient)(keys)
        return jax.vmap(lambda key: estimator.estimate(key, params, state)[0].gradient)(keys)

    gradients = np.asarray(independent(estimator, keys, state))
    exact = np.asarray(jax.grad(posterior.log_density)(params))
    if estimator.exact:
        np.testing.assert_allclose(gradients, np.broadcast_to(exact, gradients.shape), rtol=1e-12)
    else:
        error = gradients.std(axis=0) / np.sqrt(len(keys))
        assert np.all(5 * error < 0.15 * np.linalg.norm(exact))
        assert np.all(np.abs(gradients.mean(axis=0) - exact) < 5 * error) == row.unbiased


@every_estimator
def test_streamed_batches(row):
    """All the data handed over give the full gradient, leave the state alone, and are counted."""
    posterior, params = posterior_of("array"), jnp.array([1.0, 2.0])
    estimator = row.make(posterior)
    state = estimator.init(jax.random.key(0), params)
    if not row.streams:
        with pytest.raises(ValueError, match="takes no batch that is handed over"):
            estimator.estimate(jax.random.key(1), params, state, posterior.data)
        return
    estimate, after = estimator.estimate(jax.random.key(1), params, state, posterior.data)
    if row.unbiased and not row.random_directions:
        assert_close(estimate.gradient, jax.grad(posterior.log_density)(params))
    assert_equal(after, state)
    assert int(estimate.n_grad) % NUM_DATA == 0


@every_estimator
def test_posterior_without_data(row):
    streamed, params = posterior_of("array", with_data=False), POSITIONS["array"]()
    if not row.takes_posterior:
        assert row.make(posterior_of("array")).posterior is None
        return
    if not row.works_without_data:
        with pytest.raises(ValueError, match="all the data"):
            row.make(streamed)
        return
    estimator = row.make(streamed)
    state = estimator.init(jax.random.key(0), params)
    assert estimator.probe(jax.random.key(1), params, state) is None
    assert not row.draws_without_data
    with pytest.raises(ValueError, match=r"holds no data.*give batch="):
        estimator.estimate(jax.random.key(1), params, state)


@every_estimator
def test_bad_input_raises(row):
    make, error, message = row.bad_input
    with pytest.raises(error, match=message):
        make(posterior_of("array"))


@every_estimator
def test_describes_itself(row):
    posterior = posterior_of("array")
    estimator = row.make(posterior)
    assert isinstance(estimator, AbstractGradientEstimator)
    assert type(estimator).__name__ in repr(estimator)
    assert (estimator.posterior is posterior) != row.adapts_posterior
    assert estimator.exact == (not row.random)
    assert erg.cite(estimator).startswith("@")

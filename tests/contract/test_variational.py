"""The checks that every estimator for sample sites, and every variational objective, goes through."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest

import ergodica as erg
from ergodica.core import tree
from ergodica.estimators.variational.objectives.objective import AbstractObjective
from tests.contract.checks import abstract, assert_close, assert_equal, differ
from tests.contract.table import Counter
from tests.contract.variational_table import OBJECTIVES, SITES, case_of, gradient_of, loss_of, program
from tests.support.exact_programs import exact_elbo, exact_iwelbo
from tests.support.replicates import exact_gradient
from tests.support.statistics import THRESHOLD, standard_error

pytestmark = pytest.mark.usefixtures("numpyro_promotion")
every_site = pytest.mark.parametrize(
    "row", [pytest.param(row, marks=pytest.mark.slow) if row.slow else row for row in SITES], ids=lambda row: row.label
)
every_objective = pytest.mark.parametrize("row", OBJECTIVES, ids=lambda row: row.label)
SPOKESMEN = ("LeaveOneOut", "Score-moving-average", "Enumerate", "Reparam-stl")
some_sites = pytest.mark.parametrize(
    "row",
    [row if row.label in SPOKESMEN else pytest.param(row, marks=pytest.mark.sweep) for row in SITES],
    ids=lambda row: row.label,
)
"""What is slow, and the same code for all: one row for each way in which a site is run speaks for the others."""
NUM_CALLS = 3


def public(kind):
    values = {name: getattr(erg.estimators, name) for name in erg.estimators.__all__}
    return {name for name, value in values.items() if isinstance(value, type) and issubclass(value, kind)}


def test_table_is_complete():
    assert {row.name for row in SITES} == public(erg.estimators.AbstractSiteEstimator) - {"AbstractSiteEstimator"}
    assert {row.name for row in OBJECTIVES} == public(AbstractObjective)
    assert len({row.label for row in SITES}) == len(SITES)


def calls(estimator, key, params):
    """A few estimates in a scan, and what is remembered."""
    key_init, key_steps = jax.random.split(key)

    def body(state, i):
        estimate, state = estimator.estimate(jax.random.fold_in(key_steps, i), params, state)
        return state, (estimate.gradient, estimate.value, state)

    return jax.lax.scan(body, estimator.init(key_init, params), jnp.arange(NUM_CALLS))[1]


run = jax.jit(calls)


@every_site
@pytest.mark.swept_after(10)
def test_keys_decide(row):
    case = case_of(row)
    estimator, keys = gradient_of(row, case), jax.random.split(jax.random.key(1), 2)
    first = run(estimator, keys[0], case.params)
    assert_equal(run(estimator, keys[0], case.params), first)
    assert differ(run(estimator, keys[1], case.params), first)


@some_sites
def test_mapped_equals_single(row):
    case = case_of(row)
    estimator, keys = gradient_of(row, case), jax.random.split(jax.random.key(1), 2)
    together = jax.vmap(run, in_axes=(None, 0, None))(estimator, keys, case.params)
    assert_close(jax.tree.map(lambda x: x[0], together), run(estimator, keys[0], case.params))


@some_sites
@pytest.mark.swept_after(2)
def test_scan_equals_eager_loop(row):
    case = case_of(row)
    estimator = gradient_of(row, case)
    key_init, key_steps = jax.random.split(jax.random.key(1))
    state, path = estimator.init(key_init, case.params), []
    for i in range(NUM_CALLS):
        estimate, state = estimator.estimate(jax.random.fold_in(key_steps, i), case.params, state)
        path.append((estimate.gradient, estimate.value, state))
    assert_close(jax.tree.map(lambda *leaves: jnp.stack(leaves), *path), run(estimator, jax.random.key(1), case.params))


@every_site
def test_structure_is_kept_and_states_hold_no_keys(row):
    case = case_of(row)
    estimator = gradient_of(row, case)
    state = jax.eval_shape(estimator.init, jax.random.key(0), case.params)
    estimate, after = jax.eval_shape(estimator.estimate, jax.random.key(1), case.params, state)
    assert abstract(after) == abstract(state)
    assert abstract(estimate.gradient) == abstract(jax.eval_shape(lambda: case.params))
    assert estimate.value.shape == ()
    assert bool(jax.tree.leaves(state)) == row.remembers
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))


@pytest.mark.usefixtures("x64")
@every_site
def test_double_precision_and_unbiased(row):
    """Mean of 4,000 estimates against enumeration and quadrature; a state is that of three steps before."""
    case = case_of(row)
    estimator, make_exact = gradient_of(row, case), exact_elbo if loss_of(row).linear else exact_iwelbo
    if not loss_of(row).linear:  # the exact bound is that of two particles
        estimator = erg.estimators.VariationalGradient(loss_of(row, 2), case.model, case.guide, *case.args)
    exact = exact_gradient(program, make_exact)
    state = {}
    if row.remembers:
        state = jax.tree.map(lambda x: x[-1], run(estimator, jax.random.key(3), case.params)[2])

    of_the_guide = program().params

    def one(key):
        estimate = estimator.probe(key, case.params, state)
        return tree.ravel({name: estimate.gradient[name] for name in of_the_guide}), estimate.value

    gradients, values = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(4), 4_000))
    assert gradients.dtype == values.dtype == jnp.float64
    error = standard_error(gradients) + 1e-13
    value = float(make_exact(program(), of_the_guide))
    if row.right_value:
        assert abs(float(values.mean()) - value) < THRESHOLD * float(standard_error(values)) + 1e-12
    z = (np.asarray(gradients).mean(axis=0) - exact) / error
    assert (np.max(np.abs(z)) < THRESHOLD) == (row.unbiased or not row.shows_bias)
    assert THRESHOLD * np.max(error) < 0.5 * np.max(np.abs(exact))


@every_site
@pytest.mark.swept_after(8)
def test_one_trace_serves_all_data_of_one_shape(row):
    """Data are arguments of the compiled program: neither constants of it nor a part of its structure."""
    counter = Counter()
    case = case_of(row, counter)
    traced = jax.jit(lambda e, key, params: e.estimate(key, params, e.init(key, params))[0].gradient)
    first = gradient_of(row, case)
    second = erg.estimators.VariationalGradient(first.loss, case.model, case.guide, jnp.array(2.5))
    arguments = {"key": jax.random.key(0), "params": case.params}
    program_text = traced.lower(first, **arguments).as_text()
    once = counter.traces
    assert traced.lower(second, **arguments).as_text() == program_text
    assert counter.traces == once > 0
    assert any(leaf is second.args[0] for leaf in jax.tree.leaves(second))


@some_sites
def test_goes_into_svi(row):
    """One compiled step of SVI moves the parameters, and the loss is the objective's negative value."""
    case, loss = case_of(row), loss_of(row)
    if row.remembers:
        svi = numpyro.infer.SVI(case.model, case.guide, optax.sgd(0.1), loss)
        state = svi.init(jax.random.key(0), *case.args)
        with pytest.raises(erg.estimators.SiteError, match=r"loss\.guide\(model, guide\)"):
            svi.update(state, *case.args)
    guide = loss.guide(case.model, case.guide) if row.remembers else case.guide
    svi = numpyro.infer.SVI(case.model, guide, optax.sgd(0.1), loss)
    state = svi.init(jax.random.key(0), *case.args)
    update = jax.jit(svi.update)
    after, value = update(state, *case.args)
    after, _ = update(after, *case.args)
    assert jnp.isfinite(value)
    assert differ(svi.get_params(after), svi.get_params(state))
    if row.remembers:
        assert differ(after.mutable_state, state.mutable_state)


@every_site
def test_refuses_what_it_cannot_do(row):
    if row.refused is None:
        return
    site, objective, num_particles, words = row.refused
    case, loss = program(), objective(num_particles, {site: row.make()})
    with pytest.raises(erg.estimators.SiteError, match=words) as caught:
        loss.plan(case.model, case.guide, *case.args)
    assert f"at site '{site}'" in str(caught.value)
    assert "Use " in str(caught.value)


@every_site
def test_describes_itself(row):
    case = case_of(row)
    estimator, plan = gradient_of(row, case), loss_of(row).plan(case.model, case.guide, *case.args)
    (at_site,) = [r for r in plan.rows if r.site == row.site]
    assert at_site.estimator.startswith(row.name)
    assert at_site.unbiased == row.unbiased
    assert row.name in repr(estimator)
    assert erg.cite(row.make()).startswith("@")
    with pytest.raises(ValueError, match="takes no batch that is handed over"):
        estimator.estimate(jax.random.key(0), case.params, {}, batch=case.args)


@pytest.mark.usefixtures("key_reuse_checker")
@every_objective
def test_no_key_is_used_twice(row):
    case = program()
    estimator = erg.estimators.VariationalGradient(row.make(2), case.model, case.guide, *case.args)
    traced = jax.jit(lambda e, key, params: e.estimate(key, params, {})[0].gradient)
    traced.trace(estimator, jax.random.key(0), case.params)


@every_objective
def test_bad_input_raises(row):
    make, error, message = row.bad_input
    with pytest.raises(error, match=message):
        make()
    assert erg.cite(row.make(2)).startswith("@")

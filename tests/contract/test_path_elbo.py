"""The checks that every variational loss goes through, on a program whose guide is a flow."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import transforms as nt

import ergodica as erg
from ergodica.estimators.variational.objectives.loss import AbstractLoss
from tests.contract.checks import abstract, assert_close, assert_equal, differ
from tests.contract.table import Counter
from tests.contract.test_score_climbing import ROWS
from tests.contract.test_variational import NUM_CALLS, calls, public, run
from tests.contract.variational_table import OBJECTIVES

pytestmark = pytest.mark.usefixtures("numpyro_promotion")


def gradient_of(x=1.5, counter=None):
    """A flow with a parameter at each part, and a parameter of the model."""

    def model(x):
        if counter is not None:
            counter.traces += 1
        w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(w[0] + w[1], jnp.exp(numpyro.param("log_scale", jnp.zeros(())))), obs=x)

    def guide(x):
        loc, tril = numpyro.param("loc", jnp.zeros(2)), numpyro.param("tril", jnp.eye(2))
        parts = [nt.LowerCholeskyAffine(loc, tril), nt.PermuteTransform(jnp.array([1, 0]))]
        numpyro.sample("w", dist.TransformedDistribution(dist.Normal(jnp.zeros(2), 1).to_event(1), parts))

    return erg.estimators.VariationalGradient(erg.estimators.PathELBO(2), model, guide, jnp.asarray(x))


def test_table_is_complete():
    others = {row.name for row in ROWS} | {row.name for row in OBJECTIVES}
    assert public(AbstractLoss) == others | {"PathELBO"}


def test_keys_decide_and_maps_and_loops_agree():
    estimator, keys = gradient_of(), jax.random.split(jax.random.key(1), 2)
    params = estimator.start(jax.random.key(0))
    first = run(estimator, keys[0], params)
    assert_equal(run(estimator, keys[0], params), first)
    assert differ(run(estimator, keys[1], params), first)
    together = jax.vmap(run, in_axes=(None, 0, None))(estimator, keys, params)
    assert_close(jax.tree.map(lambda x: x[0], together), first)
    key_steps = jax.random.split(keys[0])[1]
    path = [estimator.estimate(jax.random.fold_in(key_steps, i), params, {})[0] for i in range(NUM_CALLS)]
    path = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[(e.gradient, e.value, {}) for e in path])
    assert_close(path, first)


@pytest.mark.parametrize("double", [False, True])
def test_structure_and_precision_are_kept(double):
    with jax.enable_x64(double):
        estimator = gradient_of()
        params = estimator.start(jax.random.key(0))
        estimate, after = jax.eval_shape(estimator.estimate, jax.random.key(1), params, {})
        assert after == estimator.init(jax.random.key(0), params) == {}
        assert abstract(estimate.gradient) == abstract(params)
        assert estimate.value.shape == ()
        assert estimate.value.dtype == jnp.result_type(float)


def test_one_trace_serves_all_data_of_one_shape():
    counter = Counter()
    first = gradient_of(counter=counter)
    second = erg.estimators.VariationalGradient(first.loss, first.model, first.guide, jnp.array(2.5))
    params = first.start(jax.random.key(0))
    counter.traces = 0
    traced = jax.jit(lambda e, key, params: e.estimate(key, params, {})[0].gradient)
    text = traced.lower(first, jax.random.key(0), params).as_text()
    once = counter.traces
    assert traced.lower(second, jax.random.key(0), params).as_text() == text
    assert counter.traces == once > 0


@pytest.mark.usefixtures("key_reuse_checker")
def test_no_key_is_used_twice():
    estimator = gradient_of()
    params = jax.eval_shape(estimator.start, jax.random.key(0))
    jax.eval_shape(calls, estimator, jax.random.key(0), params)


def test_describes_itself_and_takes_no_batch_and_any_budget():
    estimator = gradient_of()
    assert "PathELBO" in repr(estimator)
    assert "vaitl2024" in erg.cite(estimator.loss)
    with pytest.raises(ValueError, match="takes no batch that is handed over"):
        estimator.estimate(jax.random.key(0), estimator.start(jax.random.key(0)), {}, batch=(jnp.zeros(()),))
    assert estimator.with_budget(8).loss.num_particles == 8

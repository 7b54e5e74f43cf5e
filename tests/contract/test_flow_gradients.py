"""The checks of gradient estimators, for those whose parameters are a flow's."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core import tree
from ergodica.core.types import Batch
from ergodica.estimators.flows import gradient as flow_gradient
from tests.contract.checks import abstract, assert_close, assert_equal, differ
from tests.contract.table import Counter
from tests.support.flows import bent_flow, target
from tests.support.quadrature import exact_moments
from tests.support.statistics import assert_mean

NUM_CALLS = 3


class Target(eqx.Module):
    """Data as leaves, and a count of traces."""

    centre: jax.Array
    counter: Counter | None = eqx.field(static=True, default=None)

    def log_density(self, x):
        if self.counter is not None:
            self.counter.traces += 1
        return target(x - self.centre)


def centred(counter=None):
    return Target(jnp.zeros(2), counter)


def draws():
    return jnp.linspace(-1.0, 1.5, 10).reshape(5, 2)


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    label: str
    make: Callable[..., Any]
    bad_input: tuple[Callable[[], Any], str]
    streams: bool = False
    traces_target: bool = True


def path(t=None, **options):
    return erg.estimators.PathGradient(bent_flow(), centred() if t is None else t, num_samples=4, **options)


def path_forward(t=None, **options):
    return path(t, direction="forward", draws=draws(), **options)


ROWS = [
    Row("PathGradient", "path-reverse", path, (lambda: path(passes=3), "passes must be between 1 and 2; got 3")),
    Row(
        "PathGradient",
        "path-forward",
        path_forward,
        (lambda: path(direction="forward"), "draws= of the target"),
        streams=True,
        traces_target=False,
    ),
    Row(
        "ReverseKL",
        "reverse-kl",
        lambda t=None: erg.estimators.ReverseKL(bent_flow(), centred() if t is None else t, 4),
        (lambda: erg.estimators.ReverseKL(bent_flow(), target, -1), "num_samples must be at least 1; got -1"),
    ),
    Row(
        "MaximumLikelihood",
        "maximum-likelihood",
        lambda t=None: erg.estimators.MaximumLikelihood(bent_flow(), draws(), 4),
        (lambda: erg.estimators.MaximumLikelihood(bent_flow(), jnp.zeros(3)), "draws must be an array"),
        streams=True,
        traces_target=False,
    ),
]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)


def public():
    """Public names of the estimators for flows."""
    return {
        name
        for name in erg.estimators.__all__
        if isinstance(getattr(erg.estimators, name), type)
        and issubclass(getattr(erg.estimators, name), flow_gradient.AbstractFlowGradient)
    }


def test_table_is_complete():
    assert {row.name for row in ROWS} == public()


def calls(estimator, key, params):
    """A few estimates in a scan."""
    key_init, key_steps = jax.random.split(key)

    def body(state, i):
        estimate, state = estimator.estimate(jax.random.fold_in(key_steps, i), params, state)
        return state, (estimate.gradient, estimate.value, estimate.aux)

    return jax.lax.scan(body, estimator.init(key_init, params), jnp.arange(NUM_CALLS))[1]


run = jax.jit(calls)


@every_row
def test_scan_equals_eager_and_mapped(row):
    estimator, keys = row.make(), jax.random.split(jax.random.key(1), 2)
    alone = [run(estimator, key, estimator.params) for key in keys]
    key_init, key_steps = jax.random.split(keys[0])
    eager = [
        estimator.estimate(jax.random.fold_in(key_steps, i), estimator.params, estimator.init(key_init, None))[0]
        for i in range(NUM_CALLS)
    ]
    eager = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[(e.gradient, e.value, e.aux) for e in eager])
    assert_close(eager, alone[0])
    together = jax.vmap(run, in_axes=(None, 0, None))(estimator, keys, estimator.params)
    assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone))
    assert_equal(run(estimator, keys[0], estimator.params), alone[0])
    assert differ(alone[0][1], alone[1][1])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_row
def test_structure_and_precision_are_kept(row, dtype):
    """Single precision stays single where double is allowed."""
    estimator = jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, row.make())
    estimate, after = jax.eval_shape(
        lambda e, key: e.estimate(key, e.params, e.init(key, e.params)), estimator, jax.random.key(0)
    )
    assert after is None
    assert jax.tree.structure(estimate.gradient) == jax.tree.structure(estimator.params)
    assert abstract(estimate.gradient) == abstract(estimator.params)
    assert (estimate.value.shape, estimate.value.dtype) == ((), jnp.dtype(dtype))


@every_row
def test_one_trace_serves_all_targets_of_one_shape(row):
    counter, traces = Counter(), []
    first, second = row.make(centred(counter)), row.make(Target(jnp.ones(2), counter))
    traced = jax.jit(lambda e, key: traces.append(1) or e.estimate(key, e.params, None)[0].gradient)
    before = counter.traces
    outputs = [traced(e, jax.random.key(0)) for e in (first, second)]
    assert len(traces) == 1
    assert (counter.traces > before) == row.traces_target
    if row.traces_target:
        assert differ(outputs[0], outputs[1])


@pytest.mark.usefixtures("key_reuse_checker")
@every_row
def test_no_key_is_used_twice(row):
    estimator = row.make()

    def use(estimator, key):
        key_init, key_estimate, key_probe = jax.random.split(key, 3)
        state = estimator.init(key_init, estimator.params)
        return estimator.estimate(key_estimate, estimator.params, state), estimator.probe(
            key_probe, estimator.params, state
        )

    jax.jit(use)(estimator, jax.random.key(0))


@pytest.mark.usefixtures("x64")
@every_row
def test_unbiased(row):
    """Over 2,000 keys against the mean by quadrature, or over the table of draws."""
    estimator = row.make()
    keys = jax.random.split(jax.random.key(6), 2_000)
    one = jax.jit(jax.vmap(lambda e, key: tree.ravel(e.estimate(key, e.params, None)[0].gradient), (None, 0)))
    if row.streams:
        whole = Batch(draws(), jnp.full(5, 0.2))
        exact = np.asarray(tree.ravel(estimator.estimate(keys[0], estimator.params, None, whole)[0].gradient))
    else:
        exact, _ = exact_moments(estimator.with_budget(1), estimator.params, 2, 30)
    assert_mean(np.asarray(one(estimator, keys)), exact, smallest_error=0.2)


@every_row
def test_batches_are_taken_or_refused(row):
    estimator, batch = row.make(), Batch(draws()[:2], jnp.array([0.5, 0.5]))
    if not row.streams:
        with pytest.raises(ValueError, match="takes no batch that is handed over"):
            estimator.estimate(jax.random.key(0), estimator.params, None, batch)
        return
    estimate, _ = estimator.estimate(jax.random.key(0), estimator.params, None, batch)
    assert estimate.n_grad == 2


@every_row
def test_bad_input_raises(row):
    make, message = row.bad_input
    with pytest.raises(ValueError, match=message):
        make()


@every_row
def test_describes_itself(row):
    estimator = row.make()
    assert type(estimator).__name__ in repr(estimator)
    assert estimator.posterior is None
    assert erg.cite(estimator).startswith("@")
    assert_equal(estimator.flow(estimator.params).params, estimator.params)

"""The checks that every loss with chains of its own goes through, on the program of the sites' contract."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import optax
import pytest

import ergodica as erg
from ergodica.estimators.variational.objectives.loss import AbstractLoss
from tests.contract.checks import abstract, assert_close, assert_equal, differ
from tests.contract.table import Counter
from tests.contract.test_variational import NUM_CALLS, calls, public, run
from tests.contract.variational_table import OBJECTIVES, program

pytestmark = pytest.mark.usefixtures("numpyro_promotion")


@dataclasses.dataclass(frozen=True)
class ClimbingRow:
    name: str
    """The public name in `ergodica.estimators`."""
    make: Callable[..., Any]
    label: str
    bad_input: tuple[Callable[[], Any], type[Exception], str]


_msc, _jsa = erg.estimators.MarkovianScoreClimbing, erg.estimators.JointStochasticApproximation
ROWS = [
    ClimbingRow(
        "MarkovianScoreClimbing", lambda: _msc(4), "MSC", (lambda: _msc(0), ValueError, "must be at least 1; got 0")
    ),
    ClimbingRow(
        "JointStochasticApproximation",
        lambda: _jsa(2, num_warmup=1),
        "JSA",
        (lambda: _jsa(1, num_warmup=-1), ValueError, "num_warmup must be at least 0; got -1"),
    ),
]
every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
one_row = pytest.mark.parametrize(
    "row", [ROWS[0], pytest.param(ROWS[1], marks=pytest.mark.sweep)], ids=lambda row: row.label
)
"""What compiles for long: the rows share all code but the kernel's own move."""


def gradient_of(row, case):
    return erg.estimators.VariationalGradient(row.make(), case.model, case.guide, *case.args)


def test_table_is_complete():
    assert {row.name for row in ROWS} | {row.name for row in OBJECTIVES} == public(AbstractLoss) - {"PathELBO"}


@one_row
def test_keys_decide_and_maps_and_loops_agree(row):
    case = program()
    estimator, keys = gradient_of(row, case), jax.random.split(jax.random.key(1), 2)
    first = run(estimator, keys[0], case.params)
    assert_equal(run(estimator, keys[0], case.params), first)
    assert differ(run(estimator, keys[1], case.params), first)
    together = jax.vmap(run, in_axes=(None, 0, None))(estimator, keys, case.params)
    assert_close(jax.tree.map(lambda x: x[0], together), first)


@pytest.mark.sweep
@every_row
def test_scan_equals_eager_loop(row):
    case = program()
    estimator = gradient_of(row, case)
    key_init, key_steps = jax.random.split(jax.random.key(1))
    state, path = estimator.init(key_init, case.params), []
    for i in range(NUM_CALLS):
        estimate, state = estimator.estimate(jax.random.fold_in(key_steps, i), case.params, state)
        path.append((estimate.gradient, estimate.value, state))
    assert_close(jax.tree.map(lambda *leaves: jnp.stack(leaves), *path), run(estimator, jax.random.key(1), case.params))


@pytest.mark.parametrize("double", [False, True])
@every_row
def test_structure_and_precision_are_kept_and_states_hold_no_keys(row, double):
    with jax.enable_x64(double):
        case = program()
        estimator = gradient_of(row, case)
        state = jax.eval_shape(estimator.init, jax.random.key(0), case.params)
        estimate, after = jax.eval_shape(estimator.estimate, jax.random.key(1), case.params, state)
        assert abstract(after) == abstract(state)
        assert abstract(estimate.gradient) == abstract(jax.eval_shape(lambda: case.params))
        assert estimate.value.shape == ()
        assert estimate.value.dtype == jnp.result_type(float)
        assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))


@every_row
def test_one_trace_serves_all_data_of_one_shape(row):
    counter = Counter()
    case = program(counter)
    traced = jax.jit(lambda e, key, params: e.estimate(key, params, e.init(key, params))[0].gradient)
    first = gradient_of(row, case)
    second = erg.estimators.VariationalGradient(first.loss, case.model, case.guide, jnp.array(2.5))
    text = traced.lower(first, jax.random.key(0), case.params).as_text()
    once = counter.traces
    assert traced.lower(second, jax.random.key(0), case.params).as_text() == text
    assert counter.traces == once > 0


@pytest.mark.usefixtures("key_reuse_checker")
@every_row
def test_no_key_is_used_twice(row):
    case = program()
    jax.eval_shape(calls, gradient_of(row, case), jax.random.key(0), case.params)
    traced = jax.jit(lambda e, key, params: e.estimate(key, params, e.init(jax.random.key(1), params))[0].gradient)
    traced.trace(gradient_of(row, case), jax.random.key(0), case.params)


@one_row
@pytest.mark.swept_after(1)
def test_goes_into_svi(row):
    """Parameters and chains move; without the declaration SVI is told what to do; probes leave the chains alone."""
    case, loss = program(), row.make()
    svi = numpyro.infer.SVI(case.model, case.guide, optax.sgd(0.1), loss)
    with pytest.raises(ValueError, match=r"use SVI\(model, loss\.guide\(model, guide\)"):
        svi.update(svi.init(jax.random.key(0), *case.args), *case.args)
    svi = numpyro.infer.SVI(case.model, loss.guide(case.model, case.guide), optax.sgd(0.1), loss)
    state = svi.init(jax.random.key(0), *case.args)
    update = jax.jit(svi.update)
    after, value = update(state, *case.args)
    after, _ = update(after, *case.args)
    assert jnp.isfinite(value)
    assert differ(svi.get_params(after), svi.get_params(state))
    assert int(loss.chains(after).step) == 2
    with pytest.raises(ValueError, match=f"holds no chains of {row.name}"):
        loss.chains({})
    estimator = gradient_of(row, case)
    remembered = estimator.init(jax.random.key(0), case.params)
    before = jax.tree.map(lambda x: x.copy(), remembered)
    estimator.probe(jax.random.key(1), case.params, remembered)
    assert_equal(remembered, before)


@every_row
def test_describes_itself(row):
    case, (make, error, message) = program(), row.bad_input
    plan = row.make().plan(case.model, case.guide, *case.args)
    assert str(plan).startswith(row.name)
    assert [(r.site, r.estimator, r.unbiased) for r in plan.rows] == [("z", "chain", False), ("w", "chain", False)]
    assert erg.cite(gradient_of(row, case)).startswith("@")
    with pytest.raises(error, match=message):
        make()
    with pytest.raises(ValueError, match="takes no batch that is handed over"):
        gradient_of(row, case).estimate(jax.random.key(0), case.params, {}, batch=case.args)

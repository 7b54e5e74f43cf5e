"""The checks of `test_kernels.py` that concern kernels without a gradient estimator, and what such a kernel refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core.kernel import AbstractKernel
from ergodica.run.checkpoint import Store
from tests.contract.checks import abstract, assert_close, assert_equal, differ
from tests.contract.density_table import DENSITY_KERNELS, PRESETS
from tests.contract.table import POSITIONS, Counter, posterior_of
from tests.contract.test_kernels import NUM_STEPS, one_step, run, run_in_python

every_kernel = pytest.mark.parametrize("row", DENSITY_KERNELS, ids=lambda row: row.label)
compiled = pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.sweep) if row.label in PRESETS else row for row in DENSITY_KERNELS],
    ids=lambda row: row.label,
)
"""For checks that compile programs: what another row runs with other settings waits for the sweep."""
every_position = pytest.mark.parametrize("structure", POSITIONS)


@compiled
def test_scan_equals_loop_equals_eager(row):
    kernel, position, key = row.make(posterior_of("dict")), POSITIONS["dict"](), jax.random.key(1)
    scanned = run(kernel, key, position)
    assert_close(run_in_python(kernel, key, position, one_step), scanned)
    assert_close(run_in_python(kernel, key, position, lambda k, key, s: k.step(key, s)), scanned)
    # keys decide
    assert_equal(run(kernel, key, position), scanned)
    assert differ(run(kernel, jax.random.key(2), position)[0].position, scanned[0].position)
    assert np.all(np.isfinite(scanned[1].lp))
    assert not np.any(scanned[1].diverging)


@compiled
def test_resumed_from_disk_is_bit_identical(row, tmp_path):
    kernel, key = row.make(posterior_of("dict")), jax.random.key(1)
    state = kernel.init(key, POSITIONS["dict"]())
    state, _ = one_step(kernel, jax.random.fold_in(key, 0), state)
    Store(tmp_path / "run", {"of": row.label}).save({"step": 1}, state, None)
    _, leaves, _ = Store(tmp_path / "run", {"of": row.label}).load()
    back = jax.tree.map(jnp.asarray, jax.tree.unflatten(jax.tree.structure(state), leaves))
    for i in range(1, 4):
        state, info = one_step(kernel, jax.random.fold_in(key, i), state)
        back, info_of_resumed = one_step(kernel, jax.random.fold_in(key, i), back)
    assert_equal(back, state)
    assert_equal(info_of_resumed, info)


@compiled
def test_chains_together_are_chains_one_by_one(row):
    kernel = row.make(posterior_of("array"))
    keys = jax.random.split(jax.random.key(2), 3)
    positions = jnp.array([[0.3, -0.4], [1.0, 2.0], [-0.5, 0.0]])
    together = jax.vmap(run, in_axes=(None, 0, 0))(kernel, keys, positions)
    alone = [run(kernel, key, position) for key, position in zip(keys, positions, strict=True)]
    assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone))


@every_position
@every_kernel
def test_state_is_a_fixed_point_and_info_is_scalar(row, structure):
    kernel, position = row.make(posterior_of(structure)), POSITIONS[structure]()
    state = jax.eval_shape(kernel.init, jax.random.key(0), position)
    after, info = jax.eval_shape(kernel.step, jax.random.key(1), state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert abstract(after) == abstract(state)
    assert abstract(state.position) == abstract(jax.eval_shape(lambda: position))
    assert abstract(kernel.start(jax.random.key(0))) == abstract(position)
    for name, value in info._asdict().items():
        assert value.shape == (), name
        assert not value.weak_type, name
    assert info.n_grad.dtype == jnp.int32
    assert info.diverging.dtype == jnp.bool_


@pytest.mark.usefixtures("x64")
@compiled
def test_double_precision(row):
    kernel, position = row.make(posterior_of("dict")), POSITIONS["dict"]()
    states, infos = run(kernel, jax.random.key(1), position)
    for leaf in jax.tree.leaves((states, infos)):
        assert leaf.dtype in (jnp.float64, jnp.int32, jnp.bool_)
    assert infos.lp.shape == (NUM_STEPS,)


@pytest.mark.usefixtures("x64")
@compiled
def test_single_precision_positions_under_double_precision(row):
    """A float32 position stays float32, and the target is evaluated at what is stored."""
    position = jnp.array([0.3, -0.4], jnp.float32)
    posterior = erg.Posterior(lambda theta: -0.5 * jnp.sum(theta**2), initial=position)
    kernel = row.make(posterior)
    state = kernel.init(jax.random.key(0), position)
    for i in range(4):
        after, _ = one_step(kernel, jax.random.key(i), state)
        assert abstract(after) == abstract(state)
        assert after.log_density == posterior.log_density(after.position)


@compiled
def test_one_trace_serves_other_settings(row):
    counter = Counter()
    posterior = posterior_of("array", counter=counter)
    traced = jax.jit(lambda kernel, key, position: kernel.step(key, kernel.init(key, position)))
    counts = []
    for make in (row.make, row.make, row.other):
        kernel, before = make(posterior), counter.traces
        before = counter.traces  # construction looks at the target's shape
        traced(kernel, jax.random.key(0), POSITIONS["array"]())
        counts.append(counter.traces - before)
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


@pytest.mark.usefixtures("key_reuse_checker")
@compiled
def test_no_key_is_used_twice(row):
    kernel, position = row.make(posterior_of("dict")), POSITIONS["dict"]()

    def two_steps(kernel, key):
        key_start, key_init, key_first, key_second = jax.random.split(key, 4)
        kernel.start(key_start)
        state = kernel.init(key_init, position)
        state, _ = kernel.step(key_first, state)
        return kernel.step(key_second, state)[0].position

    jax.jit(two_steps)(kernel, jax.random.key(0))


@every_kernel
def test_what_it_cannot_do_is_refused(row):
    posterior = posterior_of("array")
    kernel, position = row.make(posterior), POSITIONS["array"]()
    assert kernel.probe(jax.random.key(0), kernel.init(jax.random.key(0), position)) is None
    with pytest.raises(ValueError, match="batch= cannot be handed over"):
        kernel.init(jax.random.key(0), position, posterior.data)
    with pytest.raises(ValueError, match="batch= cannot be handed over"):
        kernel.step(jax.random.key(0), kernel.init(jax.random.key(0), position), posterior.data)
    with pytest.raises(TypeError, match="position must be of floating point; got dtype int32"):
        kernel.init(jax.random.key(0), jnp.arange(2))
    with pytest.raises(ValueError, match=r"position.* must be finite"):
        kernel.init(jax.random.key(0), jnp.array([0.0, jnp.nan]))
    with pytest.raises(ValueError, match="position must have the shape"):
        kernel.init(jax.random.key(0), jnp.zeros(3))


@pytest.mark.parametrize(("make", "kind", "message"), [case for row in DENSITY_KERNELS for case in row.bad_input])
def test_bad_input_raises(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


@every_kernel
def test_describes_itself(row):
    posterior = posterior_of("array")
    kernel = row.make(posterior)
    assert isinstance(kernel, AbstractKernel)
    assert type(kernel).__name__ in repr(kernel)
    assert kernel.posterior is posterior
    assert kernel.exact
    assert kernel.n_grad_unit == posterior.num_data
    assert erg.cite(kernel).startswith("@")
    assert abstract(jax.tree.leaves(kernel)) == abstract(jax.tree.leaves(jax.tree.map(lambda x: x, kernel)))

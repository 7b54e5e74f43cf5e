"""The checks that every kernel goes through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core.kernel import AbstractKernel
from ergodica.run.checkpoint import Store
from tests.contract.checks import abstract, assert_close, assert_equal, differ
from tests.contract.density_table import DENSITY_KERNELS
from tests.contract.table import KERNELS, NUM_DATA, POSITIONS, PRESETS, Counter, kernel_of, posterior_of

NUM_STEPS = 4

every_kernel = pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.label)
compiled = pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.sweep) if row.label in PRESETS else row for row in KERNELS],
    ids=lambda row: row.label,
)
"""For checks that compile programs: presets of one class wait for the sweep, since another row runs the same code."""
every_position = pytest.mark.parametrize("structure", POSITIONS)


@jax.jit
def run(kernel, key, position):
    """Init and a few steps in a scan; the states and infos on the way."""
    key_init, key_steps = jax.random.split(key)

    def body(state, i):
        state, info = kernel.step(jax.random.fold_in(key_steps, i), state)
        return state, (state, info)

    return jax.lax.scan(body, kernel.init(key_init, position), jnp.arange(NUM_STEPS))[1]


@functools.partial(jax.jit, static_argnums=3)
def shown(kernel, key, position, names):
    """The same steps for these fields of the infos alone: the rest of the program is cut before it is compiled."""
    _, infos = run(kernel, key, position)
    return infos._replace(**{name: None for name in infos._fields if name not in names})


@jax.jit
def one_step(kernel, key, state):
    return kernel.step(key, state)


def run_in_python(kernel, key, position, step):
    key_init, key_steps = jax.random.split(key)
    state, path = kernel.init(key_init, position), []
    for i in range(NUM_STEPS):
        state, info = step(kernel, jax.random.fold_in(key_steps, i), state)
        path.append((state, info))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *path)


def test_table_is_complete():
    """Kernels that hold no gradient estimator have a table of their own (`test_density_kernels.py`)."""
    assert {row.name for row in KERNELS} | {row.name for row in DENSITY_KERNELS} == set(erg.samplers.__all__)
    assert len({row.label for row in KERNELS}) == len(KERNELS)


@compiled
def test_scan_equals_loop_equals_eager(row):
    kernel, position, key = kernel_of(row, posterior_of("dict")), POSITIONS["dict"](), jax.random.key(1)
    scanned = run(kernel, key, position)
    assert_close(run_in_python(kernel, key, position, one_step), scanned)
    assert_close(run_in_python(kernel, key, position, lambda k, key, s: k.step(key, s)), scanned)


@compiled
def test_resumed_from_disk_is_bit_identical(row, tmp_path):
    """All that a kernel needs to go on is in the leaves of its state, and they come back from a file as they were."""
    kernel, key = kernel_of(row, posterior_of("dict")), jax.random.key(1)
    state = kernel.init(key, POSITIONS["dict"]())
    for i in range(2):
        state, _ = one_step(kernel, jax.random.fold_in(key, i), state)
    Store(tmp_path / "run", {"of": row.label}).save({"step": 2}, state, None)
    _, leaves, _ = Store(tmp_path / "run", {"of": row.label}).load()
    back = jax.tree.map(jnp.asarray, jax.tree.unflatten(jax.tree.structure(state), leaves))
    for i in range(2, 4):
        state, info = one_step(kernel, jax.random.fold_in(key, i), state)
        back, info_of_resumed = one_step(kernel, jax.random.fold_in(key, i), back)
    assert_equal(back, state)
    assert_equal(info_of_resumed, info)


@compiled
def test_chains_and_step_sizes_together_are_one_by_one(row):
    """Or, where chains know of each other, are not, unless they share a key that is not mapped over."""
    posterior, sizes, keys = posterior_of("dict"), jnp.array([0.01, 0.05, 0.03]), jax.random.split(jax.random.key(2), 3)
    positions = [jax.tree.map(lambda x, scale=scale: scale * x, POSITIONS["dict"]()) for scale in (1.0, -2.0, 0.5)]

    def of(size, key, position):
        return run(kernel_of(row, posterior, step_size=size), key, position)

    def together(keys, axis):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *positions)
        return jax.vmap(of, in_axes=(0, axis, 0))(sizes, keys, stacked)

    def alone(keys):
        paths = [of(size, key, position) for size, key, position in zip(sizes, keys, positions, strict=True)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *paths)

    if row.independent_chains:
        assert_close(together(keys, 0), alone(keys))
    else:
        assert differ(together(keys, 0), alone(keys))
        assert_close(together(keys[0], None), alone([keys[0]] * 3))


@compiled
def test_keys_decide(row):
    kernel, position = kernel_of(row, posterior_of("dict")), POSITIONS["dict"]()
    first = run(kernel, jax.random.key(3), position)
    assert_equal(run(kernel, jax.random.key(3), position), first)
    assert differ(run(kernel, jax.random.key(4), position)[0].position, first[0].position)


@every_position
@every_kernel
def test_state_is_a_fixed_point_and_info_is_scalar(row, structure):
    """Structure, shapes, dtypes and weak types are kept, so that a scan, a donated buffer and a checkpoint can hold it."""
    kernel, position = kernel_of(row, posterior_of(structure)), POSITIONS[structure]()
    state = jax.eval_shape(kernel.init, jax.random.key(0), position)
    after, info = jax.eval_shape(kernel.step, jax.random.key(1), state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert abstract(after) == abstract(state)
    assert abstract(state.position) == abstract(jax.eval_shape(lambda: position))
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))
    for name, value in info._asdict().items():
        assert value.shape == (), name
        assert not value.weak_type, name
    assert info.n_grad.dtype == jnp.int32
    assert info.diverging.dtype == jnp.bool_


@compiled
def test_positions_stay_finite_and_move(row):
    states, infos = run(kernel_of(row, posterior_of("dict")), jax.random.key(5), POSITIONS["dict"]())
    assert not np.any(infos.diverging)
    for leaf in jax.tree.leaves(states.position):
        assert len(set(np.ravel(leaf).tolist())) == NUM_STEPS


@compiled
def test_info_reports_what_was_used(row):
    kernel = kernel_of(row, posterior_of("dict"), temperature=0.5)
    _, infos = run(kernel, jax.random.key(5), POSITIONS["dict"]())
    np.testing.assert_array_equal(infos.step_size, np.float32(0.05))
    np.testing.assert_array_equal(infos.temperature, np.float32(0.5))
    assert np.all(np.asarray(infos.n_grad) >= 2)
    assert np.all(np.isfinite(infos.lp_minibatch))
    assert np.all(np.asarray(infos.grad_norm) > 0)


@compiled
def test_divergence_is_flagged_not_raised(row):
    kernel = kernel_of(row, posterior_of("dict"), step_size=1e30)
    _, infos = run(kernel, jax.random.key(5), POSITIONS["dict"]())
    assert infos.diverging[-1]


@pytest.mark.usefixtures("x64")
@compiled
def test_double_precision(row):
    kernel, position = kernel_of(row, posterior_of("dict")), POSITIONS["dict"]()
    state, info = jax.eval_shape(
        kernel.step, jax.random.key(1), jax.eval_shape(kernel.init, jax.random.key(0), position)
    )
    for leaf in jax.tree.leaves((state, info)):
        assert leaf.dtype in (jnp.float64, jnp.int32, jnp.uint32, jnp.bool_)
    states, _ = jax.eval_shape(run, kernel, jax.random.key(1), position)
    assert {leaf.dtype for leaf in jax.tree.leaves(states.position)} == {jnp.dtype("float64")}


@compiled
def test_single_precision_positions_under_double_precision(row):
    """A float32 position stays float32 where the default is float64."""
    with jax.enable_x64(True):
        position = jnp.array([0.3, -0.4], jnp.float32)
        posterior = erg.Posterior(
            lambda theta: -0.5 * jnp.sum(theta**2),
            None if row.works_without_data else lambda theta, rows: -0.5 * (rows - jnp.sum(theta)) ** 2,
            None if row.works_without_data else jnp.ones(NUM_DATA, jnp.float32),
            initial=position,
        )
        kernel = row.make(erg.estimators.Minibatch(posterior, scheme="full"), 0.05)
        state = jax.eval_shape(kernel.init, jax.random.key(0), position)
        after, _ = jax.eval_shape(kernel.step, jax.random.key(1), state)
        assert after.position.dtype == jnp.float32
        assert abstract(after) == abstract(state)


@compiled
def test_one_trace_serves_other_settings_and_data(row):
    """Neither a second call nor another value of a hyper-parameter or of the data traces the log density again."""
    counter = Counter()
    posterior = posterior_of("array", counter=counter)
    settings = [{}, {}] + [{name: 0.04} for name in row.hyperparameters]
    traced = jax.jit(lambda kernel, key, position: kernel.step(key, kernel.init(key, position)))
    counts = []
    for setting in settings:
        kernel = kernel_of(row, posterior, **setting)
        traced.trace(kernel, jax.random.key(0), POSITIONS["array"]())
        counts.append(counter.traces)
    assert counts[0] > 0
    assert len(set(counts)) == 1


@compiled
def test_schedules(row):
    """A function of the step count: the value that each step used is the one reported."""
    kernel = kernel_of(
        row,
        posterior_of("array"),
        step_size=lambda i: 0.1 / (1.0 + i.astype(float)),
        temperature=lambda i: 0.5 * i.astype(float),
    )
    infos = shown(kernel, jax.random.key(0), POSITIONS["array"](), ("step_size", "temperature"))
    np.testing.assert_allclose(infos.step_size, 0.1 / np.arange(1.0, NUM_STEPS + 1), rtol=1e-6)
    np.testing.assert_allclose(infos.temperature, 0.5 * np.arange(NUM_STEPS), rtol=1e-6)


@pytest.mark.usefixtures("key_reuse_checker")
@compiled
def test_no_key_is_used_twice(row):
    kernel, position = kernel_of(row, posterior_of("dict")), POSITIONS["dict"]()

    def two_steps_and_a_probe(kernel, key, position):
        key_init, key_first, key_second, key_probe = jax.random.split(key, 4)
        state = kernel.init(key_init, position)
        state, _ = kernel.step(key_first, state)
        state, _ = kernel.step(key_second, state)
        return state.position, kernel.probe(key_probe, state)

    jax.jit(two_steps_and_a_probe).trace(kernel, jax.random.key(0), position)


@pytest.mark.usefixtures("key_reuse_checker")
def test_the_checker_sees_a_key_used_twice():
    """Negative control of the test above: a step that takes its gradient and its noise from one key."""
    kernel, position = kernel_of(KERNELS[1], posterior_of("array")), POSITIONS["array"]()

    def careless(kernel, key, position):
        state = kernel.init(key, position)
        estimate, _ = kernel.gradient.estimate(key, position, state.gradient)
        return estimate.gradient + jax.random.normal(key, position.shape)

    with pytest.raises(jax.errors.KeyReuseError):
        jax.jit(careless).trace(kernel, jax.random.key(0), position)


@compiled
def test_probe_leaves_the_chain_alone(row):
    """Its gradient has the structure of the position and another key gives another; the next step is what it was."""
    kernel, position = kernel_of(row, posterior_of("dict")), POSITIONS["dict"]()
    state = kernel.init(jax.random.key(0), position)
    assert row.probes == (kernel.probe(jax.random.key(1), state) is not None)
    if not row.probes:
        return
    before, _ = kernel.step(jax.random.key(2), state)
    probes = [kernel.probe(jax.random.key(i), state) for i in range(8)]
    assert abstract(probes[0].gradient) == abstract(position)
    assert len({float(p.value) for p in probes}) > 1 or kernel.exact_gradient
    assert_equal(kernel.step(jax.random.key(2), state)[0], before)


@every_kernel
def test_streamed_batches(row):
    """Handing over all the data at each step does what the same kernel does with full gradients."""
    if not row.works_without_data:
        with pytest.raises(ValueError, match="all the data"):
            kernel_of(row, posterior_of("array", with_data=False))
        return
    kernel, position = kernel_of(row, posterior_of("array", with_data=False)), POSITIONS["array"]()
    if not row.streams:
        with pytest.raises(ValueError, match="holds no data"):
            kernel.step(jax.random.key(0), kernel.init(jax.random.key(0), position), posterior_of("array").data)
        return
    held = posterior_of("array")
    exact = row.make(erg.estimators.Minibatch(held, scheme="full"), 0.05)

    def two_steps(kernel, batch):
        state = kernel.init(jax.random.key(0), position, batch)
        for i in range(2):
            state, info = kernel.step(jax.random.key(i), state, batch)
        return state.position, info.n_grad

    moved, n_grad = two_steps(kernel, held.data)
    expected, _ = two_steps(exact, None)
    assert_close(moved, expected)
    assert n_grad % NUM_DATA == 0
    with pytest.raises(ValueError, match="holds no data"):
        kernel.step(jax.random.key(0), kernel.init(jax.random.key(0), position))


@every_kernel
def test_bad_input_raises(row):
    posterior = posterior_of("array")
    with pytest.raises(ValueError, match=r"step_size must be finite and above 0; got -0\.1"):
        kernel_of(row, posterior, step_size=-0.1)
    with pytest.raises(TypeError, match="step_size must be a number; got 'fast'"):
        kernel_of(row, posterior, step_size="fast")
    with pytest.raises(ValueError, match="temperature must be finite and at least 0; got nan"):
        kernel_of(row, posterior, temperature=float("nan"))
    with pytest.raises(TypeError, match="gradient must be an AbstractGradientEstimator"):
        row.make(posterior, 0.1)
    kernel = kernel_of(row, posterior)
    with pytest.raises(TypeError, match="position must be of floating point; got dtype int32"):
        kernel.init(jax.random.key(0), jnp.arange(2))
    with pytest.raises(ValueError, match=r"position.* must be finite"):
        kernel.init(jax.random.key(0), jnp.array([0.0, jnp.nan]))
    if "friction" in row.hyperparameters:
        with pytest.raises(ValueError, match="friction must be finite and at least 0; got -1"):
            kernel_of(row, posterior, friction=-1)
        with pytest.raises(ValueError, match="mass must be finite and above 0; got 0"):
            kernel_of(row, posterior, mass=0.0)
        with pytest.raises(ValueError, match="mass must be a scalar or have the structure of the position"):
            kernel_of(row, posterior, mass={"other": 1.0}).init(jax.random.key(0), POSITIONS["array"]())


@every_kernel
def test_describes_itself(row):
    posterior = posterior_of("array")
    kernel = kernel_of(row, posterior)
    assert isinstance(kernel, AbstractKernel)
    assert type(kernel).__name__ in repr(kernel)
    assert kernel.posterior is posterior
    assert kernel.exact_gradient == (row.scheme == "full")
    assert kernel.exact == row.exact
    assert erg.cite(kernel).startswith("@")
    assert abstract(jax.tree.leaves(kernel)) == abstract(jax.tree.leaves(jax.tree.map(lambda x: x, kernel)))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("BAXB", "unknown letters \\['X'\\]"),
        ("BOB", "needs A or U"),
        ("AOA", "needs B"),
        ("BAB", "needs O, U or E"),
        ("", "needs A or U"),
    ],
)
def test_schemes_that_make_no_sampler(scheme, message):
    with pytest.raises(ValueError, match=message):
        erg.samplers.Splitting(scheme, kernel_of(KERNELS[0], posterior_of("array")).gradient, 0.1)


def test_scheme_must_be_a_string():
    with pytest.raises(TypeError, match="scheme must be a string of letters"):
        erg.samplers.Splitting(["B", "A"], kernel_of(KERNELS[0], posterior_of("array")).gradient, 0.1)


@pytest.mark.parametrize(
    ("scheme", "reuse", "gradients"),
    [
        ("BAOA", True, 1),
        ("BAOAB", True, 1),
        ("OBABO", True, 1),
        ("BABO", True, 1),
        ("ABOBA", True, 1),
        ("UBU", True, 1),
        ("AEB", True, 1),
        ("BAOAB", False, 2),
        ("ABOBA", False, 2),
        ("BABAOAB", True, 2),
    ],
)
def test_gradients_a_step(scheme, reuse, gradients):
    """The documented cost: one gradient for each distinct point at which a kick is given."""
    gradient = erg.estimators.Minibatch(posterior_of("array"), scheme="full")
    kernel = erg.samplers.Splitting(scheme, gradient, 0.1, reuse_gradient=reuse)
    infos = shown(kernel, jax.random.key(0), POSITIONS["array"](), ("n_grad",))
    np.testing.assert_array_equal(infos.n_grad, gradients * NUM_DATA)


def test_from_paper_checks_its_step():
    with pytest.raises(ValueError, match="epsilon must be finite and above 0"):
        erg.samplers.SGLD.from_paper(erg.estimators.Minibatch(posterior_of("array"), scheme="full"), -1.0)

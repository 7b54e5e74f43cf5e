"""The physics and the bookkeeping of `benchmarks/pair_potential.py`, against closed forms."""

import pathlib
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def _benchmarks_on_the_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def physics():
    import pair_potential_physics

    return pair_potential_physics


@pytest.fixture
def lennard_jones_system(physics):
    return physics.System(physics.tabulate(physics.lennard_jones))


@pytest.fixture
def study():
    import pair_potential

    return pair_potential


@pytest.fixture
def defaults():
    """Scripts run under JAX's own rules of promotion, as their users do."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


pytestmark = pytest.mark.usefixtures("x64", "defaults")
BOX = 6.0


def lj(r):
    """Energy, and force times distance, where the switch is still 1."""
    return 4 * (r**-12 - r**-6), 24 * (2 * r**-12 - r**-6)


def configuration(count=7):
    """Some particles no closer than 0.9 to each other."""
    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(3), np.arange(3)), axis=-1).reshape(-1, 2)[:count]
    return jnp.asarray(1.4 * grid + 0.2 * generator.uniform(size=(count, 2)))


def test_dimer_across_the_boundary(physics, lennard_jones_system):
    """Energy, virial and pressure of two particles, nearest images of each other through a wall, and their forces."""
    r = 1.3
    x, box = jnp.array([[0.1, 2.0], [0.1 + BOX - r, 2.0]]), jnp.asarray(BOX)
    energy, virial = lj(r)
    np.testing.assert_allclose(lennard_jones_system.energy(x, box), energy, rtol=1e-7)
    np.testing.assert_allclose(physics.virial(lennard_jones_system, x, box), virial, rtol=1e-5)
    expected = (2 * 0.7 + virial / 2) / BOX**2
    np.testing.assert_allclose(physics.pressure(lennard_jones_system, x, box, 0.7), expected, rtol=1e-5)
    f = physics.forces(lennard_jones_system, x, box)
    np.testing.assert_allclose(f, [[virial / r, 0], [-virial / r, 0]], atol=1e-5)


def test_trimer_counts_each_pair_once(physics, lennard_jones_system):
    side = 1.1
    x = jnp.array([[2.0, 2.0], [2.0 + side, 2.0], [2.0 + side / 2, 2.0 + side * np.sqrt(0.75)]])
    energy, virial = lj(side)
    np.testing.assert_allclose(lennard_jones_system.energy(x, jnp.asarray(BOX)), 3 * energy, rtol=1e-6)
    np.testing.assert_allclose(physics.virial(lennard_jones_system, x, jnp.asarray(BOX)), 3 * virial, rtol=1e-4)


@pytest.mark.parametrize("embedding", [None, 0.1])
def test_forces_are_minus_the_gradient(physics, lennard_jones_system, embedding):
    """Central differences; and no net force."""
    system = physics.System(lennard_jones_system.table, None if embedding is None else jnp.asarray(embedding))
    x, box, h = configuration(), jnp.asarray(BOX), 1e-5
    f = np.asarray(physics.forces(system, x, box)).ravel()
    energy = jax.jit(lambda flat: system.energy(flat.reshape(-1, 2), box))
    moved = np.asarray(x).ravel() + h * np.eye(f.size)[:, None] * np.array([[1.0], [-1.0]])
    energies = np.asarray(jax.vmap(jax.vmap(energy))(jnp.asarray(moved)))
    np.testing.assert_allclose(f, (energies[:, 1] - energies[:, 0]) / (2 * h), atol=1e-6)
    np.testing.assert_allclose(f.reshape(-1, 2).sum(axis=0), 0, atol=1e-10)


def test_embedding_is_no_sum_over_pairs(physics, lennard_jones_system):
    """Three particles in mutual reach: c / 2 times 3 * 2^2, against 3 pairs of c / 2 times 2 * 1^2."""
    flat = jax.tree.map(jnp.zeros_like, lennard_jones_system.table)
    system, box = physics.System(flat, jnp.asarray(0.1)), jnp.asarray(BOX)
    x = jnp.array([[2.0, 2.0], [3.0, 2.0], [2.5, 2.8]])
    np.testing.assert_allclose(system.energy(x, box), 0.6)
    np.testing.assert_allclose(system.energy(x[:2], box), 0.1)


def test_table_reproduces_the_potential(physics):
    """Cubic between knots, a line below the first, and nothing beyond the cutoff."""
    table = physics.tabulate(physics.lennard_jones)
    r = jnp.linspace(0.8, 2.29, 997)
    exact, slope = jax.vmap(jax.value_and_grad(physics.lennard_jones))(r)
    value, found = jax.vmap(jax.value_and_grad(partial(physics.interpolate, table)))(r)
    np.testing.assert_allclose(value, exact, atol=2e-4)
    np.testing.assert_allclose(found, slope, rtol=1e-3, atol=1e-3)
    below = physics.interpolate(table, jnp.array([0.4, 0.45, 0.5]))
    np.testing.assert_allclose(below[0] - below[1], below[1] - below[2], rtol=1e-9)
    assert float(physics.interpolate(table, jnp.asarray(2.3))) == 0.0


def test_radial_distribution_of_an_ideal_gas_is_one(physics):
    """|z| < 5 over 4,000 uniform configurations; a bin that is a fifth off would be seen."""
    box = jnp.asarray(6.0)
    x = jax.random.uniform(jax.random.key(1), (4000, 16, 2), maxval=6.0)
    g = jax.vmap(lambda x: physics.radial_distribution(physics.pair_distances(x, box), box, 16))(x)
    se = g.std(axis=0, ddof=1) / np.sqrt(len(g))
    assert np.max(np.abs((g.mean(axis=0) - 1) / se)) < 5


def dimer_mean_energy(physics, temperature):
    """Quadrature over the separation of two particles in the periodic box."""
    axis = jnp.linspace(0, BOX / 2, 1201)
    r = jnp.maximum(jnp.hypot(axis[:, None] + jnp.zeros((1, 1201)), axis[None, :] + jnp.zeros((1201, 1))), 0.5)
    u = physics.lennard_jones(r)
    weight = jnp.exp(-u / temperature)
    return float(jnp.sum(u * weight) / jnp.sum(weight))


@pytest.mark.sweep
def test_dynamics_sample_the_canonical_law(physics, lennard_jones_system):
    """Mean energy of a dimer against quadrature, |z| < 5; an error of the temperature of 10% would be seen, and is."""
    state = tuple(jnp.asarray(v) for v in (BOX, 0.5, 0.02))
    systems = jax.tree.map(lambda v: jnp.broadcast_to(v, (2048, *v.shape)), lennard_jones_system)
    starts = jax.random.uniform(jax.random.key(2), (2048, 1, 2), maxval=BOX) + jnp.array([[0.0, 0.0], [2.0, 0.5]])
    found, _ = physics.simulate(jax.random.key(3), systems, starts, state, 1000, 1, block=200, every=10)
    energy = 2 * np.asarray(found.energy)[:, 0]
    se = energy.std(ddof=1) / np.sqrt(len(energy))
    assert abs(energy.mean() - dimer_mean_energy(physics, 0.5)) < 5 * se
    assert abs(energy.mean() - dimer_mean_energy(physics, 0.45)) > 5 * se


@pytest.mark.sweep
def test_prediction_from_stored_geometry_is_that_of_the_system(physics):
    """Energies and forces from distances and their derivatives, against the tabulated network in the simulator."""
    import pair_potential_network as networks

    network = networks.Network()
    theta = jax.tree.map(lambda v: v.astype(float), network.initial(jax.random.key(4)))
    system = physics.System(physics.tabulate(partial(network, theta)))
    x, box = configuration(9), jnp.asarray(BOX)
    distances, geometry = networks.closest_pairs(x, box)
    energy, force = networks.predict(network, theta, distances[None], geometry[None])
    np.testing.assert_allclose(energy[0], system.energy(x, box), rtol=1e-6)
    np.testing.assert_allclose(force[0], physics.forces(system, x, box).ravel(), atol=1e-5)


def test_interval_takes_the_error_of_the_runs_out(study):
    """Draws with sd 1, runs of 8 blocks with sd 2 each: the naive sd would be 1.22. |z| < 5; 5% would be seen."""
    generator = np.random.default_rng(5)
    sds = []
    for _ in range(200):
        values = generator.normal(size=(50, 1)) + 2 * generator.normal(size=(50, 8))
        found = study.interval(values)
        sds.append(found.sd**2)
        np.testing.assert_allclose(found.mean, values.mean())
    z = (np.mean(sds) - 1) / (np.std(sds, ddof=1) / np.sqrt(len(sds)))
    assert abs(z) < 5
    assert abs(np.mean(sds) - 1.5) > 5 * np.std(sds, ddof=1) / np.sqrt(len(sds))


def test_coverage_detects_intervals_that_are_too_narrow(study):
    """At 200 repeats, the binomial interval contains 0.9 for the right sd and not for one that is 30% too small."""
    means = np.random.default_rng(6).normal(size=200)
    right, narrow = (study.coverage(study.covers(0.0, means, sd)) for sd in (1.0, 0.7))
    assert right["low"] < 0.9 < right["high"]
    assert narrow["high"] < 0.9
    assert right["of"] == 200
    assert study.covers(0.0, 1.7, 0.0, 1.1)  # the error of the runs counts
    assert not study.covers(0.0, 1.7, 1.0)

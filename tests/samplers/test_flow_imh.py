"""Independence Metropolis with a flow: transition matrices by enumeration, known acceptance rates, exact laws."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import f

import ergodica as erg
from ergodica.core import tree
from ergodica.core.flow import Flow
from ergodica.samplers import FlowIMH, flow_proposal
from tests.support.flow_layers import Triangular, normals
from tests.support.marks import swept
from tests.support.statistics import REJECTION, assert_mean, z_scores

# --- a target of four points, with weights 1, 2, 4, 8 times a constant ---------------------------------------------

PROPOSAL = np.array([0.4, 0.3, 0.2, 0.1])
WEIGHT = np.array([1.0, 2.0, 4.0, 8.0])
TARGET = PROPOSAL * WEIGHT / np.sum(PROPOSAL * WEIGHT)


def transition_matrix():
    """Of one proposal, from the shipped acceptance probability."""
    log_w = jnp.log(jnp.asarray(WEIGHT))
    accept = np.asarray(
        jax.vmap(lambda a: jax.vmap(lambda b: flow_proposal.acceptance(a, b))(log_w))(log_w), np.float64
    )
    matrix = PROPOSAL * accept
    return matrix + np.diag(1 - matrix.sum(1))


def test_the_transition_matrix_has_the_target_and_the_known_rate():
    matrix = transition_matrix()
    flow = TARGET[:, None] * matrix
    np.testing.assert_allclose(flow, flow.T, atol=1e-7)
    # the heaviest state is left with probability 1 / w*, and then for a draw of the target
    heaviest = np.argmax(WEIGHT)
    rate = 1 - PROPOSAL[heaviest] / TARGET[heaviest]
    power = np.eye(4)
    for t in range(1, 8):
        power = power @ matrix
        distance = 0.5 * np.abs(power - TARGET).sum(1)
        np.testing.assert_allclose(distance[heaviest], rate**t * (1 - TARGET[heaviest]), rtol=1e-6)
        assert np.all(distance <= rate**t)


def test_several_proposals_a_step_are_as_many_steps():
    """By enumeration of all pairs of proposals and of uniforms; acceptance probabilities are multiples of 1/8."""
    uniforms = (np.arange(8) + 0.5) / 8
    pairs = np.array(list(itertools.product(range(4), repeat=2)))
    log_w = jnp.log(jnp.asarray(WEIGHT))
    grid = jnp.asarray(list(itertools.product(uniforms, repeat=2)))

    def end(start, pair, u):
        last, rate = flow_proposal.metropolis_path(log_w[start], log_w[pair], u)
        return jnp.where(last < 0, start, pair[jnp.maximum(last, 0)]), rate

    ends = jax.vmap(jax.vmap(jax.vmap(end, (None, None, 0)), (None, 0, None)), (0, None, None))
    where, rates = ends(jnp.arange(4), jnp.asarray(pairs), grid)
    chance = PROPOSAL[pairs].prod(1)
    matrix = np.array([[np.sum(chance * (np.asarray(where[i]) == j).mean(-1)) for j in range(4)] for i in range(4)])
    once = transition_matrix()
    np.testing.assert_allclose(matrix, once @ once, atol=1e-6)
    # the reported rate is the mean over both proposals
    move = (PROPOSAL * np.minimum(1, WEIGHT / WEIGHT[:, None])).sum(1)
    reported = np.array([np.sum(chance * np.asarray(rates[i]).mean(-1)) for i in range(4)])
    np.testing.assert_allclose(reported, (move + once @ move) / 2, rtol=1e-6)


# --- normal laws ---------------------------------------------------------------------------------------------------

CHAINS, STEPS, SCALE, SHIFT = 8192, 6, 1.4, 0.5


def posterior():
    """Standard normals over a tree, in coordinates of which the flow knows nothing but the order."""
    scales = {"a": jnp.array([1.0, 3.0]), "b": {"c": jnp.array([[0.2]])}}

    def log_prior(position):
        parts = jax.tree.map(lambda x, s: -0.5 * jnp.sum((x / s) ** 2), position, scales)
        return sum(jax.tree.leaves(parts)) + 3.7

    return erg.Posterior(log_prior, initial=jax.tree.map(jnp.zeros_like, scales)), scales


def proposal(scales):
    """Too wide and off its place in each coordinate."""
    wide = SCALE * tree.ravel(scales)
    return Flow(3, Triangular(jnp.diag(wide), SHIFT * tree.ravel(scales)))


@functools.partial(jax.jit, static_argnames="steps")
def _walk(kernel, key, scales, steps):
    """Squared and plain standardised coordinates, means over the steps, of chains that start in the target."""

    def chain(key):
        key_start, key_init, key_run = jax.random.split(key, 3)
        start = jax.tree.map(lambda z, s: z * s, normal_tree(key_start, scales), scales)

        def body(state, i):
            state, info = kernel.step(jax.random.fold_in(key_run, i), state)
            z = tree.ravel(jax.tree.map(jnp.divide, state.position, scales))
            return state, (z, z**2, info.acceptance_rate)

        _, seen = jax.lax.scan(body, kernel.init(key_init, start), jnp.arange(steps))
        return jax.tree.map(lambda x: x.mean(0), seen)

    return jax.vmap(chain)(jax.random.split(key, CHAINS))


def normal_tree(key, like):
    keys = jax.random.split(key, len(jax.tree.leaves(like)))
    leaves = [jax.random.normal(k, x.shape) for k, x in zip(keys, jax.tree.leaves(like), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def walk(make=FlowIMH, num_proposals=1):
    target, scales = posterior()
    return _walk(make(proposal(scales), target, num_proposals), jax.random.key(1), scales, STEPS)


@pytest.mark.parametrize("num_proposals", [swept(1), 4])
def test_exact_with_a_poor_flow(num_proposals):
    plain, squares, rates = walk(num_proposals=num_proposals)
    assert_mean(squares, 1.0, smallest_error=0.1)
    assert np.max(np.abs(z_scores(plain, 0.0))) < 5
    assert 0.2 < np.mean(rates) < 0.6


class WithoutProposal(FlowIMH):
    """Mutant: Metropolis as if the proposal were symmetric."""

    def step(self, key, state, batch=None):
        flow = self.flow

        class Flat:
            def sample_and_log_prob(self, key, n):
                x, log_q = flow.sample_and_log_prob(key, n)
                return x, jnp.zeros_like(log_q)

        blind = FlowIMH.__new__(FlowIMH)
        for name, value in {**vars(self), "flow": Flat()}.items():
            object.__setattr__(blind, name, value)
        return FlowIMH.step(blind, key, state._replace(log_proposal=jnp.zeros_like(state.log_proposal)))


def test_without_the_flows_density_the_law_is_another():
    _, squares, _ = walk(WithoutProposal)
    assert np.max(np.abs(z_scores(squares, 1.0))) > REJECTION


@pytest.mark.parametrize(("dim", "s"), [swept(1, 2.0), (6, 0.7)])
def test_acceptance_has_the_known_rate(dim, s):
    """Of N(0, s^2 I) for N(0, I): moves to larger weights are accepted, and carry half of the flow between the points."""
    kernel = FlowIMH(normals(s, dim=dim), lambda x: -0.5 * jnp.sum(x**2))

    def one(key):
        key_start, key_step = jax.random.split(key)
        return kernel.step(key_step, kernel.init(key, jax.random.normal(key_start, (dim,))))[1].acceptance_rate

    rates = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(2), 50_000))
    exact = 2 * f.sf(max(s, 1 / s) ** 2, dim, dim)
    assert_mean(rates, exact, smallest_error=0.03)


# --- what cannot be weighed ----------------------------------------------------------------------------------------


def test_proposals_that_cannot_be_weighed_are_rejected():
    """NaN is flagged; outside of the support is a plain rejection."""

    def log_density(x):
        return jnp.where(x[0] > 0, jnp.nan, jnp.where(x[1] > 0, -jnp.inf, -0.5 * jnp.sum(x**2)))

    kernel = FlowIMH(normals(1.0, dim=2), log_density)
    start = jnp.array([-1.0, -1.0])

    def one(key):
        state, info = kernel.step(key, kernel.init(key, start))
        return state.position, kernel.flow.sample(jax.random.split(key)[0], 1)[0], info

    where, proposed, info = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 200))
    stays = np.asarray((proposed > 0).any(1))
    assert 0 < stays.sum() < 200
    np.testing.assert_array_equal(where[stays], np.broadcast_to(start, where[stays].shape))
    np.testing.assert_array_equal(info.acceptance_rate[stays], 0.0)
    np.testing.assert_array_equal(info.diverging, proposed[:, 0] > 0)
    assert np.all(np.isfinite(info.lp))


def test_a_start_without_density_is_left_at_once():
    kernel = FlowIMH(normals(1.0, dim=1), lambda x: jnp.where(x[0] > 5, -jnp.inf, -0.5 * jnp.sum(x**2)))
    _, info = kernel.step(jax.random.key(1), kernel.init(jax.random.key(0), jnp.array([6.0])))
    assert info.acceptance_rate == 1


# --- the result of a run -------------------------------------------------------------------------------------------


def test_a_run_gives_a_tree_that_arviz_reads():
    target, scales = posterior()
    target = erg.Posterior(
        target.log_prior, lambda p, rows: 0.0 * rows, jnp.ones(5), initial=target.initial, dims={"a": ["axis"]}
    )
    sampler = FlowIMH(proposal(scales), target, num_proposals=10)
    dt = erg.sample(jax.random.key(0), sampler, 500, 20, initial=sampler.start, progress=False)
    assert dt.attrs["exact"] == "exact"
    assert dt.attrs["sampler"] == "FlowIMH"
    assert dt.posterior["a"].dims == ("chain", "draw", "axis")
    assert set(dt.sample_stats.data_vars) == {"lp", "log_weight", "acceptance_rate", "n_grad", "diverging"}
    assert np.all(dt.sample_stats["n_grad"] == 10 * 5)
    draws = {"a": jnp.asarray(dt.posterior["a"].values), "b": {"c": jnp.asarray(dt.posterior["b.c"].values)}}
    density = jax.vmap(jax.vmap(target.log_density))(draws)
    np.testing.assert_allclose(dt.sample_stats["lp"], density, rtol=1e-5, atol=1e-5)
    z = dt.posterior["a"].values / np.asarray(scales["a"])
    replicates = (z**2).reshape(4 * 20, -1, 2).mean(1)  # ten proposals a step leave little correlation, batches none
    assert np.max(np.abs(z_scores(replicates, 1.0))) < 5


@pytest.mark.parametrize("num_proposals", [1, 4])
def test_a_start_that_cannot_be_weighed_is_flagged_and_left(num_proposals):
    """NaN where the chain starts; it must not stay there unseen."""
    kernel = FlowIMH(normals(1.0, dim=1), lambda x: jnp.where(x[0] > 5, jnp.nan, -0.5 * jnp.sum(x**2)), num_proposals)
    state, info = kernel.step(jax.random.key(1), kernel.init(jax.random.key(0), jnp.array([6.0])))
    assert info.diverging
    assert state.position[0] < 5
    assert not kernel.step(jax.random.key(2), state)[1].diverging


def test_a_start_that_is_never_left_is_flagged():
    """Where the flow's density is below the smallest number the weight is infinite."""
    kernel = FlowIMH(normals(1.0, dim=1), lambda x: jnp.zeros(()))
    state, info = kernel.step(jax.random.key(1), kernel.init(jax.random.key(0), jnp.array([1e25])))
    assert info.diverging
    assert state.position[0] == np.float32(1e25)

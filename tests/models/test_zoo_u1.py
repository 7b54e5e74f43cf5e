"""U(1) gauge theory: references by brute force, exact draws, and the flow that does not see the gauge."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ergodica.core.flow import AbstractLayer
from ergodica.models.flows import gauge
from ergodica.models.lattice import gauge_transform, wrap
from ergodica.models.zoo import u1_reference
from ergodica.models.zoo.u1 import u1_gauge
from tests.support.statistics import REJECTION, THRESHOLD

SHAPE, POINTS = (4, 5), 8
RARE = 6e-7
"""A p-value as rare as |z| = 5."""


# --- references -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_two_by_two_by_brute_force():
    """Three links of a tree are zero, which the gauge allows; the others run over a grid that sums waves exactly."""
    target = u1_gauge(2, beta=0.5)
    points = 2 * np.pi * np.arange(10) / 10
    links = np.zeros((10**5, 8))
    links[:, [2, 3, 5, 6, 7]] = np.stack(np.meshgrid(*[points] * 5), axis=-1).reshape(-1, 5)
    log_density = np.asarray(jax.jit(jax.vmap(target.log_density))(links))
    weight = np.exp(log_density)
    brute = math.log(weight.mean()) + 8 * math.log(2 * np.pi)
    assert abs(target.log_normaliser.value - brute) < 1e-9
    plaquette = np.sum(weight * log_density / (4 * 0.5)) / weight.sum()
    assert abs(u1_reference.wilson_loop(0.5, 4) - plaquette) < 1e-8
    assert abs(u1_reference.wilson_loop(0.5, 4, 4) - 1) < 1e-14  # around everything


def test_the_mean_plaquette_is_the_slope_of_the_normaliser():
    log_z = [u1_reference.log_partition(beta, 12) for beta in (1.999, 2.001)]
    assert abs((log_z[1] - log_z[0]) / 0.002 / 12 - u1_reference.wilson_loop(2.0, 12)) < 1e-6


def test_charges_without_coupling_are_sums_of_uniforms():
    """The density of the sum of N uniforms on (-1/2, 1/2), at integers, is their law."""
    charges, law = u1_reference.charge_law(0.0, 9)
    terms = [[(-1) ** k * math.comb(9, k) * max(q + 4.5 - k, 0) ** 8 for k in range(10)] for q in charges]
    uniforms = np.sum(terms, axis=1) / math.factorial(8)
    np.testing.assert_allclose(law, uniforms, atol=1e-12)
    assert abs(u1_reference.mean_square_charge(0.0, 9) - 9 / 12) < 1e-12


@pytest.mark.parametrize(("beta", "count"), [(1.0, 9), (3.0, 64), (8.0, 144)])
def test_two_ways_to_the_susceptibility_agree(beta, count):
    charges, law = u1_reference.charge_law(beta, count)
    assert abs(law.sum() - 1) < 1e-12
    assert abs(np.sum(charges**2 * law) - u1_reference.mean_square_charge(beta, count)) < 1e-9


def test_the_density_and_what_is_observed_do_not_see_the_gauge():
    target = u1_gauge(SHAPE, 1.5)
    x = target.start(jax.random.key(0))
    turns = jax.random.uniform(jax.random.key(1), SHAPE, minval=-3.0, maxval=3.0)
    turned = gauge_transform(x.reshape(2, *SHAPE), turns).ravel()
    assert np.abs(wrap(turned - x)).max() > 1
    np.testing.assert_allclose(target.log_density(turned), target.log_density(x), atol=1e-4)
    for name, value in target.observables(x).items():
        np.testing.assert_allclose(target.observables(turned)[name], value, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(target.score(x), jax.grad(target.log_density)(x), atol=1e-5)


# --- draws ------------------------------------------------------------------------------------------------------------


@functools.cache
def drawn():
    target = u1_gauge(3, beta=1.5)
    x = target.draws(jax.random.key(2), 20_000)
    return target, x, jax.jit(jax.vmap(target.observables))(x)


def z_score(values, expected):
    values = np.asarray(values, float)
    return (values.mean() - expected) / (values.std() / math.sqrt(len(values)))


def test_draws_are_of_the_target():
    """20,000 draws: errors of 0.0015 in the mean plaquette and 0.013 in the mean charge would be seen."""
    target, x, seen = drawn()
    for name, value in target.reference.items():
        assert abs(z_score(seen[name], value.value)) < THRESHOLD, name
    assert stats.kstest(np.asarray(x[:, 4]), stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > RARE
    winding = wrap(jnp.sum(x.reshape(-1, 2, 3, 3)[:, 0, :, 1], axis=1))
    assert stats.kstest(np.asarray(winding), stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > RARE


def test_charges_of_draws_have_their_law():
    _, x, seen = drawn()
    charges, law = u1_reference.charge_law(1.5, 9)
    likely = law * len(x) > 10
    counts = np.array([np.sum(np.asarray(seen["topological_charge"]) == q) for q in charges])
    observed, expected = np.append(counts[likely], counts[~likely].sum()), np.append(law[likely], law[~likely].sum())
    assert stats.chisquare(observed, len(x) * expected / expected.sum()).pvalue > RARE


def test_a_last_plaquette_that_is_not_weighed_is_noticed():
    """A mutant: independent plaquettes, and the last one as their sum would have it."""
    target, _, _ = drawn()
    free = jnp.asarray(stats.vonmises(1.5).rvs((20_000, 8), random_state=1))
    last = wrap(-free.sum(axis=1))
    plaquette = (jnp.cos(free).sum(axis=1) + jnp.cos(last)) / 9
    assert abs(z_score(plaquette, target.reference["plaquette"].value)) > REJECTION


# --- the flow ---------------------------------------------------------------------------------------------------------


class Seeing(gauge.Stripes):
    """A mutant: the network sees a line of plaquettes that the links change."""

    def frozen_steps(self, reach):
        return (-1, *super().frozen_steps(reach)[1:])


@functools.cache
def measured():
    settings = {"num_components": 3, "width": 8, "start": 2.0}
    flow = gauge.u1_flow(jax.random.key(3), SHAPE, num_layers=2, **settings)
    layer = flow.layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gauge, "Stripes", Seeing)
        mutant = gauge.PlaquetteCoupling(jax.random.key(3), SHAPE, 0, 0, **settings)

    def one(x, score, turns):
        y, log_det = layer.forward(x)
        turned = gauge_transform(y.reshape(2, *SHAPE), turns).ravel()
        fast = layer.forward_with_score(x, score)
        return {
            "y": y,
            "log_det": log_det,
            "back": layer.inverse(y),
            "slogdet": jnp.linalg.slogdet(jax.jacfwd(lambda x: layer.forward(x)[0])(x))[1],
            "fast": fast[2],
            "generic": AbstractLayer.forward_with_score(layer, x, score)[2],
            "returned": layer.inverse_with_score(y, fast[2])[2],
            "log_prob": flow.log_prob(y),
            "turned": flow.log_prob(turned),
            "mutant": mutant.forward(y)[1],
            "mutant turned": mutant.forward(turned)[1],
        }

    x = flow.base.sample(jax.random.key(4), POINTS)
    score = jax.random.normal(jax.random.key(5), x.shape)
    turns = jax.random.uniform(jax.random.key(6), (POINTS, *SHAPE), minval=-3.0, maxval=3.0)
    return x, score, jax.jit(jax.vmap(one))(x, score, turns)


@pytest.mark.usefixtures("x64")
def test_gauge_layers_invert_and_count_their_volume():
    x, _, out = measured()
    np.testing.assert_allclose(wrap(out["back"][0] - x), 0.0, atol=1e-12)
    np.testing.assert_allclose(out["back"][1], -out["log_det"], atol=1e-12)
    np.testing.assert_allclose(out["log_det"], out["slogdet"], atol=1e-12)
    assert np.std(out["log_det"]) > 0.1


@pytest.mark.usefixtures("x64")
def test_scores_on_links_need_no_roots_and_are_those_of_the_generic_rule():
    _, score, out = measured()
    np.testing.assert_allclose(out["fast"], out["generic"], atol=1e-10)
    np.testing.assert_allclose(out["returned"], score, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_the_density_of_the_flow_does_not_see_the_gauge():
    _, _, out = measured()
    np.testing.assert_allclose(out["turned"], out["log_prob"], atol=1e-11)
    assert np.std(out["log_prob"]) > 0.1
    assert np.abs(out["mutant turned"] - out["mutant"]).max() > 1e-2


@pytest.mark.parametrize("shape", [(8, 8), (3, 3), (9, 6), (16, 16)])
def test_what_is_frozen_holds_no_link_that_moves(shape):
    """By counting: the plaquettes that a network sees hold none of the links that move, each active one holds one."""
    flow = gauge.u1_flow(jax.random.key(0), shape, num_layers=8, num_components=1, width=1, depth=0)
    moved_ever = np.zeros(flow.dim, bool)
    for layer in flow.layer.layers:
        stripes = layer.split
        moved = stripes.mask().reshape(2, *shape)
        first, second = moved
        held = first * 1 + np.roll(second, -1, 0) + np.roll(first, -1, 1) + second
        assert stripes.frozen_steps(3)
        for step in stripes.frozen_steps(3):
            assert not np.any(stripes.rows(jnp.asarray(held), step))
        np.testing.assert_array_equal(stripes.rows(jnp.asarray(held), 0), 1)
        moved_ever |= stripes.mask()
    assert moved_ever.all() or shape[0] % 4


@pytest.mark.slow
def test_a_trained_flow_meets_the_exact_normaliser():
    """8 x 8 at beta = 1: the effective sample size rises, and log Z by importance sampling is that of the character expansion."""
    import ergodica as erg

    target = u1_gauge(8, beta=1.0)
    flow = gauge.u1_flow(jax.random.key(0), 8, num_layers=8, num_components=3, width=16)
    gradient = erg.estimators.PathGradient(flow, target, num_samples=128)
    result = erg.run.fit(jax.random.key(1), gradient, num_steps=400, optimiser=3e-3, progress=False)

    def weights(flow):
        x, log_q = flow.sample_and_log_prob(jax.random.key(2), 4000)
        return np.asarray(jax.vmap(target.log_density)(x) - log_q, float)

    def ess(log_weight):
        w = np.exp(log_weight - log_weight.max())
        return w.sum() ** 2 / (w**2).sum() / len(w)

    before, after = weights(flow), weights(gradient.flow(result.params))
    assert ess(after) > 0.3 > 10 * ess(before)
    w = np.exp(after - target.log_normaliser.value)
    assert abs(z_score(w, 1.0)) < THRESHOLD


def test_bad_lattices_are_refused():
    with pytest.raises(ValueError, match="size must be at least 2; got 1"):
        u1_gauge(1)
    with pytest.raises(ValueError, match="size must be an integer or a pair of them; got \\(4, 4, 4\\)"):
        u1_gauge((4, 4, 4))
    with pytest.raises(ValueError, match="beta must be at least 0"):
        u1_gauge(4, beta=-1.0)
    with pytest.raises(ValueError, match="size must be at least 3; got 2"):
        gauge.u1_flow(jax.random.key(0), (4, 2))

"""Path gradients: equal to two passes draw by draw, equal to the standard gradient in the mean, zero at a perfect fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.core import flow as flows
from ergodica.core import tree
from ergodica.core.types import Batch
from ergodica.estimators.flows import MaximumLikelihood, PathGradient, ReverseKL
from ergodica.estimators.flows.path import path_term
from tests.support.flows import Bent, bent_flow, target
from tests.support.quadrature import exact_moments, normal_rule
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("x64")
NODES = 30


def gradients(estimator, num_repeats, params=None):
    """Independent gradients (R, D)."""
    params = estimator.params if params is None else params
    keys = jax.random.split(jax.random.key(0), num_repeats)
    one = jax.jit(jax.vmap(lambda e, key: tree.ravel(e.estimate(key, params, None)[0].gradient), (None, 0)))
    return np.asarray(one(estimator, keys))


@pytest.fixture(scope="module")
def draws_of_target():
    """Nodes of a Gauss-Hermite rule for a normal of mean 0.4, which stands for the target's draws."""
    with jax.enable_x64(True):
        points, weights = normal_rule(2, NODES)
        return jnp.asarray(points + 0.4), jnp.asarray(weights)


@pytest.mark.parametrize("seed", range(3))
def test_one_pass_equals_two_draw_by_draw(seed):
    flow, key = bent_flow(), jax.random.key(seed)
    one, two = (PathGradient(flow, target, num_samples=8, passes=p).estimate(key, flow.params, None)[0] for p in (1, 2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-13)


def test_one_pass_equals_two_on_draws_of_the_target(draws_of_target):
    flow, (points, weights) = bent_flow(), draws_of_target
    estimates = []
    for passes in (1, 2):
        gradient = PathGradient(flow, target, "forward", draws=points, passes=passes)
        estimates.append(gradient.estimate(jax.random.key(0), flow.params, None, Batch(points, weights))[0])
    for a, b in zip(jax.tree.leaves(estimates[0]), jax.tree.leaves(estimates[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_mean_is_that_of_the_standard_gradient():
    """The mean over all base draws, by quadrature through the shipped code."""
    flow = bent_flow()
    path, _ = exact_moments(PathGradient(flow, target, num_samples=1), flow.params, 2, NODES)
    standard, _ = exact_moments(ReverseKL(flow, target, num_samples=1), flow.params, 2, NODES)
    np.testing.assert_allclose(path, standard, atol=1e-10)
    assert np.linalg.norm(standard) > 0.1


def test_forward_mean_is_that_of_maximum_likelihood(draws_of_target):
    """With forces of the law that the draws are of; a draw-by-draw equality it is not."""
    flow, (points, weights) = bent_flow(), draws_of_target
    path = PathGradient(flow, None, "forward", draws=points, forces=0.4 - points)
    likelihood, batch = MaximumLikelihood(flow, points), Batch(points, weights)
    a = path.estimate(jax.random.key(0), flow.params, None, Batch((points, 0.4 - points), weights))[0]
    b = likelihood.estimate(jax.random.key(0), flow.params, None, batch)[0]
    np.testing.assert_allclose(tree.ravel(a.gradient), tree.ravel(b.gradient), atol=1e-7)
    np.testing.assert_allclose(a.value, b.value, rtol=1e-12)
    first = Batch((points[:1], 0.4 - points[:1]), jnp.ones(1))
    a = path.estimate(jax.random.key(0), flow.params, None, first)[0]
    b = likelihood.estimate(jax.random.key(0), flow.params, None, Batch(points[:1], jnp.ones(1)))[0]
    assert np.max(np.abs(tree.ravel(a.gradient) - tree.ravel(b.gradient))) > 0.1


@pytest.mark.parametrize("passes", [1, 2])
def test_no_noise_at_a_perfect_fit(passes):
    flow = bent_flow()
    law = flow.log_prob
    draws = flow.sample(jax.random.key(3), 50)
    reverse = gradients(PathGradient(flow, law, num_samples=1, passes=passes), 50)
    forward = gradients(PathGradient(flow, law, "forward", 1, draws=draws, passes=passes), 50)
    np.testing.assert_allclose(reverse, 0.0, atol=1e-13)
    np.testing.assert_allclose(forward, 0.0, atol=1e-13)
    assert gradients(ReverseKL(flow, law, num_samples=1), 50).std(axis=0).max() > 0.1


def test_linear_flow_has_the_closed_form():
    r"""Scale of one normal against :math:`N(0, 1)`: path term :math:`z(x - z/s)(-1)`, so variance :math:`2(s - 1/s)^2`."""

    class Scale(flows.AbstractLayer):
        scale: jax.Array

        def forward(self, x):
            return self.scale * x, jnp.log(self.scale)

        def inverse(self, y):
            return y / self.scale, -jnp.log(self.scale)

    s = 1.7
    flow = flows.Flow(1, Scale(jnp.array(s)))
    normal = lambda x: -0.5 * jnp.sum(x**2)  # noqa: E731
    mean, covariance = exact_moments(PathGradient(flow, normal, num_samples=1), flow.params, 1, 10)
    np.testing.assert_allclose(mean, [-(s - 1 / s)], rtol=1e-12)
    np.testing.assert_allclose(covariance, [[2 * (s - 1 / s) ** 2]], rtol=1e-12)
    mean, covariance = exact_moments(ReverseKL(flow, normal, num_samples=1), flow.params, 1, 10)
    np.testing.assert_allclose(mean, [-(s - 1 / s)], rtol=1e-12)
    np.testing.assert_allclose(covariance, [[2 * s**2]], rtol=1e-12)


def forgetful_term(new, score, force):
    """A mutant: the force of the target alone."""
    return path_term(new, jnp.zeros_like(score), force)


def test_random_draws_agree_and_a_mutant_does_not(monkeypatch):
    flow = bent_flow()
    exact, _ = exact_moments(ReverseKL(flow, target, num_samples=1), flow.params, 2, NODES)
    assert_mean(gradients(PathGradient(flow, target, num_samples=16), 4000), exact, smallest_error=0.05)
    monkeypatch.setattr("ergodica.estimators.flows.path.path_term", forgetful_term)
    wrong = gradients(PathGradient(flow, target, num_samples=16), 4000)
    assert np.max(np.abs(z_scores(wrong, exact))) > REJECTION


def test_weights_are_those_of_the_draws():
    """The weights have the target's constant as their mean."""
    flow = bent_flow()
    normal = lambda x: -0.5 * jnp.sum(x**2)  # noqa: E731
    gradient = PathGradient(flow, normal, num_samples=20_000)
    weights = np.exp(gradient.estimate(jax.random.key(0), flow.params, None)[0].aux["log_weight"])
    assert_mean(weights[:, None], np.array([2 * np.pi]), smallest_error=0.05)


def test_a_posterior_is_a_target():
    """Positions that are trees, raveled in their order; the data are rows of the posterior."""
    posterior = erg.Posterior(
        lambda p: -0.5 * (p["b"] - 1.0) ** 2 - 0.5 * p["a"][0] ** 2,
        lambda p, x: -0.5 * (x - p["b"]) ** 2,
        jnp.array([0.5, 1.5]),
        initial={"a": jnp.zeros(1), "b": jnp.zeros(())},
    )
    flow = bent_flow()

    def flat(x):
        return -0.5 * (x[1] - 1.0) ** 2 - 0.5 * x[0] ** 2 - 0.5 * (0.5 - x[1]) ** 2 - 0.5 * (1.5 - x[1]) ** 2

    a = gradients(PathGradient(flow, posterior, num_samples=4), 3)
    np.testing.assert_allclose(a, gradients(PathGradient(flow, flat, num_samples=4), 3), atol=1e-12)


def test_budget_is_draws():
    gradient = PathGradient(bent_flow(), target, num_samples=4).with_budget(9)
    estimate = gradient.estimate(jax.random.key(0), gradient.params, None)[0]
    assert estimate.n_grad == 9
    assert estimate.aux["log_weight"].shape == (9,)


BAD = {
    "no flow": (lambda: PathGradient(target, target), TypeError, "flow must be"),
    "direction": (lambda: PathGradient(bent_flow(), target, "backward"), ValueError, "direction must be one of"),
    "no target": (lambda: PathGradient(bent_flow(), None), ValueError, "needs a target"),
    "draws not used": (
        lambda: PathGradient(bent_flow(), target, draws=jnp.zeros((3, 2))),
        ValueError,
        "for direction='forward'",
    ),
    "no draws": (lambda: PathGradient(bent_flow(), target, "forward"), ValueError, r"draws= of the target"),
    "nothing to force": (
        lambda: PathGradient(bent_flow(), None, "forward", draws=jnp.zeros((3, 2))),
        ValueError,
        "forces= at the draws",
    ),
    "shape of draws": (
        lambda: PathGradient(bent_flow(), target, "forward", draws=jnp.zeros((3, 5))),
        ValueError,
        r"draws must be an array \(N, 2\)",
    ),
    "draws not finite": (
        lambda: MaximumLikelihood(bent_flow(), jnp.array([[0.0, jnp.nan]])),
        ValueError,
        "draws must be finite",
    ),
    "draws of integers": (lambda: MaximumLikelihood(bent_flow(), jnp.zeros((3, 2), int)), TypeError, "floating point"),
    "shape of forces": (
        lambda: PathGradient(bent_flow(), target, "forward", draws=jnp.zeros((3, 2)), forces=jnp.zeros((2, 2))),
        ValueError,
        "forces must have the shape of draws",
    ),
    "target of vectors": (lambda: ReverseKL(bent_flow(), lambda x: x), ValueError, "to a scalar"),
    "target of another size": (
        lambda: ReverseKL(bent_flow(), erg.Posterior(lambda x: -jnp.sum(x**2), initial=jnp.zeros(3))),
        ValueError,
        "dimension 2, the positions of the posterior have 3 entries",
    ),
    "no draws at all": (lambda: ReverseKL(bent_flow(), target, 0), ValueError, "num_samples must be at least 1"),
    "layers of another size": (
        lambda: flows.Flow(3, Bent(jnp.zeros(4), 0), Halved()),
        ValueError,
        r"The layers must map a point of shape \(3,\)",
    ),
    "batch": (
        lambda: PathGradient(bent_flow(), target).estimate(
            jax.random.key(0), bent_flow().params, None, Batch(jnp.zeros((1, 2)), jnp.ones(1))
        ),
        ValueError,
        "takes no batch",
    ),
}


class Halved(flows.AbstractLayer):
    """Not a map of the space to itself."""

    def forward(self, x):
        return x[:1], jnp.zeros(())

    def inverse(self, y):
        return y[:1], jnp.zeros(())


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()

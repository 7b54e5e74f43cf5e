"""One-hot vectors are enumerated like indices: the gradient is the exact one, without noise."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from ergodica.core import tree
from ergodica.estimators import ELBO, Enumerate, LeaveOneOut, SiteError
from tests.support.one_hot import one_hot_program

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


def test_gradient_is_exact():
    case, exact = one_hot_program()

    def gradient(sites):
        value = lambda p: -ELBO(2, sites).loss(jax.random.key(0), p, case.model, case.guide, *case.args)  # noqa: E731
        return np.asarray(tree.ravel(jax.jit(jax.grad(value))(case.params)))

    np.testing.assert_allclose(gradient({"z": Enumerate()}), exact, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(gradient({}), gradient({"z": Enumerate()}))  # by rule
    assert np.max(np.abs(gradient({"z": LeaveOneOut()}) - exact)) > 0.01  # one that has noise is seen


def test_indices_and_one_hot_vectors_agree():
    """Two vectors in one site without a plate are enumerated jointly, nine runs, as two indices are."""
    logits, means = jnp.array([[0.4, 0.0, -0.2], [-0.5, 0.3, 0.1]]), jnp.array([-1.0, 0.4, 1.5])

    def bound(law, mean_of):
        def model():
            z = numpyro.sample("z", law(jnp.zeros((2, 3))))
            numpyro.factor("likelihood", -((jnp.sum(mean_of(z)) - 0.7) ** 2))

        def guide():
            numpyro.sample("z", law(numpyro.param("logits", logits)))

        loss = ELBO(1, {"z": Enumerate()})
        assert loss.plan(model, guide).rows[0].runs == 9
        value = jax.value_and_grad(lambda p: loss.loss(jax.random.key(0), p, model, guide))
        return jax.jit(value)({"logits": logits})

    index = bound(lambda x: dist.Categorical(logits=x), lambda z: means[z])
    vector = bound(lambda x: dist.Multinomial(1, logits=x), lambda z: z @ means)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), index, vector)


def test_more_than_one_trial_is_refused():
    def program():
        numpyro.sample("z", dist.Multinomial(2, probs=jnp.array([0.3, 0.7])))

    with pytest.raises(SiteError, match=r"'z' .*its support cannot be listed"):
        ELBO(1, {"z": Enumerate()}).plan(program, program)

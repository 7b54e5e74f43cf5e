"""Laws and plates whose gradients NumPyro gets wrong, and transformations without an inverse."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO

from ergodica.estimators import (
    ELBO,
    IWELBO,
    Enumerate,
    LeaveOneOut,
    Reparam,
    Score,
    SiteError,
)
from tests.support.replicates import replicates
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


def _mixture():
    law = dist.MixtureSameFamily(
        dist.Categorical(logits=jnp.stack([numpyro.param("t", jnp.array(0.3)), jnp.array(0.0)])),
        dist.Normal(jnp.array([-1.0, 1.5]), 0.6),
    )
    numpyro.sample("w", law)


def _normal_model():
    numpyro.sample("w", dist.Normal(0.0, 1.0))


class _OneWay(dist.transforms.Transform):
    """A transformation without an inverse."""

    domain = codomain = dist.constraints.real

    def __call__(self, x):
        return x + 0.1 * jnp.sin(x)

    def _inverse(self, y):
        raise NotImplementedError

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return jnp.log(1 + 0.1 * jnp.cos(x))

    def tree_flatten(self):
        return (), ((), {})


def test_flows_without_an_inverse():
    """Their own draws are fine; sticking the landing is not."""

    def guide():
        numpyro.sample(
            "w", dist.TransformedDistribution(dist.Normal(numpyro.param("m", jnp.array(0.1)), 1.0), _OneWay())
        )

    def loss(estimator):
        return ELBO(2, {"w": estimator}).loss(jax.random.key(0), {"m": jnp.array(0.1)}, _normal_model, guide)

    assert jnp.isfinite(loss(Reparam()))
    with pytest.raises(SiteError, match=r"'w' .* needs the inverse of a transformation that has none"):
        loss(Reparam(stl=True))


def test_mixture_guide_is_right_here_and_wrong_in_trace_elbo():
    """The gradient of KL(mixture, normal) by its logit, by quadrature on a line. Sees 5%."""
    grid = jnp.linspace(-9.0, 9.0, 4001)

    def exact(t):
        weight = jax.nn.sigmoid(t)
        parts = [jnp.exp(dist.Normal(m, 0.6).log_prob(grid)) for m in (-1.0, 1.5)]
        q = weight * parts[0] + (1 - weight) * parts[1]
        return jnp.sum(q * (dist.Normal(0.0, 1.0).log_prob(grid) - jnp.log(q))) * (grid[1] - grid[0])

    reference, params = np.array([jax.grad(exact)(0.3)]), {"t": jnp.array(0.3)}
    assert_mean(
        replicates(ELBO(4, {"w": LeaveOneOut()}), params, _normal_model, _mixture), reference, smallest_error=0.15
    )
    theirs = replicates(Trace_ELBO(4), params, _normal_model, _mixture)
    assert np.max(np.abs(z_scores(theirs, reference))) > REJECTION


@pytest.mark.parametrize(
    "law", [dist.Bernoulli, lambda logits: dist.Binomial(3, logits=logits)], ids=["bit", "binomial"]
)
def test_logits_of_zero_have_the_right_derivative(law):
    """Where most runs start. The score at 0, by enumeration and by hand; NumPyro's own densities have another there."""
    from ergodica.estimators.variational.density import log_density

    total = float(law(logits=jnp.array(0.0)).enumerate_support()[-1])
    for value in (0, 1):

        def score(density, value=value):
            wrapped = lambda l: density(law(logits=l).expand([2]).to_event(1), jnp.array([value, value]))  # noqa: E731
            return float(jax.grad(wrapped)(jnp.array(0.0)))

        assert score(log_density) == pytest.approx(2 * (value - total / 2), abs=1e-12)
        assert score(lambda fn, v: fn.log_prob(v)) != pytest.approx(2 * (value - total / 2), abs=0.1)


def _subsampled(full, size):
    x = jnp.array([0.2, 1.3, -0.4, 0.9])

    def model():
        with numpyro.plate("data", full, subsample_size=size) as index:
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            numpyro.sample("x", dist.Normal(1.0 * z, 0.8), obs=x[index])

    def guide():
        logits = numpyro.param("logits", jnp.zeros(full))
        with numpyro.plate("data", full, subsample_size=size) as index:
            numpyro.sample("z", dist.Bernoulli(logits=logits[index]))

    return model, guide


def test_subsampled_plates_are_scaled_once():
    """Against the whole plate, enumerated; NumPyro's TraceGraph_ELBO scales the score twice. Sees 20%."""
    params = {"logits": jnp.array([0.3, -0.2, 0.5, 0.0])}
    exact = replicates(ELBO(1), params, *_subsampled(4, 4), num_repeats=1)[0]
    part = _subsampled(4, 2)
    for loss in (ELBO(2, {"z": LeaveOneOut()}), ELBO(1, {"z": Enumerate()}), IWELBO(1, {"z": Score(-1.0)})):
        assert_mean(replicates(loss, params, *part), exact, smallest_error=0.2)
    wrong = replicates(TraceGraph_ELBO(2), params, *part)
    assert np.max(np.abs(z_scores(wrong, exact))) > REJECTION


def test_masked_elements_are_drawn_all_the_same():
    """The guide's mask takes -log q out of the objective, not the value's law. Exact by enumeration."""

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(1.0 * z, 0.8), obs=0.9)

    def guide():
        with numpyro.handlers.mask(mask=False):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("l", jnp.array(0.3))))

    def exact(l):
        p = jax.nn.sigmoid(l)
        terms = [dist.Bernoulli(0.4).log_prob(z) + dist.Normal(1.0 * z, 0.8).log_prob(0.9) for z in (0, 1)]
        return (1 - p) * terms[0] + p * terms[1]

    reference, params = np.array([jax.grad(exact)(0.3)]), {"l": jnp.array(0.3)}
    np.testing.assert_allclose(replicates(ELBO(1), params, model, guide, num_repeats=1)[0], reference, rtol=1e-12)
    assert_mean(replicates(ELBO(2, {"z": LeaveOneOut()}), params, model, guide), reference, smallest_error=0.1)

"""Posteriors of equinox modules: the density of NumPyro's own, closed forms of a linear layer, starts and errors."""

import arviz as az
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.module import random_eqx_module

import ergodica as erg
from ergodica.core import tree
from ergodica.models import from_equinox
from ergodica.models.equinox import fan_in_scale

X = jnp.asarray(np.random.default_rng(0).normal(size=(40, 3)), jnp.float32)
Y = jnp.sin(X[:, 0]) + 0.1 * X[:, 1]


def mlp(key):
    return eqx.nn.MLP(3, 1, width_size=5, depth=2, activation=jnp.tanh, key=key)


def normal(net, x):
    return dist.Normal(jax.vmap(net)(x)[:, 0], 0.3)


NET = mlp(jax.random.key(0))


def test_density_is_that_of_numpyros_module():
    """At random positions, prior constants included; the mutant with one scale for all differs."""

    def model(x, y):
        net = random_eqx_module("net", NET, prior=lambda name, shape: dist.Normal(0.0, fan_in_scale(name, shape)))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", normal(net, x), obs=y)

    mine, theirs = from_equinox(NET, normal, X, Y), erg.from_numpyro(model, data={"x": X, "y": Y})
    mutant = from_equinox(NET, normal, X, Y, prior_scale=1.0)
    for seed in range(3):
        position = mine.start(jax.random.key(seed))
        renamed = {
            f"net/{name.replace('.0.', '[0].').replace('.1.', '[1].').replace('.2.', '[2].')}": w
            for name, w in position.items()
        }
        assert renamed.keys() == theirs.shape().keys()
        np.testing.assert_allclose(mine.log_prior(position), theirs.log_prior(renamed), rtol=1e-5)
        np.testing.assert_allclose(
            mine.log_likelihood(position, mine.data), theirs.log_likelihood(renamed, theirs.data), rtol=1e-4, atol=1e-5
        )
        assert abs(mutant.log_prior(position) - theirs.log_prior(renamed)) > 1


@pytest.mark.usefixtures("x64")
def test_a_linear_layer_is_a_linear_regression():
    """Minus the Hessian is X'X / σ² + diag(1 / s²), and the gradient vanishes at the ridge solution: no tolerance for luck."""
    x = np.asarray(X, float)
    layer = jax.tree.map(lambda w: w.astype(float), eqx.nn.Linear(3, 1, key=jax.random.key(1)))
    posterior = from_equinox(layer, normal, jnp.asarray(x), jnp.asarray(Y, float), prior_scale=lambda name, shape: 2.0)
    design = np.concatenate([np.ones((40, 1)), x], axis=1)  # the leaves by name: bias, weight
    precision = design.T @ design / 0.3**2 + np.eye(4) / 4
    flat, unflatten = jax.flatten_util.ravel_pytree(posterior.start(jax.random.key(0)))
    hessian = jax.hessian(lambda v: posterior.log_density(unflatten(v)))(flat)
    np.testing.assert_allclose(-hessian, precision, rtol=1e-10)
    mode = np.linalg.solve(precision, design.T @ np.asarray(Y, float) / 0.3**2)
    gradient = jax.grad(lambda v: posterior.log_density(unflatten(v)))(jnp.asarray(mode))
    np.testing.assert_allclose(gradient, 0.0, atol=1e-9)


def test_chains_start_at_draws_of_the_prior():
    """The mean square of 4,000 starts in each array, against its scale: relative error √(2 / n)."""
    posterior = from_equinox(NET, normal, X, Y)
    starts = jax.vmap(posterior.start)(jax.random.split(jax.random.key(2), 4000))
    for name, w in starts.items():
        scale = fan_in_scale(name, w.shape[1:])
        assert abs(jnp.mean(w**2) / scale**2 - 1) < 5 * np.sqrt(2 / w.size), name


def test_chains_start_where_they_are_told():
    key = jax.random.key(3)
    start = jax.jit(lambda posterior, key: posterior.start(key))  # as the runner does: all that is no array is static
    given = start(from_equinox(NET, normal, X, Y, initial="network"), key)
    np.testing.assert_array_equal(given["layers.0.weight"], NET.layers[0].weight)
    made = start(from_equinox(NET, normal, X, Y, initial=mlp), key)
    np.testing.assert_array_equal(made["layers.2.bias"], mlp(key).layers[2].bias)
    assert made.keys() == given.keys() == start(from_equinox(NET, normal, X, Y), key).keys()


class WithScale(eqx.Module):
    """A network that learns its noise, counts something and keeps a table."""

    net: eqx.nn.MLP
    log_sd: jax.Array
    offsets: jax.Array  # whole numbers: kept

    def __call__(self, x):
        return self.net(x) + self.offsets[0].astype(x.dtype)


def test_what_is_no_real_number_is_kept():
    network = WithScale(NET, jnp.array(-1.0), jnp.array([2, 3]))
    posterior = from_equinox(network, lambda net, x: dist.Normal(jax.vmap(net)(x)[:, 0], jnp.exp(net.log_sd)), X, Y)
    assert "log_sd" in posterior.shape()
    assert "offsets" not in posterior.shape()
    position = posterior.start(jax.random.key(0))
    rebuilt = posterior.source.network(position)
    assert rebuilt.offsets.tolist() == [2, 3]
    assert rebuilt.net.layers[0].in_features == 3
    expected = dist.Normal(jax.vmap(rebuilt.net)(X)[:, 0] + 2, jnp.exp(position["log_sd"])).log_prob(Y)
    np.testing.assert_allclose(posterior.log_likelihood(position, posterior.data), expected, rtol=1e-5)


def test_one_program_for_new_data():
    """Everything that is an array is an argument: a posterior with other data has the same structure."""
    a, b = from_equinox(NET, normal, X, Y), from_equinox(mlp(jax.random.key(9)), normal, X + 1, 2 * Y)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert hash(jax.tree.structure(a)) == hash(jax.tree.structure(b))


def prior_draws(posterior):
    """Two chains of six starts, in the form of a run."""
    starts = jax.vmap(posterior.start)(jax.random.split(jax.random.key(4), 12))
    return az.from_dict({"posterior": {name: np.asarray(w).reshape(2, 6, *w.shape[1:]) for name, w in starts.items()}})


def test_predictions_are_those_of_the_network_at_each_draw():
    posterior = from_equinox(NET, normal, X, Y)
    dt = prior_draws(posterior)
    held_out = {"x": X[:7], "y": Y[:7]}
    result = erg.predictive(dt, posterior, key=jax.random.key(5), data=held_out, batch_size=4)
    means = erg.diagnostics.function_draws(dt, posterior, lambda net, x: jax.vmap(net)(x)[:, 0], held_out["x"]).values
    for chain, draw in ((0, 0), (1, 5)):
        one = {name: jnp.asarray(dt.posterior[name].values[chain, draw]) for name in dt.posterior.data_vars}
        expected = jax.vmap(posterior.source.network(one))(held_out["x"])[:, 0]
        np.testing.assert_allclose(means[chain, draw], expected, rtol=1e-4, atol=1e-5)
    by_hand = dist.Normal(means, 0.3).log_prob(Y[None, None, :7])
    lpd = jax.nn.logsumexp(by_hand, axis=(0, 1)) - np.log(12)
    np.testing.assert_allclose(result["held_out"]["lpd_y"], lpd, rtol=1e-4, atol=1e-4)
    residuals = (result["predictions"]["y"].values - means) / 0.3
    assert abs(residuals.mean()) < 5 / np.sqrt(residuals.size)
    assert abs(residuals.var() - 1) < 5 * np.sqrt(2 / residuals.size)  # 84 of them: sees 0.8
    own = erg.predictive(dt, posterior)["log_likelihood"]["y"]
    assert own.shape == (2, 6, 40)


def test_labels_and_inputs_of_any_structure():
    """Class probabilities through `predictive` are the mean of the softmax."""
    labels = jnp.asarray(np.arange(40) % 3, jnp.int32)
    layer = eqx.nn.Linear(3, 3, key=jax.random.key(6))
    posterior = from_equinox(
        layer, lambda net, x: dist.Categorical(logits=jax.vmap(net)(x["pixels"])), {"pixels": X}, labels
    )
    dt = prior_draws(posterior)
    held_out = {"x": {"pixels": X[:5]}, "y": labels[:5]}
    result = erg.predictive(dt, posterior, data=held_out, classes={"y": 3})
    expected = erg.diagnostics.function_draws(
        dt, posterior, lambda net, x: jax.nn.softmax(jax.vmap(net)(x["pixels"])), held_out["x"]
    ).mean(("chain", "draw"))
    np.testing.assert_allclose(result["held_out"]["probability_y"], expected, rtol=1e-4)
    assert erg.diagnostics.calibration(result)["value"].sel(score="accuracy") <= 1


def test_a_prior_of_ones_own():
    posterior = from_equinox(
        NET, normal, X, Y, log_prior=lambda net: -jnp.sum(jnp.abs(net.layers[0].weight)), initial="network"
    )
    position = posterior.start(jax.random.key(0))
    np.testing.assert_allclose(posterior.log_prior(position), -jnp.sum(jnp.abs(NET.layers[0].weight)), rtol=1e-6)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"batch shape \(40,\).*\[:, 0\]"):
        from_equinox(NET, lambda net, x: dist.Normal(jax.vmap(net)(x), 0.3), X, Y)
    with pytest.raises(TypeError, match="NumPyro distribution"):
        from_equinox(NET, lambda net, x: jax.vmap(net)(x)[:, 0], X, Y)
    with pytest.raises(ValueError, match="at least one floating-point array"):
        from_equinox(jnp.arange(3), normal, X, Y)
    with pytest.raises(ValueError, match=r"prior_scale of layers\.0\.weight"):
        from_equinox(NET, normal, X, Y, prior_scale=lambda name, shape: float("weight" not in name))
    with pytest.raises(ValueError, match="initial must be one of"):
        from_equinox(NET, normal, X, Y, initial="uniform")
    with pytest.raises(TypeError, match="which holds arrays"):
        from_equinox(NET, normal, X, Y, initial=NET)
    with pytest.raises(ValueError, match="make the network that was given"):
        from_equinox(NET, normal, X, Y, initial=lambda key: eqx.nn.Linear(3, 1, key=key))
    with pytest.raises(ValueError, match="with log_prior= give"):
        from_equinox(NET, normal, X, Y, log_prior=lambda net: jnp.zeros(()))
    with pytest.raises(ValueError, match="same length"):
        from_equinox(NET, normal, X, Y[:5])
    assert tree.size(from_equinox(NET, normal, X, Y).shape()) == 56

"""The posterior: its sums, its errors, and that it is a pytree with its data as leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg

X = jnp.array([1.0, 2.0, 4.0])


def log_prior(theta):
    return -0.5 * theta**2


def log_likelihood(theta, x):
    return -0.5 * (x - theta) ** 2


def make(**options):
    return erg.Posterior(log_prior, log_likelihood, X, **({"initial": jnp.array(0.5)} | options))


def test_log_density_is_the_sum():
    expected = -0.5 * 0.25 - 0.5 * sum((x - 0.5) ** 2 for x in (1.0, 2.0, 4.0))
    assert float(make().log_density(jnp.array(0.5))) == pytest.approx(expected)
    assert float(erg.Posterior(log_prior, initial=0.0).log_density(jnp.array(2.0))) == -2.0


def test_log_density_can_be_compiled():
    posterior, theta = make(), jnp.array(0.5)
    assert jax.jit(posterior.log_density)(theta) == posterior.log_density(theta)
    as_argument = jax.jit(lambda posterior, theta: posterior.log_density(theta))
    assert as_argument(posterior, theta) == posterior.log_density(theta)


def test_data_are_leaves_and_functions_are_static():
    """Other data of one shape do not retrace; the values are arguments of the compiled program."""
    traces = []

    def counted(theta, x):
        traces.append(None)
        return log_likelihood(theta, x)

    density = jax.jit(lambda posterior, theta: posterior.log_density(theta))
    first = erg.Posterior(log_prior, counted, X, initial=jnp.array(0.5))
    second = erg.Posterior(log_prior, counted, X + 1, initial=jnp.array(0.7))
    assert any(leaf is first.data for leaf in jax.tree.leaves(first))
    traces.clear()
    values = [float(density(p, jnp.array(0.5))) for p in (first, second, first)]
    assert len(traces) == 1
    assert values[0] == values[2] != values[1]


def test_round_trip_through_a_tree():
    posterior = make(dims={"position": ("a",)}, coords={"a": ("u", "v")})
    leaves, treedef = jax.tree.flatten(posterior)
    again = jax.tree.unflatten(treedef, leaves)
    assert again.num_data == 3
    assert (again.dims, again.coords) == ({"position": ("a",)}, {"a": ("u", "v")})


def test_start():
    assert make().start(jax.random.key(0)) == 0.5
    drawn = make(initial=lambda key: jax.random.normal(key)).start(jax.random.key(3))
    assert drawn == jax.random.normal(jax.random.key(3))
    with pytest.raises(ValueError, match="no start: construct it with initial="):
        make(initial=None).start(jax.random.key(0))
    with pytest.raises(TypeError, match="key must be a typed key"):
        make().start(0)


def test_constrain_and_observed():
    posterior = make(constrain=lambda theta: {"sigma": jnp.exp(theta)}, observed={"y": X})
    assert list(posterior.constrain(jnp.array(0.0))) == ["sigma"]
    np.testing.assert_array_equal(posterior.observed_data()["y"], X)
    assert list(make().constrain(jnp.array(0.0))) == ["position"]
    assert list(make().observed_data()) == ["data"]


def test_repr():
    assert repr(make()) == "Posterior(num_data=3, num_parameters=1)"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: erg.Posterior(3), TypeError, "log_prior must be a function; got 3"),
        (lambda: erg.Posterior(log_prior, 3, X), TypeError, "log_likelihood must be a function; got 3"),
        (lambda: erg.Posterior(log_prior, data=X), ValueError, "data were given without log_likelihood"),
        (lambda: make(num_data=5), ValueError, "num_data must be the number of rows of data, 3; got 5"),
        (lambda: erg.Posterior(log_prior, log_likelihood), TypeError, "num_data must be an integer; got None"),
        (lambda: make(initial=jnp.array(1)), TypeError, "initial must be of floating point"),
        (
            lambda: erg.Posterior(lambda t: -0.5 * t**2, initial=jnp.zeros(2)),
            ValueError,
            "log_prior must return a scalar.*Sum over the parameters",
        ),
        (
            lambda: erg.Posterior(log_prior, lambda t, x: jnp.sum(log_likelihood(t, x)), X, initial=jnp.array(0.5)),
            ValueError,
            r"one value a datum, of shape \(3,\)",
        ),
        (
            lambda: erg.Posterior(log_prior, log_likelihood, num_data=3).log_density(jnp.array(0.5)),
            ValueError,
            "holds no data",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()

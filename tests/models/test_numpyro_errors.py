"""Models and arguments that `from_numpyro` refuses: the message names the culprit and says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

import ergodica as erg

X, Y = np.linspace(0.0, 1.0, 6), np.linspace(1.0, 2.0, 6)


def by_rows(model, **fixed):
    return erg.from_numpyro(model, data={"y": Y}, **fixed)


def by_indices(model):
    return erg.from_numpyro(model, y=Y)


def ordinary(y):
    mu = numpyro.sample("mu", dist.Normal())
    with numpyro.plate("data", y.shape[0]):
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def local_latent_by_rows(y):
    with numpyro.plate("people", y.shape[0]):
        z = numpyro.sample("z", dist.Normal())
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def local_latent_by_indices(y):
    with numpyro.plate("people", y.shape[0], subsample_size=2) as i:
        z = numpyro.sample("z", dist.Normal())
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y[i])


@pytest.mark.parametrize(("make", "model"), [(by_rows, local_latent_by_rows), (by_indices, local_latent_by_indices)])
def test_local_latent(make, model):
    with pytest.raises(ValueError, match=r"'z' is local to the data plate 'people'.*make it global"):
        make(model)


def test_scan_over_data():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal())

        def step(carry, value):
            carry = numpyro.sample("state", dist.Normal(carry, 1.0))
            numpyro.sample("y", dist.Normal(carry, 1.0), obs=value)
            return carry, None

        scan(step, mu, y)

    with pytest.raises(ValueError, match=r"scan .* does not split into data.*Make whole series"):
        by_rows(model)


def mixture(enumerate, inside):
    infer = {"enumerate": "parallel"} if enumerate else {}

    def model(y):
        means = numpyro.sample("means", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        if not inside:
            which = numpyro.sample("which", dist.Categorical(jnp.array([0.5, 0.5])), infer=infer)
        with numpyro.plate("data", y.shape[0]):
            if inside:
                which = numpyro.sample("which", dist.Categorical(jnp.array([0.5, 0.5])), infer=infer)
            numpyro.sample("y", dist.Normal(means[which], 1.0), obs=y)

    return model


@pytest.mark.parametrize(
    ("enumerate", "inside", "message"),
    [
        (False, True, "discrete latent site 'which' is not enumerated.*Marginalise"),
        (False, False, "discrete latent site 'which' is not enumerated.*Marginalise"),
        (True, False, "enumerated latent site 'which' is not wholly inside the data plate 'data'"),
        (True, True, "enumerated latent site 'which' inside the data plate 'data' is not supported yet"),
    ],
)
def test_discrete_latents(enumerate, inside, message):
    with pytest.raises(ValueError, match=message):
        by_rows(mixture(enumerate, inside))


def test_several_subsampled_plates():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal())
        numpyro.plate("a", 5, subsample_size=2)
        with numpyro.plate("b", y.shape[0], subsample_size=2) as i:
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])

    with pytest.raises(ValueError, match=r"'a', 'b' are subsampled.*not supported yet"):
        by_indices(model)


def test_arrays_of_unequal_length():
    def model(x, y):
        ordinary(y)

    with pytest.raises(ValueError, match=r"same length.*data\['x'\] has 5, data\['y'\] has 6"):
        erg.from_numpyro(model, data={"x": X[:5], "y": Y})


def test_closed_over_numpy_array_indexed_by_the_plate():
    def model(n):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", 6, subsample_size=n) as i:
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=Y[i])

    with pytest.raises(TypeError, match=r"indexes a NumPy array.*as an argument.*jnp\.asarray"):
        erg.from_numpyro(model, n=2)


def test_numpy_arrays_given_as_arguments_are_converted():
    def model(y, n):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", y.shape[0], subsample_size=n) as i:
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])

    posterior = erg.from_numpyro(model, y=Y, n=2)
    expected = jax.scipy.stats.norm.logpdf(jnp.asarray(Y[[4, 1]]), 0.5).astype(jnp.float32)
    values = posterior.log_likelihood({"mu": jnp.array(0.5)}, jnp.array([4, 1]))
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_values_needed_while_tracing():
    def model(group, y):
        with numpyro.plate("groups", int(group.max()) + 1):
            effect = numpyro.sample("effect", dist.Normal())
        numpyro.sample("y", dist.Normal(effect[group], 1.0), obs=y)

    with pytest.raises(TypeError, match=r"needs the value of an array.*pass it as a plain number"):
        erg.from_numpyro(model, data={"group": np.arange(6) % 2, "y": Y})


def test_site_and_plate_of_one_name():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("y", y.shape[0]):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"'y' names both a site and a plate.*rename"):
        by_rows(model)


def test_two_sites_of_one_name():
    def model(y):
        numpyro.sample("mu", dist.Normal())
        mu = numpyro.sample("mu", dist.Normal())
        numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"Two sites .* 'mu'; rename"):
        by_rows(model)


def test_no_observed_site():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", y.shape[0]):
            numpyro.sample("y", dist.Normal(mu, 1.0))

    with pytest.raises(ValueError, match=r"no observed site.*obs=.*'mu', 'y'"):
        by_rows(model)


def test_no_latent_site():
    def model(y):
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    with pytest.raises(ValueError, match="no latent site"):
        by_rows(model)


def joint_law(y):
    mu = numpyro.sample("mu", dist.Normal())
    n = y.shape[0]
    numpyro.sample("y", dist.MultivariateNormal(mu * jnp.ones(n), jnp.eye(n)), obs=y)


def summed_event(y):
    mu = numpyro.sample("mu", dist.Normal())
    numpyro.sample("y", dist.Normal(mu * jnp.ones(y.shape[0]), 1.0).to_event(1), obs=y)


def summed_factor(y):
    mu = numpyro.sample("mu", dist.Normal())
    numpyro.factor("total", -jnp.sum((y - mu) ** 2))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def only_a_summed_factor(y):
    mu = numpyro.sample("mu", dist.Normal())
    numpyro.factor("total", -jnp.sum((y - mu) ** 2))


def standardised_inside(y):
    mu = numpyro.sample("mu", dist.Normal())
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y - jnp.mean(y))


def all_pairs(y):
    mu = numpyro.sample("mu", dist.Normal())
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=y[:, None] - y[None, :])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (joint_law, "site 'y' does not factorise by datum"),
        (summed_event, "site 'y' does not factorise by datum.*to_event"),
        (summed_factor, "does not factorise by datum: the site 'total' depends on the data"),
        (only_a_summed_factor, "does not factorise by datum: the observed site 'total'"),
        (standardised_inside, "does not factorise by datum.*changes with the rows beside it"),
        (all_pairs, "site 'y' does not factorise by datum"),
    ],
)
def test_likelihood_that_does_not_factorise(model, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        by_rows(model)


def test_standardising_within_a_batch_of_indices():
    def model(x, y):
        slope = numpyro.sample("slope", dist.Normal())
        with numpyro.plate("data", y.shape[0], subsample_size=2) as i:
            batch = x[i]
            numpyro.sample("y", dist.Normal(slope * (batch - batch.mean()), 1.0), obs=y[i])

    with pytest.raises(ValueError, match=r"does not factorise by datum.*changes with the rows beside it"):
        erg.from_numpyro(model, x=X, y=Y)


def test_an_array_forgotten_in_data():
    def model(x, y):
        slope = numpyro.sample("slope", dist.Normal())
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"6 rows of data but not with 7.*Name every array"):
        erg.from_numpyro(model, data={"x": X}, y=Y)


def test_a_named_plate_whose_indices_are_not_used():
    with pytest.raises(ValueError, match=r"all 6 indices of the plate 'data' but not with 5.*pick the rows"):
        erg.from_numpyro(ordinary, y=Y, plate="data")


def test_a_plate_that_is_not_there():
    with pytest.raises(ValueError, match=r"got 'people'.*'data' of size 6"):
        erg.from_numpyro(ordinary, y=Y, plate="people")
    with pytest.raises(ValueError, match=r"plate='people' does not grow.*'data' of size 6"):
        by_rows(ordinary, plate="people")


def test_neither_data_nor_a_subsampled_plate():
    with pytest.raises(ValueError, match=r"data=dict\(x=X, y=y\).*subsample_size.*plate="):
        by_indices(ordinary)


def test_data_and_a_subsampled_plate():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", y.shape[0], subsample_size=2) as i:
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y[i])

    with pytest.raises(ValueError, match="subsamples the plate 'data' itself"):
        by_rows(model)


def test_data_name_that_is_no_argument():
    with pytest.raises(TypeError, match=r"signature is \(y\).*'z'"):
        erg.from_numpyro(ordinary, data={"y": Y, "z": X})


def test_missing_argument():
    def model(x, y):
        ordinary(y)

    with pytest.raises(TypeError, match=r"signature is \(x, y\).*'x'"):
        by_rows(model)


def test_argument_given_twice():
    with pytest.raises(ValueError, match=r"\['y'\] are given twice"):
        by_rows(ordinary, y=Y)


@pytest.mark.parametrize("data", [Y, [Y]])
def test_data_that_is_no_dict(data):
    with pytest.raises(TypeError, match="data must be a dict"):
        erg.from_numpyro(ordinary, data=data)


def test_data_of_strings():
    with pytest.raises(TypeError, match=r"data\['y'\].*array of numbers"):
        erg.from_numpyro(ordinary, data={"y": np.array(["a", "b"])})


def test_argument_that_is_neither_array_nor_hashable():
    def model(y, options):
        ordinary(y)

    with pytest.raises(TypeError, match=r"options.*array or hashable; got set"):
        by_rows(model, options={1, 2})


def test_sites_that_come_and_go_with_the_number_of_data():
    def model(y):
        for i in range(y.shape[0] - 4):
            numpyro.sample(f"z{i}", dist.Normal())
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    with pytest.raises(ValueError, match="depend on how many data it sees: 'z2'"):
        by_rows(model)


def test_unknown_choice_of_deterministic_sites():
    with pytest.raises(ValueError, match="deterministic must be one of"):
        by_rows(ordinary, deterministic="some")

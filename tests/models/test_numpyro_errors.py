"""Models and arguments that `from_numpyro` refuses: the message names the culprit and says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.handlers import scale

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
        (False, True, "discrete latent site 'which' is not enumerated.*enumerate.*parallel.*MixtureSameFamily"),
        (False, False, "discrete latent site 'which' is not enumerated"),
        (True, False, "enumerated latent site 'which' is not wholly inside the data plate 'data'"),
    ],
)
def test_discrete_latents(enumerate, inside, message):
    with pytest.raises(ValueError, match=message):
        by_rows(mixture(enumerate, inside))


PARALLEL = {"enumerate": "parallel"}


def test_enumerated_latent_in_another_plate():
    def model(y):
        with numpyro.plate("groups", 3):
            which = numpyro.sample("which", dist.Bernoulli(0.5), infer=PARALLEL)
        with numpyro.plate("data", y.shape[0]):
            numpyro.sample("y", dist.Normal(jnp.sum(which).astype(float), 1.0), obs=y)

    with pytest.raises(ValueError, match="'which' is not wholly inside the data plate 'data'"):
        by_rows(model)


def test_enumerated_latent_without_finite_support():
    def model(y):
        rate = numpyro.sample("rate", dist.Exponential())
        with numpyro.plate("data", y.shape[0]):
            count = numpyro.sample("count", dist.Poisson(rate), infer=PARALLEL)
            numpyro.sample("y", dist.Normal(count.astype(float), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"'count' cannot be summed out.*no finite support"):
        by_rows(model)


def test_enumerated_latents_of_too_many_values():
    def model(y):
        rate = numpyro.sample("rate", dist.Beta(1.0, 1.0))
        with numpyro.plate("data", y.shape[0], dim=-2), numpyro.plate("inner", 13, dim=-1):
            which = numpyro.sample("which", dist.Bernoulli(rate), infer=PARALLEL)
            numpyro.sample("y", dist.Normal(which.astype(float), 1.0), obs=y[:, None] + jnp.zeros(13)[None])

    with pytest.raises(ValueError, match=r"take 8192 values together \('which' 2\*\*13\), more than the 4096.*forward"):
        by_rows(model)


@pytest.mark.parametrize(("of_latent", "name"), [(True, "which"), (False, "y")])
def test_enumerated_latents_under_a_scale(of_latent, name):
    def model(y):
        means = numpyro.sample("means", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        with numpyro.plate("data", y.shape[0]):
            with scale(scale=2.0 if of_latent else 1.0):
                which = numpyro.sample("which", dist.Bernoulli(0.5), infer=PARALLEL)
            with scale(scale=2.0):
                numpyro.sample("y", dist.Normal(means[which], 1.0), obs=y)

    with pytest.raises(ValueError, match=f"'{name}'.*scaled, and the sum over.*handlers.scale away"):
        by_rows(model)


@pytest.mark.parametrize("kind", ["factor", "deterministic", "prior"])
def test_enumerated_latent_that_leaves_the_data_plate(kind):
    def model(y):
        numpyro.sample("mu", dist.Normal())
        with numpyro.plate("data", y.shape[0]):
            which = numpyro.sample("which", dist.Bernoulli(0.5), infer=PARALLEL)
            numpyro.sample("y", dist.Normal(which.astype(float), 1.0), obs=y)
        if kind == "factor":
            numpyro.factor("outside", jnp.max(which).astype(float))
        elif kind == "deterministic":
            numpyro.deterministic("outside", jnp.max(which))
        else:
            numpyro.sample("outside", dist.Normal(jnp.max(which).astype(float), 0.1))

    with pytest.raises(ValueError, match=r"'outside' is outside the data plate but depends on.*'which'"):
        by_rows(model)


def test_all_deterministic_sites_beside_an_enumerated_latent():
    with pytest.raises(ValueError, match=r"deterministic='all' cannot report.*'which'"):
        by_rows(mixture(True, True), deterministic="all")


def test_subsampled_plates_that_cross():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal())
        a, b = numpyro.plate("a", 6, subsample_size=2, dim=-1), numpyro.plate("b", 5, subsample_size=2, dim=-2)
        with a as i:
            numpyro.factor("only a", mu * y[i])
        with b as j:
            numpyro.factor("only b", mu * j[:, None].astype(float))
        with a as i, b as j:
            numpyro.sample("both", dist.Normal(mu, 1.0), obs=y[i][None] + j[:, None].astype(float))

    message = r"The plates 'a' and 'b' cross: the sites 'both' are in both.*plate='a' or plate='b'"
    with pytest.raises(ValueError, match=message):
        by_indices(model)
    with pytest.raises(ValueError, match="cross"):
        erg.from_numpyro(model, y=Y, plate=("a", "b"))
    assert erg.from_numpyro(model, y=Y, plate="b").num_data == 5


@pytest.mark.parametrize(
    ("plate", "error", "message"),
    [
        ((), ValueError, "one plate, or several once each"),
        (("data", "data"), ValueError, "one plate, or several once each"),
        (("data", "people"), ValueError, "got 'people'.*'data' of size 6"),
    ],
)
def test_names_of_several_plates(plate, error, message):
    with pytest.raises(error, match=message):
        erg.from_numpyro(ordinary, y=Y, plate=plate)


def test_several_plates_where_data_gives_the_rows():
    with pytest.raises(TypeError, match="plate must be a name where data= gives the rows"):
        by_rows(ordinary, plate=("data",))


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

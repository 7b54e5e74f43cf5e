"""Travelling chains: where they reduce to known kernels, the order of their visits, and their law by simulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

import ergodica as erg
from ergodica.estimators import Conducive, Minibatch
from ergodica.samplers import BAOAB, SGLD, Averaged, Federated
from ergodica.samplers.federated import arrive, local_run
from ergodica.samplers.visits import balanced_local_steps, visit_probabilities
from tests.support.affine import Prepared, step_map
from tests.support.chains import time_averages
from tests.support.shards import closed_form, exact_surrogates, gaussian_mean_shards, regression_shards
from tests.support.statistics import REJECTION, assert_mean, z_scores

NUM_STEPS = 200


@functools.partial(jax.jit, static_argnames="num_steps")
def path(kernel, key, position, num_steps=NUM_STEPS):
    """States of one chain, as the runner makes it."""
    key_init, key_run = jax.random.split(key)

    def body(state, i):
        state, info = kernel.step(jax.random.fold_in(key_run, i), state)
        return state, (state, info)

    return jax.lax.scan(body, kernel.init(key_init, position), jnp.arange(num_steps))[1]


class TestReductions:
    @pytest.mark.parametrize("batch_size", [4, None])
    def test_one_client_is_sgld_bitwise(self, batch_size):
        """With surrogates, however wrong, and without."""
        posterior = regression_shards().posterior
        scheme = "full" if batch_size is None else "uniform"
        pooled = SGLD(Minibatch(posterior, batch_size, scheme), 1e-3)
        expected = path(pooled, jax.random.key(0), posterior.initial)[0].position
        one = erg.Shards(posterior, np.zeros(posterior.num_data))
        wrong = erg.estimators.GaussianSurrogates(jnp.ones((1, 3)), jnp.full((1, 3), 7.0))
        for surrogates in (None, wrong):
            sampler = Federated(SGLD(Conducive(one, surrogates, batch_size), 1e-3), 7)
            found = path(sampler, jax.random.key(0), posterior.initial)[0].position
            np.testing.assert_array_equal(found, expected)

    def test_strength_0_is_dsgld_bitwise(self):
        shards = regression_shards()
        q = erg.estimators.laplace_surrogates(shards)

        def positions(surrogates, strength):
            gradient = Conducive(shards, surrogates, 4, strength=strength)
            kernel = Federated(SGLD(gradient, 1e-3), 7)
            return path(kernel, jax.random.key(0), shards.posterior.initial)[0].position

        dsgld = positions(None, 1.0)
        np.testing.assert_array_equal(positions(q, 0.0), dsgld)
        assert np.any(np.asarray(positions(q, 1.0)) != np.asarray(dsgld))

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda g: SGLD(g, 0.01), id="SGLD", marks=pytest.mark.slow),
            pytest.param(lambda g: BAOAB(g, 0.1), id="BAOAB"),
        ],
    )
    def test_a_site_makes_the_steps_that_the_chain_makes(self, make):
        """Visit by visit with what each client is sent, against the chain in one process."""
        shards = regression_shards()
        gradient = Conducive(shards, erg.estimators.laplace_surrogates(shards), 2)
        sampler, key = Federated(make(gradient), (3, 1, 4)), jax.random.key(3)
        states, infos = path(sampler, key, shards.posterior.initial, 40)
        key_init, key_run = jax.random.split(key)
        inner, done, found = sampler.init(key_init, shards.posterior.initial).inner, 0, []
        clients = np.asarray(infos.client_index)
        while done < 32:
            client = int(clients[done])
            length = (3, 1, 4)[client]
            site = sampler.only(client)
            inner, positions = local_run(site, key_run, arrive(site, inner), jnp.asarray(done, jnp.int32), length)
            found.append(positions)
            done += length
        np.testing.assert_allclose(np.concatenate(found)[:32], states.position[:32], rtol=1e-9)


class TestVisits:
    def test_lengths_and_shares(self):
        """Each visit has its client's length; steps are made in the shares asked for, visits in proportion to f / tau."""
        shards = gaussian_mean_shards()
        shares, lengths = np.array([0.2, 0.3, 0.5]), np.array([1, 4, 10])
        sampler = Federated(SGLD(Conducive(shards, None, 1, probabilities=shares), 1e-9), lengths)
        _, infos = path(sampler, jax.random.key(1), shards.posterior.initial, 60_000)
        client, visit = np.asarray(infos.client_index), np.asarray(infos.visit_index)
        first = np.flatnonzero(np.diff(visit, prepend=-1))
        assert np.all(np.diff(visit) <= 1)
        np.testing.assert_array_equal(np.diff(first), lengths[client[first[:-1]]])
        counts = np.bincount(client[first], minlength=3)
        expected = visit_probabilities(shares, lengths) * counts.sum()
        assert np.sum((counts - expected) ** 2 / expected) < chi2.isf(1e-6, 2)
        np.testing.assert_allclose(np.bincount(client) / client.size, shares, atol=0.01)
        # successive visits are independent
        pairs = np.zeros((3, 3))
        np.add.at(pairs, (client[first[:-1]], client[first[1:]]), 1)
        both = np.outer(expected, expected) / expected.sum()
        assert np.sum((pairs - both) ** 2 / both) < chi2.isf(1e-6, 8)

    @pytest.mark.parametrize("num_chains", [pytest.param(2, marks=pytest.mark.slow), 5])
    def test_permutations_do_not_collide(self, num_chains):
        """Through the runner: no two chains at one client, every client once a round, a new order each round."""
        shards = gaussian_mean_shards((4,) * 5, (0.0,) * 5, (1.0,) * 5)
        sampler = Federated(SGLD(Conducive(shards, None, 2, probabilities="uniform"), 0.01), 2, "permutation")
        dt = erg.sample(
            jax.random.key(2),
            sampler,
            num_samples=100,
            num_warmup=0,
            num_chains=num_chains,
            progress=False,
            probes=False,
        )
        clients = dt.sample_stats["client_index"].values[:, ::2]
        np.testing.assert_array_equal(clients, dt.sample_stats["client_index"].values[:, 1::2])
        assert all(len(set(column)) == num_chains for column in clients.T)
        rounds = clients.reshape(num_chains, 10, 5)
        np.testing.assert_array_equal(np.sort(rounds), np.broadcast_to(np.arange(5), rounds.shape))
        assert len({tuple(order) for order in rounds[0].tolist()}) > 5

    def test_more_chains_than_clients(self):
        gradient = Conducive(gaussian_mean_shards((4,) * 2, (0.0,) * 2, (1.0,) * 2), None, 2)
        sampler = Federated(SGLD(gradient, 0.01), 2, "permutation")
        with pytest.raises(ValueError, match="at most as many chains as clients, 2"):
            erg.sample(jax.random.key(0), sampler, num_samples=2, num_warmup=0, num_chains=3, progress=False)

    def test_balanced_lengths_take_the_same_time(self):
        steps, shares = balanced_local_steps([1.0, 2.0, 8.0], mean=100)
        np.testing.assert_allclose(steps * np.array([1.0, 2.0, 8.0]), steps[0], rtol=0.02)
        np.testing.assert_allclose(visit_probabilities(shares, steps), 1 / 3)
        assert abs(steps.mean() - 100) < 1


class TestShippedStep:
    @pytest.mark.usefixtures("x64")
    def test_jacobians_give_the_law(self):
        """Transition, noise and drift of the shipped step at each client, by differentiation, through scalar closed forms."""
        shards = gaussian_mean_shards()
        h, shares = 2e-4, np.full(3, 1 / 3)
        q = exact_surrogates(shards, precision_factor=0.8)
        sampler = Federated(SGLD(Conducive(shards, q, probabilities=shares), h), (5, 50, 20))
        maps = []
        for s in range(3):
            state = sampler.gradient.visit(sampler.gradient.init(jax.random.key(0), 0.0), jnp.array(s))
            maps.append(step_map(Prepared(sampler.kernel, gradient=state), shards.posterior.initial))
        a, b, w = (
            np.array([np.ravel(getattr(m, name))[0] for m in maps]) for name in ("transition", "offset", "loading")
        )
        np.testing.assert_allclose(w**2, 2 * h, rtol=1e-12)
        p = visit_probabilities(shares, (5, 50, 20))
        _, (mean, variance) = closed_form((1 - a) / h, b / h, 0.0, h, p, np.array([5, 50, 20]))
        law = erg.predict_federated(jax.random.key(0), sampler).law.steps
        centre = erg.predict_federated(jax.random.key(0), sampler).centre
        np.testing.assert_allclose(law.mean[0] + centre, mean, rtol=1e-6)
        np.testing.assert_allclose(law.covariance[0, 0], variance, rtol=1e-8)


H = 1e-4  # in the table of the law's tests, 2e-4 of the half-step convention


def simulated(sampler, prediction, key, num_chains, num_steps):
    """Time averages of x and x^2 less its prediction, one row a chain, from chains that start in the predicted law."""
    mean, sd = (
        float(prediction.law.steps.mean[0] + prediction.centre),
        float(prediction.law.steps.covariance[0, 0]) ** 0.5,
    )
    key_start, key_run = jax.random.split(key)
    start = mean + sd * jax.random.normal(key_start, (num_chains,))
    burn = min(200, 4 * int(np.max(np.asarray(sampler.local_steps))))
    return time_averages(key_run, sampler, start, _moments, mean, num_discarded=burn, num_steps=num_steps), sd


def _moments(x, mean):
    return jnp.stack([x - mean, (x - mean) ** 2])


CASES = {
    # local steps, probabilities, factor on the surrogates' precision (None: no surrogates), strength, chains, steps
    "FSGLD-wrong-20": (20, "sizes", 0.8, 1.0, 6144, 900),
}
SLOW_CASES = {
    "FSGLD-1": (1, "uniform", 1.0, 1.0, 4096, 600),
    "FSGLD-200": (200, "uniform", 1.0, 1.0, 8192, 4000),
    "FSGLD-wrong-200": (200, "uniform", 0.8, 1.0, 8192, 4000),
    "DSGLD-1": (1, "sizes", None, 1.0, 4096, 1500),
    "DSGLD-50": (50, "uniform", None, 1.0, 8192, 4000),
    "strength-half-50": (50, "sizes", 1.0, 0.5, 8192, 4000),
    "lengths": ((5, 50, 20), "uniform", 0.8, 1.0, 8192, 2000),
}


def check_case(local_steps, probabilities, factor, strength, num_chains, num_steps):
    shards = gaussian_mean_shards()
    q = None if factor is None else exact_surrogates(shards, precision_factor=factor)
    gradient = Conducive(shards, q, 10, probabilities=probabilities, strength=strength)
    sampler = Federated(SGLD(gradient, H), local_steps)
    prediction = erg.predict_federated(jax.random.key(0), sampler)
    averages, sd = simulated(sampler, prediction, jax.random.key(5), num_chains, num_steps)
    assert_mean(averages[:, 1], sd**2, smallest_error=0.02)
    assert_mean(averages[:, 0] + sd, sd, smallest_error=0.02)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.sweep
def test_law_by_simulation(case):
    """Mean, in posterior sds, and variance over all steps of the unequal shards; sees errors of 2%."""
    check_case(*CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES)
def test_law_by_simulation_of_long_visits(case):
    check_case(*SLOW_CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("local_steps", [1, 20, 200])
@pytest.mark.parametrize("fit", ["laplace", "moments"])
def test_fitted_surrogates_do_what_was_predicted(fit, local_steps):
    """Ten clients far apart, surrogates from 3,000 draws of local runs or by Laplace: variance within 10% of the prediction."""
    centres = np.random.default_rng(0).uniform(-6, 6, 10)
    shards = gaussian_mean_shards((200,) * 10, centres, (0.125,) * 10, 0.2)
    if fit == "laplace":
        q = erg.estimators.laplace_surrogates(shards)
    else:
        q = erg.estimators.moment_surrogates(jax.random.key(1), shards, 5e-4, num_samples=3000, batch_size=10)
    sampler = Federated(SGLD(Conducive(shards, q, 10), 5e-5), local_steps)
    prediction = erg.predict_federated(jax.random.key(0), sampler)
    averages, sd = simulated(sampler, prediction, jax.random.key(5), 2048, max(1000, 10 * local_steps))
    averages = np.asarray(averages, np.float64)
    ratio, error = averages[:, 1].mean() / sd**2, averages[:, 1].std() / sd**2 / np.sqrt(len(averages))
    assert 5 * error < 0.1
    assert abs(ratio - 1) < 0.1
    assert abs(averages[:, 0].mean()) < 0.1 * sd
    if fit == "laplace":
        np.testing.assert_allclose(prediction.inflation, prediction.at_best, rtol=1e-3)
    else:
        assert prediction.largest > float(prediction.at_best.max()) or local_steps == 1


@pytest.mark.optimised
def test_simulation_rejects_a_wrong_law():
    """The law of visits of one step, for visits of 20 with wrong surrogates: the test above would see it."""
    shards = gaussian_mean_shards()
    gradient = Conducive(shards, exact_surrogates(shards, precision_factor=0.8), 10)
    key = jax.random.key(0)
    short = erg.predict_federated(key, Federated(SGLD(gradient, H), 1))
    averages, sd = simulated(Federated(SGLD(gradient, H), 20), short, jax.random.key(5), 4096, 800)
    assert np.abs(z_scores(averages[:, 1], sd**2)) > REJECTION


class TestBadInput:
    def test_kernels(self):
        shards = gaussian_mean_shards()
        gradient = Conducive(shards)
        sgld = SGLD(gradient, 1e-4)
        with pytest.raises(TypeError, match="Wrap Averaged around"):
            Federated(Averaged(sgld))
        with pytest.raises(TypeError, match="a gradient that knows clients"):
            Federated(SGLD(Minibatch(shards.posterior, 5), 1e-4))
        with pytest.raises(ValueError, match="AMAGOLD accepts or rejects"):
            Federated(erg.samplers.AMAGOLD(gradient, 1e-4, 3))
        with pytest.raises(ValueError, match="holds several chains"):
            Federated(erg.samplers.ReplicaExchange(gradient, 1e-4, (2.0,)))
        with pytest.raises(ValueError, match="give noise="):
            Federated(erg.samplers.NoiseCorrectedSGLD(gradient, 1e-4))
        Averaged(Federated(sgld))
        Federated(erg.samplers.PreconditionedSGLD(gradient, 1e-4))
        Federated(erg.samplers.NoiseCorrectedSGLD(gradient, 1e-4, 1.0))

    def test_steps_and_schedules(self):
        sgld = SGLD(Conducive(gaussian_mean_shards()), 1e-4)
        with pytest.raises(TypeError, match="local_steps must be an integer, or 3 of them"):
            Federated(sgld, 2.5)
        with pytest.raises(TypeError, match="local_steps must be an integer, or 3 of them"):
            Federated(sgld, (1, 2))
        with pytest.raises(ValueError, match="local_steps must be at least 1; got 0"):
            Federated(sgld, (1, 0, 2))
        with pytest.raises(ValueError, match="schedule must be one of"):
            Federated(sgld, 2, "random")
        with pytest.raises(ValueError, match="visits all clients equally often"):
            Federated(sgld, 2, "permutation")

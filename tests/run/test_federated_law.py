"""The predicted law of travelling chains: against printed values, scalar closed forms, enumeration, and its own limits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.estimators import Conducive
from ergodica.run import federated_bias, federated_law
from ergodica.run.federated_law import ClientSteps
from ergodica.samplers import BAOAB, SGLD, Federated
from tests.support.shards import closed_form, exact_surrogates, gaussian_mean_shards, regression_shards

pytestmark = pytest.mark.usefixtures("x64")

H, BATCH = 2e-4, 10  # step of the half-step convention
EXACT_VARIANCE = 1 / 650.1


def sampler_of(kind, probabilities, local_steps, shards=None):
    shards = gaussian_mean_shards() if shards is None else shards
    surrogates, strength = {
        "DSGLD": (None, 1.0),
        "FSGLD": (exact_surrogates(shards), 1.0),
        "precision": (exact_surrogates(shards, precision_factor=0.8), 1.0),
        "strength": (exact_surrogates(shards), 0.5),
        "means": (exact_surrogates(shards, mean_shift=0.1), 1.0),
    }[kind]
    gradient = Conducive(shards, surrogates, BATCH, probabilities=probabilities, strength=strength)
    return Federated(SGLD.from_paper(gradient, H), local_steps)


# mean and variance where visits end, from closed forms evaluated elsewhere and simulated there
PRINTED = {
    ("DSGLD", "uniform"): ((0.6153, 2.036e-2), (0.1671, 0.7692)),
    ("DSGLD", "sizes"): ((0.6153, 2.775e-2), (0.6153, 0.5863)),
    ("FSGLD", "uniform"): ((0.6153, 1.021e-2), (0.6153, 1.021e-2)),
    ("FSGLD", "sizes"): ((0.6153, 6.886e-3), (0.6153, 6.886e-3)),
    ("precision", "uniform"): ((0.6153, 1.061e-2), (0.6028, 1.999e-2)),
    ("precision", "sizes"): ((0.6153, 7.721e-3), (0.6153, 3.006e-2)),
    ("strength", "uniform"): ((0.6153, 1.271e-2), (0.5330, 8.714e-2)),
    ("strength", "sizes"): ((0.6153, 1.210e-2), (0.6153, 0.1517)),
    ("means", "uniform"): ((0.6153, 1.035e-2), (0.6153, 1.429e-2)),
    ("means", "sizes"): ((0.6153, 6.886e-3), (0.6153, 6.886e-3)),
}


@pytest.mark.parametrize(("kind", "probabilities"), PRINTED)
@pytest.mark.swept_after(3)
def test_printed_values(kind, probabilities):
    """Through the shipped gradient, kernel and prediction, for visits of 1 and of 50 steps."""
    for local_steps, (mean, variance) in zip((1, 50), PRINTED[kind, probabilities], strict=True):
        found = erg.predict_federated(jax.random.key(0), sampler_of(kind, probabilities, local_steps))
        at_end = found.law.visits
        assert abs(float(at_end.mean[0] + found.centre) - mean) < 6e-5
        assert abs(float(at_end.covariance[0, 0]) / variance - 1) < 6e-4


def paper_shards():
    """Ten equal shards of 200 rows with centres on (-6, 6), data variance 0.125 under a likelihood of variance 1, prior N(0, 5)."""
    centres = np.random.default_rng(0).uniform(-6, 6, 10)
    return gaussian_mean_shards((200,) * 10, centres, (0.125,) * 10, 0.2)


def test_paper_setting():
    """h = 1e-4, m = 10: the variance is 1.184e-3 with exact surrogates at any length, the posterior's is 5.0e-4.

    Without surrogates it is over a hundred times the posterior's already at one step, and thousands of times at 200.
    """
    shards = paper_shards()
    lam, h = 2000.2, 1e-4
    exact = (1 + h / 4 * 2000**2 * 0.125 / 10) / (lam * (1 - h * lam / 4))
    found = {}
    for kind in ("FSGLD", "DSGLD"):
        surrogates = exact_surrogates(shards) if kind == "FSGLD" else None
        for local_steps in (1, 20, 200):
            sampler = Federated(SGLD.from_paper(Conducive(shards, surrogates, 10), h), local_steps)
            prediction = erg.predict_federated(jax.random.key(0), sampler)
            found[kind, local_steps] = float(prediction.law.steps.covariance[0, 0]) * lam
            if kind == "FSGLD":
                np.testing.assert_allclose(found[kind, local_steps], exact * lam, rtol=1e-8)
                np.testing.assert_allclose((1 + prediction.inflation[0]) ** 2, exact * lam, rtol=1e-8)
                assert np.max(prediction.misfit) < 1e-12
    assert found["DSGLD", 1] > 100
    assert found["DSGLD", 200] > 4000


def test_equal_shards_have_the_closed_form():
    r"""DSGLD: V + Vs (1 - F^tau)/(1 + F^tau), with V that of exact surrogates and Vs the variance of the local fixed points."""
    means, h, m, l0, count, size = np.array([-2.0, 0.3, 1.0, 4.0]), 1e-3, 5, 0.5, 4, 30
    shards = gaussian_mean_shards((size,) * count, means, (1.5,) * count, l0)
    lam = l0 + count * size
    for tau in (1, 3, 40):
        sampler = Federated(SGLD.from_paper(Conducive(shards, None, m), h), tau)
        law = erg.predict_federated(jax.random.key(0), sampler).law
        F = (1 - h * lam / 2) ** tau
        V = (1 + h / 4 * (count * size) ** 2 * 1.5 / m) / (lam * (1 - h * lam / 4))
        Vs = np.var(count * size * means / lam)
        np.testing.assert_allclose(law.visits.covariance[0, 0], V + Vs * (1 - F) / (1 + F), rtol=1e-8)


@pytest.mark.parametrize("local_steps", [1, 7, (1, 20, 4)])
def test_scalar_closed_form(local_steps):
    """Where visits end and over all steps, for visits of unequal lengths and any probabilities."""
    rng = np.random.default_rng(3)
    precision, pull, noise = rng.uniform(1, 5, 3), rng.normal(size=3), rng.uniform(0, 4, 3)
    p, h = np.array([0.2, 0.5, 0.3]), 0.1
    steps = ClientSteps((1 - h * precision)[:, None, None], h * pull[:, None], (2 * h + h**2 * noise)[:, None, None])
    law = federated_law.federated_law(steps, p, local_steps)
    for found, expected in zip(
        (law.visits, law.steps), closed_form(precision, pull, noise, h, p, local_steps), strict=True
    ):
        np.testing.assert_allclose((found.mean[0], found.covariance[0, 0]), expected, rtol=1e-10)


def clients_of(kernel, seed=5, num_clients=3, size=2):
    """Random clients whose mean curvature is positive, read off a kernel."""
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(num_clients, size, size))
    curvature = np.eye(size) + roots @ roots.transpose(0, 2, 1)
    noise = curvature[::-1] / 3
    return federated_law.client_steps(kernel, jnp.zeros(size), curvature, rng.normal(size=(num_clients, size)), noise)


@pytest.mark.parametrize(
    "make", [lambda g: SGLD(g, 0.05), lambda g: BAOAB(g, 0.3, friction=2.0)], ids=["SGLD", "BAOAB"]
)
def test_law_is_left_as_it_is_by_every_visit(make):
    """Push the moments forward through the visits, in the uncentred form: they must come out as they went in."""
    gradient = erg.estimators.Minibatch(regression_shards().posterior, scheme="full")
    clients, p, tau = clients_of(make(gradient)), np.array([0.5, 0.2, 0.3]), np.array([3, 1, 6])
    law = federated_law.federated_law(clients._replace(select=None), p, tau)
    mean, covariance = law.visits
    means, seconds, on_the_way = [], [], []
    for F, b, Q, share, length in zip(*clients[:3], p, tau, strict=True):
        first, second = mean, covariance + np.outer(mean, mean)
        for _ in range(length):
            cross = np.outer(F @ first, b)
            first, second = F @ first + b, F @ second @ F.T + cross + cross.T + np.outer(b, b) + Q
            on_the_way.append((share / (p @ tau), first, second))
        means.append(share * first)
        seconds.append(share * second)
    np.testing.assert_allclose(np.sum(means, 0), mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.sum(seconds, 0) - np.outer(mean, mean), covariance, rtol=1e-9, atol=1e-12)
    average = sum(w * m for w, m, _ in on_the_way)
    np.testing.assert_allclose(law.steps.mean, average, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        law.steps.covariance, sum(w * s for w, _, s in on_the_way) - np.outer(average, average), rtol=1e-8, atol=1e-12
    )


def test_iterative_solution_agrees_with_the_dense_one(monkeypatch):
    gradient = erg.estimators.Minibatch(regression_shards().posterior, scheme="full")
    clients = clients_of(SGLD(gradient, 0.05), size=6)
    dense = federated_law.federated_law(clients, np.full(3, 1 / 3), 5)
    monkeypatch.setattr(federated_law, "_DENSE", 0)
    found = federated_law.federated_law(clients, np.full(3, 1 / 3), 5)
    np.testing.assert_allclose(found.steps.covariance, dense.steps.covariance, rtol=1e-8)


def test_one_client_is_the_kernel_by_itself():
    """The law of SGLD with correlations, from the other module's equation."""
    gradient = erg.estimators.Minibatch(regression_shards().posterior, scheme="full")
    clients = clients_of(SGLD(gradient, 0.05), num_clients=1)
    law = federated_law.federated_law(clients, np.ones(1), 4)
    alone = federated_law.linear_law.solve_lyapunov(clients.transition[0], clients.added[0])
    np.testing.assert_allclose(law.steps.covariance, alone, rtol=1e-9)
    np.testing.assert_allclose(law.visits.covariance, alone, rtol=1e-9)


def test_permuted_visits_of_exact_surrogates_and_of_none():
    """By enumeration of the 6 orders of 3 clients: DSGLD with one local step has less variance than under independent visits.

    With exact surrogates the drift is the same at all clients, and so is the mean after any order.
    """
    shards = gaussian_mean_shards((100,) * 3, (-2.0, 0.5, 1.0), (1.0,) * 3)
    found = {}
    for kind in ("DSGLD", "FSGLD"):
        sampler = sampler_of(kind, "uniform", 1, shards)
        prediction = erg.predict_federated(jax.random.key(0), sampler)
        F, b, Q = (np.asarray(x)[..., 0] for x in _steps_of(sampler, prediction))
        shifts, noises = [], []
        for order in itertools.permutations(range(3)):
            shift, noise = 0.0, 0.0
            for s in order:
                shift, noise = F[s, 0] * shift + b[s], F[s, 0] ** 2 * noise + Q[s, 0]
            shifts.append(shift)
            noises.append(noise)
        variance = (np.mean(noises) + np.var(shifts)) / (1 - np.prod(F[:, 0]) ** 2)
        found[kind] = variance, float(prediction.law.visits.covariance[0, 0])
    assert found["DSGLD"][0] < 0.75 * found["DSGLD"][1]
    np.testing.assert_allclose(*found["FSGLD"], rtol=1e-9)


def _steps_of(sampler, prediction):
    gradient = sampler.gradient
    drift, curvature = federated_bias._expand(gradient, prediction.centre, False)
    noise = jax.vmap(lambda s: gradient.covariance(prediction.centre, s))(jnp.arange(3))
    steps = federated_law.client_steps(sampler.kernel, prediction.centre, curvature, drift, noise)
    return steps.transition, steps.drift, steps.added


class TestPrediction:
    def test_diagonal_is_full_where_nothing_is_correlated(self):
        sampler = sampler_of("precision", "uniform", (3, 50, 9))
        full, diagonal = (erg.predict_federated(jax.random.key(0), sampler, curvature=c) for c in ("full", "diagonal"))
        np.testing.assert_allclose(full.inflation, diagonal.inflation, rtol=1e-9)
        np.testing.assert_allclose(full.shift, diagonal.shift, rtol=1e-6)
        assert "coordinate by coordinate" in str(diagonal)
        assert "With 3 to 50 local steps" in str(full)

    @pytest.mark.sweep
    def test_correlated_regression(self):
        """Exact surrogates leave what step and batch do; without them the draws follow the clients."""
        shards = regression_shards()
        q = erg.estimators.laplace_surrogates(shards)
        h = 1e-3

        def predicted(surrogates, local_steps):
            gradient = Conducive(shards, surrogates, 2)
            return erg.predict_federated(jax.random.key(0), Federated(SGLD(gradient, h), local_steps), curvature="full")

        good, bad = predicted(q, 100), predicted(None, 100)
        np.testing.assert_allclose(good.inflation, good.at_best, rtol=1e-6)
        np.testing.assert_allclose(good.shift, 0, atol=1e-5)
        assert np.max(good.misfit) < 1e-12
        np.testing.assert_allclose(bad.misfit, 1, rtol=1e-9)
        assert bad.largest > 3 * good.largest
        assert np.all(good.surrogate_error < good.gradient_size)

    def test_unstable(self):
        shards = gaussian_mean_shards()
        with pytest.raises(ValueError, match="step_size must be smaller: over visits"):
            erg.predict_federated(jax.random.key(0), Federated(SGLD(Conducive(shards), 0.01), 5))

    def test_refuses_what_it_does_not_know(self):
        shards = gaussian_mean_shards()
        gradient = Conducive(shards, probabilities="uniform")
        key = jax.random.key(0)
        with pytest.raises(ValueError, match="visits must be independent"):
            erg.predict_federated(key, Federated(SGLD(gradient, 1e-4), 5, "permutation"))
        with pytest.raises(TypeError, match="must be a Federated kernel"):
            erg.predict_federated(key, SGLD(gradient, 1e-4))
        with pytest.raises(ValueError, match="travel over clients"):
            erg.predict_bias(key, Federated(SGLD(gradient, 1e-4), 5))
        with pytest.raises(ValueError, match="step_size must be a number"):
            erg.predict_federated(key, Federated(SGLD(gradient, lambda i: 1e-4 + 0.0 * i.astype(float)), 5))
        with pytest.raises(ValueError, match="steps that are affine"):
            erg.predict_federated(key, Federated(erg.samplers.PreconditionedSGLD(gradient, 1e-4), 5))
        with pytest.raises(ValueError, match="curvature must be one of"):
            erg.predict_federated(key, Federated(SGLD(gradient, 1e-4), 5), curvature="some")


def test_wrong_laws_are_rejected():
    """A gradient without 1/f, or with N for N_s, has another law; the printed values would tell."""
    shards = gaussian_mean_shards()
    sizes = np.asarray(shards.sizes, float)
    means = np.array([-2.0, 0.5, 1.0])
    noise = np.array([0.5, 1.0, 2.0])
    f, p = np.full(3, 1 / 3), np.full(3, 1 / 3)

    def variance(scale):
        weight = scale * np.ones(3)
        (_, found), _ = closed_form(0.1 + weight, weight * means, weight**2 * noise / BATCH, H / 2, p, 50)
        return found

    printed = PRINTED["DSGLD", "uniform"][1][1]
    assert abs(variance(sizes / f) / printed - 1) < 6e-4
    assert abs(variance(sizes) / printed - 1) > 0.1
    assert abs(variance(sizes.sum()) / printed - 1) > 0.1

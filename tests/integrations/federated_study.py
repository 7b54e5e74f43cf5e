"""A regression with three owners, as a `Study`, and a transport without a network; imported by the apps of the Flower tests."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import solve_discrete_lyapunov

import ergodica as erg
from ergodica.integrations.flower.client import make_visits
from ergodica.integrations.flower.study import Study

NAMES = ("north", "south", "west")
SIZES = (30, 60, 45)


def rows(name):
    """What one owner has: two regressors and a response with unit noise; coefficients differ a little between owners."""
    i = NAMES.index(name)
    rng = np.random.default_rng([7, i])
    X = rng.normal(size=(SIZES[i], 2)) * [1.0, 0.7]
    y = X @ (np.array([1.0, -0.5]) + 0.4 * rng.normal(size=2)) + rng.normal(size=SIZES[i])
    return {"X": X.astype(np.float32), "y": y.astype(np.float32)}


def make(data):
    def log_likelihood(theta, batch):
        return -0.5 * (batch["y"] - batch["X"] @ theta) ** 2

    return erg.Posterior(lambda t: -0.5 * jnp.sum(t**2) * 0.5, log_likelihood, data, initial=jnp.zeros(2))


def sgld(gradient):
    return erg.samplers.SGLD(gradient, 2e-3)


def study(**settings):
    example = {"X": np.eye(2, dtype=np.float32), "y": np.zeros(2, np.float32)}
    settings = {"num_visits": 6, "num_warmup": 1, "num_chains": 3, "local_steps": 400, "stride": 10, **settings}
    kernel = settings.pop("kernel", sgld)
    return Study(make, example, kernel, NAMES, **{"batch_size": 20, "seed": 3, **settings})


def everyone():
    """All data, as no one has them."""
    data = [rows(name) for name in NAMES]
    return jax.tree.map(lambda *x: np.concatenate(x), *data), np.repeat(np.arange(3), SIZES)


def exact_posterior():
    data, _ = everyone()
    X, y = data["X"].astype(float), data["y"].astype(float)
    precision = X.T @ X + 0.5 * np.eye(2)
    return np.linalg.solve(precision, X.T @ y), precision


def exact_law(clients=(0, 1, 2), step_size=2e-3, batch_size=20):
    """Mean and covariance of chains at some clients: exact surrogates, so one drift, and the noise of batches at the mean.

    The batches' noise is a half of all noise here, and differs between clients as the squares of their sizes. It grows away from
    the mean; over the posterior by about 5%.
    """
    mean, precision = exact_posterior()
    noise = np.zeros((2, 2))
    for client in clients:
        data = rows(NAMES[client])
        gradients = (data["y"] - data["X"] @ mean)[:, None].astype(float) * data["X"]
        away = gradients - gradients.mean(0)
        noise += (3 * len(away)) ** 2 / batch_size * (away.T @ away) / len(away) / len(clients)
    F = np.eye(2) - step_size * precision
    return mean, solve_discrete_lyapunov(F, 2 * step_size * np.eye(2) + step_size**2 * noise)


class Direct:
    """Sites in this process, in place of Flower's grid."""

    def __init__(self, study, secret=None):
        self.study, self.secret, self.surrogates, self.sent, self.messages = study, secret, [], [], 0
        self.posteriors = [make(rows(name)) for name in NAMES]

    def available(self):
        return {0, 1, 2}

    def ask(self, kind, theta, clients):
        found = []
        for client in clients:
            expansion = self.study.expand(self.posteriors[client], client, jnp.asarray(theta[0]))
            found.append((client, _Content(expansion)))
        return found

    def send(self, visits):
        self.sent.extend(visits)

    def receive(self, seconds):
        out = []
        for visit in self.sent:
            arguments = self.posteriors[visit.client], [visit], self.surrogates[visit.client], self.secret
            out += make_visits(self.study, *arguments)
            self.messages += 1
        self.sent = []
        return out


class _Array:
    def __init__(self, x):
        self.x = x

    def numpy(self):
        return self.x


class _Content:
    def __init__(self, expansion):
        self.array_records = {"expansion": {str(i): _Array(x) for i, x in enumerate(expansion)}}

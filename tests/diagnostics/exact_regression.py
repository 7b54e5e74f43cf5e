"""Bayesian linear regression with known noise, and the exact stationary law of samplers on it.

One step of SGLD or BAOAB with a given batch is affine in the state. The law of first and second moments is therefore
linear in the vector (1, m, vec P), P the second moment about the origin, and stationary moments solve a linear system.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ergodica as erg


class Regression(NamedTuple):
    posterior: erg.Posterior
    x: np.ndarray
    y: np.ndarray
    prior_precision: float

    @property
    def precision(self):
        return self.prior_precision * np.eye(self.x.shape[1]) + self.x.T @ self.x

    @property
    def mode(self):
        return np.linalg.solve(self.precision, self.x.T @ self.y)

    def mean_variance_ratio(self, covariance):
        """tr(S^-1 Cov) / D, with S the covariance of the posterior."""
        return np.trace(self.precision @ covariance) / len(self.mode)


def regression(num_data=1000, dim=10, correlation=0.5, prior_precision=1.0):
    """Rows with correlation rho^|i-j| between columns; unit noise; a Gaussian prior."""
    rng = np.random.default_rng(0)
    columns = correlation ** np.abs(np.subtract.outer(np.arange(dim), np.arange(dim)))
    x = rng.normal(size=(num_data, dim)) @ np.linalg.cholesky(columns).T
    y = x @ rng.normal(size=dim) + rng.normal(size=num_data)
    posterior = erg.Posterior(
        lambda theta: -0.5 * prior_precision * jnp.sum(theta**2),
        lambda theta, rows: -0.5 * (rows["y"] - rows["x"] @ theta) ** 2,
        {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)},
        initial=jnp.zeros(dim),
    )
    return Regression(posterior, x, y, prior_precision)


def uniform_sgld_covariance(model, batch_size, h):
    """Stationary covariance of SGLD with rows drawn with replacement: noise that depends on the state, exactly."""
    n, dim = model.x.shape
    curvatures = np.einsum("ni,nj->nij", model.x, model.x)
    centred = curvatures @ model.mode - model.x * model.y[:, None]
    mean_curvature, scale = curvatures.mean(0), h**2 * n**2 / batch_size
    step = np.eye(dim) - h * model.precision
    flat = curvatures.reshape(n, -1)
    # mean_i A_i ⊗ A_i, from its entries [(a, c), (b, d)] = mean A_ab A_cd
    products = (flat.T @ flat / n).reshape(dim, dim, dim, dim).transpose(0, 2, 1, 3).reshape(dim**2, dim**2)
    bracket = np.kron(step, step) + scale * (products - np.kron(mean_curvature, mean_curvature))
    assert np.abs(np.linalg.eigvals(bracket)).max() < 1
    constant = 2 * h * np.eye(dim) + scale * np.cov(centred.T, ddof=0)
    return np.linalg.solve(np.eye(dim**2) - bracket, constant.ravel()).reshape(dim, dim)


def block_forces(gradient):
    """Offset b_k and matrix A_k of each block's gradient b_k - A_k theta, read off the estimator."""
    zero = jnp.zeros(gradient.rows["x"].shape[1])
    forces = []
    with jax.enable_x64(False):
        for k in range(gradient.num_blocks):

            def force(theta, k=k):
                return gradient.at(theta, gradient.block(k)).gradient

            forces.append((np.asarray(force(zero), float), -np.asarray(jax.jacobian(force)(zero), float)))
    return forces


def sgld_steps(forces, h):
    """Affine maps (F, f, Q) of a step with each block."""
    eye = np.eye(len(forces[0][0]))
    return [(eye - h * a, h * b, 2 * h * eye) for b, a in forces]


def baoab_steps(forces, h, friction):
    """A step from one drift's end to the next: the whole kick there (closing and opening halves share it), then AOA."""
    dim = len(forces[0][0])
    eye, zero, c = np.eye(dim), np.zeros((dim, dim)), np.exp(-friction * h)
    drift = np.block([[eye, h / 2 * eye], [zero, eye]])
    relax = np.block([[eye, zero], [zero, c * eye]])
    noise = drift @ np.block([[zero, zero], [zero, (1 - c**2) * eye]]) @ drift.T
    steps = []
    for b, a in forces:
        kick = np.block([[eye, zero], [-h * a, eye]])
        after = drift @ relax @ drift
        steps.append((after @ kick, after @ np.append(np.zeros(dim), h * b), noise))
    return steps


def reshuffled_covariance(steps, dim):
    """Covariance of the first ``dim`` entries under reshuffled blocks, averaged over the iterates of an epoch.

    The moments after a random order of a set S of blocks are the average over its last block k of step k applied to
    those after S without k. So sets are enough, and the sum over orders is exact.
    """
    lifted = [_lift(*step) for step in steps]
    size, count = len(lifted[0]), len(steps)
    after = {frozenset(): np.eye(size)}
    by_length = [np.eye(size)]
    for length in range(1, count + 1):
        previous, after = after, {}
        for subset, operator in previous.items():
            for k in set(range(count)) - subset:
                key = subset | {k}
                after[key] = after.get(key, 0) + lifted[k] @ operator / length
        by_length.append(sum(after.values()) / len(after))
    epoch = by_length[-1]
    assert np.sort(np.abs(np.linalg.eigvals(epoch)))[-2] < 1
    start = np.append(1, np.linalg.solve(np.eye(size - 1) - epoch[1:, 1:], epoch[1:, 0]))
    moments = np.mean([operator @ start for operator in by_length[1:]], axis=0)
    state = len(steps[0][1])
    mean, second = moments[1 : state + 1], moments[state + 1 :].reshape(state, state)
    return (second - np.outer(mean, mean))[:dim, :dim]


def _lift(f, b, q):
    """The step as a matrix on (1, m, vec P): P' = F P F' + F m b' + b m' F' + b b' + Q."""
    d = len(b)
    mixed = np.einsum("ia,j->ija", f, b) + np.einsum("ja,i->ija", f, b)
    top = np.eye(1, 1 + d + d * d)
    middle = np.hstack([b[:, None], f, np.zeros((d, d * d))])
    bottom = np.hstack([(np.outer(b, b) + q).reshape(-1, 1), mixed.reshape(d * d, d), np.kron(f, f)])
    return np.vstack([top, middle, bottom])

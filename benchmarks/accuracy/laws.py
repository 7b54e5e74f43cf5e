"""How many steps a method should need, from the exact law of its kernel on a Gaussian: where the search for its settings starts.

Along an eigenvector of curvature ``lam`` a batch gradient is ``-lam theta + zeta`` with ``Var zeta = K r lam``: ``K`` batches make
an epoch, and a well-specified model has ``r = 1`` (the variance of a datum's gradient is its information); a control variate
makes ``r`` small. The chain is then linear, and its variance and autocorrelation are known. What is predicted is a guide and
enters no result.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ergodica.run.linear_law import affine_steps, solve_lyapunov, stationary_covariance


class Law(NamedTuple):
    """Variance of the position, and integrated autocorrelation times of it and of its square, in calls; by curvature."""

    variance: np.ndarray
    time: np.ndarray
    time_of_square: np.ndarray


def law_of_kernel(kernel, curvatures: np.ndarray, noise: np.ndarray, num_blocks: int | None) -> Law:
    """Read the law off a kernel of this library; autocorrelations are those with independent gradients."""
    step = affine_steps(kernel, curvatures)
    variance = stationary_covariance(step, noise[:, None, None], num_blocks)[:, 0, 0]
    own = step.loading @ np.swapaxes(step.loading, -1, -2)
    kept = noise if num_blocks is None else 0 * noise
    heat = np.einsum("cied,cjed->cij", step.noise_loading, step.noise_loading) * kept[:, None, None]
    return Law(variance, *autocorrelation_times(step.transition, own + heat, step.select))


def autocorrelation_times(F: np.ndarray, Q: np.ndarray, select: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum the autocorrelations of a coordinate and of its square (which are squares of the former), by eigenvalues."""
    covariance = solve_lyapunov(F, Q)
    values, vectors = np.linalg.eig(F)
    right = np.linalg.solve(vectors, (covariance @ np.swapaxes(select, -1, -2)).astype(complex))[..., 0]
    weight = (select @ vectors)[..., 0, :] * right
    weight = weight / weight.sum(-1, keepdims=True)
    pairs = values[..., :, None] * values[..., None, :]
    first = (weight * (1 + values) / (1 - values)).sum(-1)
    second = (weight[..., :, None] * weight[..., None, :] * (1 + pairs) / (1 - pairs)).sum((-1, -2))
    return first.real, second.real


def law_of_blackjax_sghmc(
    curvatures: np.ndarray, noise: np.ndarray, h: float, alpha: float, num_inner: int, temperature: float = 1.0
) -> Law | None:
    """Law of ``blackjax.sghmc``: fresh N(0, 1) momenta, then explicit Euler steps with one batch; ``None`` if unstable.

    ``x += h p; p += -alpha h p + h g(x before) + sqrt(2 alpha h T) xi``. The position alone is then an AR(1) chain.
    """
    variances, factors = [], []
    for lam, s2 in zip(curvatures, noise, strict=True):
        F = np.array([[1.0, h], [-h * lam, 1.0 - alpha * h]])
        Q, g = np.diag([0.0, 2 * alpha * h * temperature]), np.array([0.0, h])
        power, added, pushed = np.eye(2), np.zeros((2, 2)), np.zeros(2)
        for _ in range(num_inner):
            power, added, pushed = F @ power, F @ added @ F.T + Q, F @ pushed + g
        a, b = power[0]
        if abs(a) >= 1:
            return None
        variances.append((b**2 + added[0, 0] + s2 * pushed[0] ** 2) / (1 - a**2))
        factors.append(a)
    a = np.array(factors)
    return Law(np.array(variances), (1 + a) / (1 - a), (1 + a**2) / (1 - a**2))


def law_of_blackjax_sgnht(curvatures: np.ndarray, noise: np.ndarray, h: float, alpha: float) -> Law | None:
    """Law of ``blackjax.sgnht`` with its friction frozen where the momenta have the temperature 1 on average."""

    def parts(friction):
        F = np.array([[[1.0, h], [-h * lam, 1.0 - friction * h]] for lam in curvatures])
        return F, np.array([np.diag([0.0, 2 * alpha * h + h**2 * s2]) for s2 in noise])

    return thermostatted(parts, lambda covariance, _: covariance[:, 1, 1].mean(), h)


def law_of_badodab(curvatures: np.ndarray, noise: np.ndarray, h: float, gamma: float) -> Law | None:
    """Law of `BADODAB` with its friction frozen likewise: kick, half a drift, friction, half a drift, with reused gradients."""
    kick = np.array([[[1.0, 0.0], [-h * lam, 1.0]] for lam in curvatures])
    pushed = np.array([np.diag([0.0, h**2 * s2]) for s2 in noise])
    drift = np.array([[1.0, h / 2], [0.0, 1.0]])

    def parts(friction):
        c = np.exp(-friction * h)
        after = drift @ np.diag([1.0, c]) @ drift
        heat = (1 - c**2) * gamma / friction * np.outer(drift[:, 1], drift[:, 1])
        return after @ kick, after @ pushed @ after.T + heat

    def temperature(covariance, _):  # mean of what D sees before friction and after it
        before = (kick @ covariance @ np.swapaxes(kick, -1, -2) + pushed)[:, 1, 1].mean()
        return (before + covariance[:, 1, 1].mean()) / 2

    return thermostatted(parts, temperature, h)


def thermostatted(parts, temperature, h: float) -> Law | None:
    """Bisect for the friction at which the temperature is 1; more friction, colder momenta. ``None`` if there is none."""
    low, high, kept = 1e-6, 2.0 / h, None
    for _ in range(40):
        middle = np.sqrt(low * high)
        F, Q = parts(middle)
        covariance = solve_lyapunov(F, Q) if np.max(np.abs(np.linalg.eigvals(F))) < 1 else None
        hot = middle < 1 / h if covariance is None else temperature(covariance, middle) > 1
        low, high = (middle, high) if hot else (low, middle)
        kept = (F, Q, covariance) if covariance is not None else kept
    if kept is None or abs(temperature(kept[2], middle) - 1) > 1e-3:
        return None
    select = np.broadcast_to(np.array([[1.0, 0.0]]), (len(kept[0]), 1, 2))
    return Law(kept[2][:, 0, 0], *autocorrelation_times(kept[0], kept[1], select))


def predicted_calls(law: Law | None, curvatures: np.ndarray, threshold: float = 0.01) -> float:
    """Calls of the kernel until the expected errors of means and of squares, averaged over coordinates, are below the threshold."""
    if law is None:
        return np.inf
    ratio = law.variance * curvatures
    bias = np.mean((ratio - 1) ** 2) / 2
    if bias >= threshold:
        return np.inf
    return max(np.mean(ratio * law.time) / threshold, np.mean(ratio**2 * law.time_of_square) / (threshold - bias))


def control_variate_noise(posterior, mode, draws, num_rows: int = 10_000) -> float:
    """Gradient noise with a control variate over that without: ``r``."""
    rows = jax.tree.map(lambda x: x[:num_rows], posterior.data)

    @jax.jit
    def variances(theta):
        def of_one(theta, row):
            return posterior.log_likelihood(theta, jax.tree.map(lambda x: x[None], row))[0]

        def each(theta):
            return jax.vmap(jax.grad(of_one), (None, 0))(theta, rows)

        plain = each(theta)
        return jnp.var(plain - each(mode), axis=0).sum(), jnp.var(plain, axis=0).sum()

    corrected, plain = np.mean([np.asarray(variances(theta)) for theta in draws], axis=0)
    return float(corrected / plain)

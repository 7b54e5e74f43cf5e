"""Layers whose laws are known in closed form: independent normals, and Neal's funnel."""

import jax
import jax.numpy as jnp

from ergodica.core.flow import AbstractLayer, Flow


class Scaled(AbstractLayer):
    """``y = exp(log_scale) * x + shift``, entry by entry."""

    log_scale: jax.Array
    shift: jax.Array

    def forward(self, x):
        return jnp.exp(self.log_scale) * x + self.shift, jnp.sum(self.log_scale)

    def inverse(self, y):
        return (y - self.shift) * jnp.exp(-self.log_scale), -jnp.sum(self.log_scale)


class Triangular(AbstractLayer):
    """``y = lower @ x + shift``, for a lower triangular matrix with a positive diagonal."""

    lower: jax.Array
    shift: jax.Array

    def forward(self, x):
        return self.lower @ x + self.shift, jnp.sum(jnp.log(jnp.diagonal(self.lower)))

    def inverse(self, y):
        x = jax.scipy.linalg.solve_triangular(self.lower, y - self.shift, lower=True)
        return x, -jnp.sum(jnp.log(jnp.diagonal(self.lower)))


class Funnel(AbstractLayer):
    """``y[0] = width * x[0]``, and the others scaled by ``exp(y[0] / 2)``."""

    width: jax.Array

    def _log_det(self, neck, size):
        return jnp.log(self.width) + (size - 1) * neck / 2

    def forward(self, x):
        neck = self.width * x[0]
        return jnp.concatenate([neck[None], jnp.exp(neck / 2) * x[1:]]), self._log_det(neck, x.shape[0])

    def inverse(self, y):
        x = jnp.concatenate([y[:1] / self.width, jnp.exp(-y[0] / 2) * y[1:]])
        return x, -self._log_det(y[0], y.shape[0])


def normals(scale, shift=0.0, *, dim):
    """Independent normals of one standard deviation around one mean."""
    ones = jnp.ones(dim)
    return Flow(dim, Scaled(jnp.log(scale * ones), shift * ones))


def funnel(*, dim, width=3.0):
    return Flow(dim, Funnel(jnp.asarray(width, jnp.result_type(float))))

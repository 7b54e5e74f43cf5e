"""A small flow in two dimensions whose rules are the plain ones, and a target out of its reach."""

import equinox as eqx
import jax
import jax.numpy as jnp

from ergodica.core import flow as flows


class Bent(flows.AbstractLayer):
    """One coordinate is moved and scaled by a smooth function of the other."""

    weights: jax.Array
    first: int = eqx.field(static=True)

    def _change(self, c):
        w = self.weights
        return 0.4 * jnp.tanh(w[0] * c + w[1]), w[2] * jnp.sin(c) + w[3]

    def forward(self, x):
        a, b = self._change(x[1 - self.first])
        return x.at[self.first].set(x[self.first] * jnp.exp(a) + b), a

    def inverse(self, y):
        a, b = self._change(y[1 - self.first])
        return y.at[self.first].set((y[self.first] - b) * jnp.exp(-a)), -a

    def forward_with_score(self, x, score):
        """By solving with the Jacobian."""
        y, log_det = self.forward(x)
        return y, jax.lax.stop_gradient(log_det), flows.push_forward(flows.constant(self).forward, x, score)


def bent_flow():
    return flows.Flow(2, Bent(jnp.array([0.6, 0.1, 0.5, 0.2]), 0), Bent(jnp.array([-0.5, 0.3, 0.4, -0.3]), 1))


def target(x):
    """Neither Gaussian nor in reach of the flow."""
    return -0.5 * jnp.sum((x - 0.4) ** 2) - 0.3 * x[0] * x[1] - 0.05 * jnp.sum(x**4)

"""Whether an estimator differentiates the model, found out while it is traced."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from numpyro.primitives import Messenger


class Watch(Messenger):
    """Wraps a model; ``differentiated`` becomes true if derivatives flow through what it draws, is given, or learns.

    Nothing need be computed: a value without a tangent is known as such while the program is traced.
    """

    def __init__(self, fn: Any) -> None:
        super().__init__(fn)
        self.differentiated = False

    def postprocess_message(self, msg: dict) -> None:
        """Pass latent values and parameters on through an identity that looks at its tangent."""
        latent = msg["type"] == "sample" and not msg.get("is_observed", False)
        if latent or msg["type"] == "param":
            msg["value"] = jax.tree.map(self._look, msg["value"])

    def _look(self, x: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            return x

        @jax.custom_jvp
        def same(x: Any) -> Any:
            return x

        def tangent(primals: tuple, tangents: tuple) -> tuple:
            (x,), (t,) = primals, tangents
            zero = isinstance(t, SymbolicZero)
            self.differentiated |= not zero
            return x, jnp.zeros_like(x) if zero else t

        same.defjvp(tangent, symbolic_zeros=True)
        return same(jnp.asarray(x))

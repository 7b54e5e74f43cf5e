"""What is sampled where each datum has a latent variable of its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check
from ergodica.core.posterior import Posterior, as_partial
from ergodica.core.types import Key, Position, PyTree


@jax.tree_util.register_pytree_with_keys_class
class LatentPosterior(Posterior):
    r"""A target whose likelihood is an integral over a latent variable of each datum.

    .. math:: \log\pi(\theta) = \log p(\theta) + \sum_{i=1}^N \log \int p(x_i, z_i \mid \theta)\, dz_i

    Parameters
    ----------
    log_prior : callable
        ``log_prior(position) -> scalar``, in unconstrained space, Jacobians included.
    log_joint : callable
        ``log_joint(position, latents, rows) -> (n,)``: the log density of each datum together with its latents, Jacobians of
        the latents included. It must treat the rows independently.
    data : pytree of arrays
        One row a datum along the leading axis of every leaf.
    latents : mapping of str to tuple of int
        Shapes of the latents of one datum, unconstrained, by name. ``log_joint`` gets a dict of arrays ``(n, *shape)``.
    initial, constrain, dims, coords, observed, source
        As in `Posterior`.

    Raises
    ------
    ValueError, TypeError
        If the rows disagree in length, there is no latent, or ``log_joint`` does not return one value a datum.

    Notes
    -----
    The integral is not computed, so `log_likelihood` and `log_density` raise. Gradients are estimated by
    `ergodica.estimators.LocalLatents`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> posterior = LatentPosterior(
    ...     log_prior=lambda theta: -0.5 * theta**2,
    ...     log_joint=lambda theta, z, x: -0.5 * (z["z"] - theta) ** 2 - 0.5 * (x - z["z"]) ** 2,
    ...     data=jnp.array([1.0, 2.0, 3.0]),
    ...     latents={"z": ()},
    ...     initial=jnp.array(0.0),
    ... )
    >>> posterior.log_joint(jnp.array(1.0), {"z": jnp.ones(3)}, posterior.data).tolist()
    [-0.0, -0.5, -2.0]
    """

    log_joint: Any
    latents: dict[str, tuple[int, ...]]

    def __init__(
        self,
        log_prior: Callable[[Position], Array],
        log_joint: Callable[[Position, dict[str, Array], PyTree], Array],
        data: PyTree,
        *,
        latents: Mapping[str, Sequence[int]],
        initial: Position | Callable[[Key], Position] | None = None,
        constrain: Callable[[Position], dict[str, Array]] | None = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        observed: dict[str, Array] | None = None,
        source: PyTree = None,
    ) -> None:
        self.log_joint = as_partial(check.function("log_joint", log_joint))
        self.latents = {name: tuple(shape) for name, shape in latents.items()}
        if data is None:
            raise ValueError(
                "A LatentPosterior needs all the data, since their latents are kept by row; got data=None."
            )
        if not self.latents:
            raise ValueError("latents must name at least one latent variable of a datum; without any, use Posterior.")
        super().__init__(
            log_prior,
            _refuse,
            data,
            initial=initial,
            constrain=constrain,
            dims=dims,
            coords=coords,
            observed=observed,
            source=source,
        )

    def log_density(self, position: Position) -> NoReturn:  # noqa: ARG002
        """Raise: it is an integral over all latents."""
        _refuse()

    def latent_shapes(self, num_rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the latents of some rows."""
        dtype = jnp.result_type(float)
        return {name: jax.ShapeDtypeStruct((num_rows, *shape), dtype) for name, shape in self.latents.items()}

    def _check_functions(self) -> None:
        values = jax.eval_shape(self.log_joint, self.shape(), self.latent_shapes(self.num_data), self.data)
        if getattr(values, "shape", None) != (self.num_data,):
            raise ValueError(
                f"log_joint must return one value a datum, of shape ({self.num_data},) for all the data; got {values}. "
                "Sum over event dimensions, but not over the rows."
            )

    def tree_flatten_with_keys(self) -> tuple:
        """Split into leaves and static parts, for JAX."""
        children, static = super().tree_flatten_with_keys()
        children = [*children, (jax.tree_util.GetAttrKey("log_joint"), self.log_joint)]
        return children, (static, tuple(self.latents.items()))

    @classmethod
    def tree_unflatten(cls, static: tuple, children: Sequence) -> Self:
        """Put together again, without checks: leaves may be tracers."""
        of_posterior, latents = static
        self = super().tree_unflatten(of_posterior, children[:-1])
        self.log_joint, self.latents = children[-1], dict(latents)
        return self


def _refuse(*_: Any) -> NoReturn:
    raise ValueError(
        "The likelihood of this posterior is an integral over a latent variable of each datum, which is not computed. Estimate "
        "gradients by ergodica.estimators.LocalLatents(posterior, ...); to compare them, name an estimator as the reference."
    )

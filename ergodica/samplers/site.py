"""A client's site: it makes the steps of a visit, from arrays to arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core.types import Key, Position
from ergodica.samplers.federated import arrive, check_kernel, local_run
from ergodica.samplers.gradient_kernel import AbstractGradientKernel

Arrays = tuple[np.ndarray, ...]


class StateTemplate(NamedTuple):
    """Of what travels: the state of a kernel without that of its gradient, with the position first.

    Attributes
    ----------
    fields : tuple of str
        Those that travel, in their order.
    structure : PyTreeDef
        Of these fields.
    leaves : tuple of (shape, dtype)
    position : tuple of (shape, dtype)
        The first of ``leaves``.
    """

    fields: tuple[str, ...]
    structure: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]
    position: tuple[tuple[tuple[int, ...], Any], ...]


def state_template(kernel: AbstractGradientKernel, position: Position) -> StateTemplate:
    """Find what travels between sites for a kernel, without running it."""
    state = jax.eval_shape(lambda k, x: k.init(jax.random.key(0), x), kernel, position)
    fields = ("position", *(f for f in state._fields if f not in ("position", "gradient")))
    travels = tuple(getattr(state, f) for f in fields)
    leaves, structure = jax.tree.flatten(travels)
    shapes = tuple((tuple(x.shape), np.dtype(x.dtype)) for x in leaves)
    return StateTemplate(fields, structure, shapes, shapes[: len(jax.tree.leaves(state.position))])


class Site:
    """Makes visits with the data of one client.

    Parameters
    ----------
    kernel : AbstractGradientKernel
        With a gradient that holds this client's data alone (``Federated.only(client)``, or made at the site).
    example : position
        Of the structure, shapes and dtypes of a position.

    Notes
    -----
    A site has no memory: the same order gives the same answer. Cost: ``num_steps`` steps of the kernel, and one compiled
    program for each number of steps, which JAX keeps on disk if ``jax_compilation_cache_dir`` is set.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.array(0.0))
    >>> sampler = erg.fsgld(posterior, client=[0, 0, 1, 1, 1, 1], step_size=0.01, local_steps=20)
    >>> site = Site(sampler.only(1), posterior.initial)
    >>> state, positions = site.visit(np.array([0, 7], np.uint32), (np.float32(0),), num_steps=20, stride=5)
    >>> [x.shape for x in positions], int(state[-1])
    ([(4,)], 20)
    """

    def __init__(self, kernel: AbstractGradientKernel, example: Position) -> None:
        self.kernel = check_kernel(kernel)
        self.template = state_template(kernel, example)
        self._position = jax.tree.structure(example)
        self._kind = type(jax.eval_shape(lambda k, x: k.init(jax.random.key(0), x), self.kernel, example))

    def first_state(self, key: Key, position: Position) -> Arrays:
        """Give the state of a chain that starts at a position, as it travels."""
        state = self.kernel.init(key, position)
        return _leaves(tuple(getattr(state, f) for f in self.template.fields))

    def visit(
        self,
        words: np.ndarray,
        state: Arrays,
        *,
        num_steps: int,
        stride: int = 1,
        first_step: int = 0,
        share: float | None = None,
    ) -> tuple[Arrays, Arrays]:
        """Make the steps of one visit.

        Parameters
        ----------
        words : uint32 array (2,)
            Of the key; step ``i`` uses it folded with ``first_step + i``.
        state : tuple of arrays
            From the site before, or the leaves of a position, for the first visit of a chain.
        num_steps, stride : int
            Steps to make, and from one stored position to the next.
        share : float, optional
            What the client's gradient is divided by; the kernel's own unless given.

        Returns
        -------
        state, positions : tuple of arrays
            What travels on, and the stored positions, leaf by leaf.

        Raises
        ------
        ValueError
            If the arrays are not those of a state or a position.
        """
        key = jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl="threefry2x32")
        start = arrive(self.kernel, self._start(key, state))
        if share is not None:
            dtype = self.kernel.gradient.probabilities.dtype  # pyright: ignore[reportAttributeAccessIssue]
            here = jnp.zeros((), jnp.int32)
            gradient = self.kernel.gradient.visit(start.gradient, here, jnp.asarray(share, dtype))  # pyright: ignore[reportAttributeAccessIssue]
            start = start._replace(gradient=gradient)
        end, positions = local_run(self.kernel, key, start, jnp.asarray(first_step, jnp.int32), num_steps)
        stored = jax.tree.map(lambda x: x[stride - 1 :: stride], positions)
        travels = tuple(getattr(end, f) for f in self.template.fields)
        return _leaves(travels), _leaves(stored)

    def _start(self, key: Any, state: Arrays) -> Any:
        got = tuple((tuple(np.shape(x)), np.asarray(x).dtype) for x in state)
        if got == self.template.position:
            position = jax.tree.unflatten(self._position, [jnp.asarray(x) for x in state])
            return self.kernel.init(jax.random.fold_in(key, np.uint32(2**32 - 1)), position)
        if got != self.template.leaves:
            raise ValueError(
                f"state must have the arrays of a state, {self.template.leaves}, or of a position, {self.template.position}; "
                f"got {got}. Do the site and the server build the same kernel?"
            )
        values = jax.tree.unflatten(self.template.structure, [jnp.asarray(x) for x in state])
        fields = dict(zip(self.template.fields, values, strict=True))
        return self._kind(**fields, gradient=self.kernel.gradient.init(key, fields["position"]))


def _leaves(tree: Any) -> Arrays:
    return tuple(np.asarray(x) for x in jax.device_get(jax.tree.leaves(tree)))

"""Evolution strategies for computations that are unrolled over many steps, a window at a time."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import as_partial
from ergodica.core.types import Batch, Estimate, Key, PyTree
from ergodica.estimators.evolution.objective import repeated, scalar, weighted_sum


class UnrolledState(NamedTuple):
    """Where the episode stands: inner states of both sides of each pair, and what has perturbed them.

    Attributes
    ----------
    plus, minus : pytree
        Inner states, leading axis (n,).
    perturbation : pytree
        Like the parameters, leading axis (n,): what the window's objective is multiplied by.
    index : int32 scalar
        Steps of the episode that are done.
    """

    plus: PyTree
    minus: PyTree
    perturbation: PyTree
    index: Array


def mirrored_gradient(plus: Array, minus: Array, perturbation: PyTree, sigma: Array) -> PyTree:
    r"""Average of perturbations, each times the slope across its pair (Vicol, Metz and Sohl-Dickstein 2021).

    .. math:: \hat g = \frac{1}{2\sigma n}\sum_{i=1}^n \big(L_i^+ - L_i^-\big)\,\xi_i

    Parameters
    ----------
    plus, minus : array (n,)
        Objective of the window.
    perturbation : pytree
        :math:`\xi_i`, leading axis (n,).
    sigma : scalar array
    """
    slopes = (plus - minus) / (2 * tree.cast_like(sigma, plus))
    return weighted_sum(slopes / slopes.shape[0], perturbation)


class AbstractUnrolled(AbstractGradientEstimator):
    """An evolution strategy whose perturbed inner states live on from window to window."""

    step: eqx.AbstractVar[Callable]
    initial: eqx.AbstractVar[PyTree]
    sigma: eqx.AbstractVar[Array]
    num_steps: eqx.AbstractVar[int]
    window: eqx.AbstractVar[int]
    num_pairs: eqx.AbstractVar[int]

    @abc.abstractmethod
    def perturb(self, fresh: PyTree, before: PyTree, starts: Array) -> tuple[PyTree, PyTree]:
        """From fresh normals and the perturbation before: what moves the parameters now, and what the state keeps."""

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> UnrolledState:  # noqa: ARG002
        """Stand at the start of an episode."""
        inner = self._started()
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), repeated(self.num_pairs, params))
        return UnrolledState(inner, inner, zero, jnp.zeros((), jnp.int32))

    def estimate(
        self, key: Key, params: PyTree, state: UnrolledState, batch: Batch | None = None
    ) -> tuple[Estimate, UnrolledState]:
        """Unroll the next window, and estimate the gradient of its objective."""
        if batch is not None:
            raise ValueError(f"{type(self).__name__} takes no batch that is handed over; let step hold its data.")
        starts = state.index == 0
        plus, minus = (tree.select(starts, self._started(), inner) for inner in (state.plus, state.minus))
        fresh = rng.normal_like(key, repeated(self.num_pairs, params))
        moves, kept = self.perturb(fresh, state.perturbation, starts)
        plus, gain = self._unroll(self.sigma, moves, params, plus, state.index)
        minus, loss = self._unroll(-self.sigma, moves, params, minus, state.index)
        gradient = mirrored_gradient(gain, loss, kept, self.sigma)
        index = (state.index + self.window) % self.num_steps
        cost = 2 * self.num_pairs * self.window
        return Estimate(gradient, jnp.mean(gain + loss) / 2, n_grad=cost), UnrolledState(plus, minus, kept, index)

    def evaluations(self, params: PyTree, n_grad: float) -> tuple[float, float]:  # noqa: ARG002
        """Inner steps, none of them differentiated."""
        return n_grad, 0.0

    def _started(self) -> PyTree:
        """Inner states at the start of an episode, leading axis (n,)."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.num_pairs, *x.shape)), self.initial)

    def _unroll(self, sigma: Array, moves: PyTree, params: PyTree, inner: PyTree, index: Array) -> tuple[PyTree, Array]:
        """Inner states at the end of the window, and its objective (n,)."""

        def of_one(move: PyTree, inner: PyTree) -> tuple[PyTree, Array]:
            moved = tree.axpy(sigma, move, params)

            def body(inner: PyTree, i: Array) -> tuple[PyTree, Array]:
                inner, value = self.step(moved, inner, i)
                return inner, scalar("The second value of step", value)

            inner, values = jax.lax.scan(body, inner, index + jnp.arange(self.window, dtype=jnp.int32))
            return inner, jnp.sum(values)

        return jax.vmap(of_one)(moves, inner)


class PersistentEvolution(AbstractUnrolled):
    r"""Persistent evolution strategies (PES): unrolled computations, a window at a time, without truncation bias.

    .. math::

        \hat g_t &= \frac{1}{2\sigma n}\sum_{i=1}^n \big(L_t(\theta^+_{i,1}, \dots, \theta^+_{i,t})
            - L_t(\theta^-_{i,1}, \dots, \theta^-_{i,t})\big)\,\xi_i \\
        \theta^\pm_{i,s} &= \theta \pm \sigma\varepsilon_{i,s}, \qquad \xi_i = \varepsilon_{i,1} + \dots + \varepsilon_{i,t}

    :math:`L_t` is the objective of window :math:`t`. Each window is unrolled from where the last one left the inner state, under a
    perturbation :math:`\varepsilon_{i,t}` of its own, and held against all perturbations since the start of the episode. The sum
    over the windows of an episode estimates the gradient of the whole.

    Parameters
    ----------
    step : callable
        ``step(params, inner, index) -> (inner, value)``: one step of the computation, and its part of the objective, which is
        ascended. ``index`` counts the steps of the episode (int32). Random numbers can be had by folding it into a key.
    initial : pytree of arrays
        The inner state at the start of an episode.
    num_steps : int
        Length of an episode, a multiple of ``window``. Then it starts anew.
    window : int
        Steps between two estimates.
    sigma : float
        Standard deviation of the perturbations, in units of the parameters.
    num_pairs : int
        :math:`n`.

    Raises
    ------
    ValueError, TypeError
        For numbers out of range, or a step that returns no scalar.

    Notes
    -----
    Exact in the mean where :math:`L_t` is quadratic in the parameters of all windows together, else biased by smoothing to order
    :math:`\sigma^2`, as `EvolutionStrategy` is. An evolution strategy that forgets earlier perturbations sees only what
    the parameters do within a window.

    The variance grows along an episode. For :math:`L_t = g \cdot \theta`, which earlier windows do not enter, the estimate at
    window :math:`t` has the total variance :math:`\lVert g\rVert^2 (t d + 1)/n` with :math:`d` parameters. `EvolutionSingle` has
    :math:`\lVert g\rVert^2(d + 1)/n` at each window, but the same perturbation in all of them: summed over an episode of
    :math:`T` windows, that is :math:`T^2\lVert g\rVert^2(d + 1)/n`, and PES has less.

    The parameters may change from window to window, as in training; the estimates are then of the gradient along the way.
    There are no probes, since an estimate depends on all perturbations of the episode. `ergodica.compare_gradients` sees the
    first window only.

    Cost: ``2 * num_pairs * window`` calls of ``step``; memory for ``2 * num_pairs`` inner states and ``num_pairs`` copies of the
    parameters.

    Not for computations that reverse mode can differentiate in memory, unless their gradients explode.

    References
    ----------
    Vicol, Metz and Sohl-Dickstein (2021).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> def step(rate, x, index):  # gradient descent on x**2 / 2, and its loss
    ...     x = x - rate * x
    ...     return x, -(x**2)
    >>> pes = PersistentEvolution(step, jnp.array(1.0), num_steps=20, window=5, sigma=0.01, num_pairs=100)
    >>> rate = jnp.array(0.1)
    >>> state = pes.init(jax.random.key(0), rate)
    >>> estimate, state = pes.estimate(jax.random.key(1), rate, state)
    >>> bool(estimate.gradient > 0), int(state.index), estimate.n_grad
    (True, 5, 1000)
    """

    step: Callable
    initial: PyTree
    sigma: Array
    num_steps: int = eqx.field(static=True)
    window: int = eqx.field(static=True)
    num_pairs: int = eqx.field(static=True)

    references: ClassVar = ("vicol2021",)

    def __init__(
        self, step: Callable, initial: PyTree, *, num_steps: int, window: int, sigma: float, num_pairs: int = 1
    ) -> None:
        self.step, self.initial, self.sigma = check_unroll(step, initial, sigma)
        self.num_steps, self.window = check_window(num_steps, window)
        self.num_pairs = check.integer("num_pairs", num_pairs)

    def perturb(self, fresh: PyTree, before: PyTree, starts: Array) -> tuple[PyTree, PyTree]:
        """Move by fresh perturbations, and add them to those of the episode."""
        return fresh, tree.select(starts, fresh, tree.add(before, fresh))


class EvolutionSingle(AbstractUnrolled):
    r"""ES-Single (noise-reuse evolution strategies): unrolled computations, with one perturbation for a whole episode.

    .. math::

        \hat g_t = \frac{1}{2\sigma n}\sum_{i=1}^n
            \big(L_t(\theta + \sigma\varepsilon_i) - L_t(\theta - \sigma\varepsilon_i)\big)\,\varepsilon_i

    with :math:`L_t` the objective of window :math:`t`, and :math:`\varepsilon_i` drawn at the start of an episode and kept to
    its end.

    Parameters
    ----------
    step : callable
        ``step(params, inner, index) -> (inner, value)``, as for `PersistentEvolution`.
    initial : pytree of arrays
        The inner state at the start of an episode.
    num_steps : int
        Length of an episode, a multiple of ``window``. Then it starts anew, with new perturbations.
    window : int
        Steps between two estimates.
    sigma : float
        Standard deviation of the perturbations, in units of the parameters.
    num_pairs : int
        :math:`n`.

    Raises
    ------
    ValueError, TypeError
        For numbers out of range, or a step that returns no scalar.

    Notes
    -----
    While the parameters stay, the estimate at any window is that of `EvolutionStrategy` for :math:`L_t` as a function of the
    parameters: exact in the mean on quadratics, else biased by smoothing, with a variance that does not grow along the episode.
    The estimates of an episode share their perturbation, so that their noise does not average out within it: one that sums them
    before it moves may be better served by `PersistentEvolution`, whose docstring has the variances of both.

    Cost: ``2 * num_pairs * window`` calls of ``step``; memory for ``2 * num_pairs`` inner states and ``num_pairs`` copies of the
    parameters.

    Not for computations that reverse mode can differentiate in memory, unless their gradients explode.

    References
    ----------
    Vicol (2023); Li et al. (2023).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> def step(rate, x, index):
    ...     x = x - rate * x
    ...     return x, -(x**2)
    >>> single = EvolutionSingle(step, jnp.array(1.0), num_steps=20, window=5, sigma=0.01, num_pairs=100)
    >>> rate = jnp.array(0.1)
    >>> estimate, state = single.estimate(jax.random.key(1), rate, single.init(jax.random.key(0), rate))
    >>> bool(estimate.gradient > 0)
    True
    """

    step: Callable
    initial: PyTree
    sigma: Array
    num_steps: int = eqx.field(static=True)
    window: int = eqx.field(static=True)
    num_pairs: int = eqx.field(static=True)

    references: ClassVar = ("vicol2023", "li2023noise")

    def __init__(
        self, step: Callable, initial: PyTree, *, num_steps: int, window: int, sigma: float, num_pairs: int = 1
    ) -> None:
        self.step, self.initial, self.sigma = check_unroll(step, initial, sigma)
        self.num_steps, self.window = check_window(num_steps, window)
        self.num_pairs = check.integer("num_pairs", num_pairs)

    def perturb(self, fresh: PyTree, before: PyTree, starts: Array) -> tuple[PyTree, PyTree]:
        """Move by the perturbation of the episode, which is fresh at its start."""
        kept = tree.select(starts, fresh, before)
        return kept, kept


def check_unroll(step: Any, initial: Any, sigma: Any) -> tuple[Callable, PyTree, Array]:
    """Return a step, an initial inner state as arrays, and a scale."""
    step = as_partial(check.function("step", step))
    if not jax.tree.leaves(initial):
        raise ValueError(f"initial must hold at least one array, the inner state at the start; got {initial!r}.")
    strong = jax.tree.map(lambda x: jnp.array(x, dtype=jnp.result_type(x)), initial)
    return step, strong, check.positive("sigma", sigma)


def check_window(num_steps: Any, window: Any) -> tuple[int, int]:
    """Return the lengths of an episode and of a window that divides it."""
    num_steps = check.integer("num_steps", num_steps)
    window = check.integer("window", window, most=num_steps)
    if num_steps % window:
        raise ValueError(f"num_steps must be a multiple of window, {window}; got {num_steps}.")
    return num_steps, window

"""Stein control variates around a gradient estimator."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from ergodica.core import check, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.posterior import as_partial
from ergodica.core.types import Batch, Draws, Estimate, Key, Name, PyTree, Reference
from ergodica.estimators.stein import matched, shared
from ergodica.estimators.stein.shared import Moments

CONTROLS = ("linear", "quadratic", "linearised")
COEFFICIENTS = ("leave-one-out", "split", "moving-average", "fixed")
_SHARE_IN_TIME = 0.9
"""Of what a memory tends to: reached after about two of its lengths; the whole never is."""
PER = ("matrix", "coordinate", "block", "all")


class SteinState(NamedTuple):
    """State of the estimator inside, and moments from earlier calls (``None`` where none are used)."""

    inner: Any
    memory: Moments | None


class SteinControl(AbstractGradientEstimator):
    r"""Subtract functions of mean zero of the noise from an estimator's draws, without a bias from fitting them.

    .. math::

        \hat g = \frac1n \sum_{k=1}^n \left( g_k - B_k^\top h(\varepsilon_k) \right), \qquad
        h = \Delta u + \nabla u \cdot \nabla\log q

    for draws :math:`g_k` of a gradient that are made with noise :math:`\varepsilon_k \sim q`. By Stein's identity
    :math:`\mathrm{E} h(\varepsilon_k) = 0`, and :math:`B_k` does not depend on draw :math:`k`.

    Parameters
    ----------
    gradient : AbstractGradientEstimator
        One whose draws have noise of a known, smooth law: `ergodica.estimators.VariationalGradient` of an
        `ergodica.estimators.ELBO` with `ergodica.estimators.Reparam` at Gaussian sites, the reverse direction of
        `ergodica.estimators.PathGradient` and `ergodica.estimators.ReverseKL` on a normal base,
        `ergodica.estimators.EvolutionStrategy` without ranks, `ergodica.estimators.ForwardGradient` along Gaussian directions.
    controls : {"linear", "quadratic", "linearised"} or callable
        ``"linear"``: the D scores (:math:`u = x_i`). ``"quadratic"``: and the D(D+1)/2 of :math:`u = x_i x_j`. A function
        :math:`\varphi` from a point (D,) to values (M,): the vector form :math:`\varphi_m s_d + \partial_d \varphi_m`, M times
        D of them. ``"linearised"``: the first-order term of the draw's own gradient in its noise, expanded about
        :math:`\varepsilon = 0`, by one product with its derivative.
    coefficients : {"leave-one-out", "split", "moving-average", "fixed"}
        From all other draws of the call; from the other half; from earlier calls, kept in the state; or 1 (``"linearised"`` alone).
    per : {"matrix", "coordinate", "block", "all"}, optional
        ``"matrix"``: every entry of the gradient has a coefficient for every control. Else entry d gets controls of its own
        (of ``"linear"`` and ``"quadratic"`` those of coordinate d alone; of :math:`\varphi` those with :math:`\partial_d`), and
        coefficients are fitted for each entry, for each leaf of the parameters, or once for all. Parameters, or each of the leaves
        that are to have controls, must then have as many entries as the noise, in its order; leaves of another size are left
        as they are. ``"linearised"`` has the shape of the gradient already. By default ``"matrix"``, and ``"block"`` for
        ``"linearised"``.
    ridge : float
        Penalty on the squared coefficients, for each draw that is fitted to, in units of the variance of the controls (polynomials
        are scaled to variance 1 under a standard normal). 0 asks for more draws than controls.
    decay : float
        For "moving-average": weight of the last call's moments in this one's. ``n / (1 - decay)`` draws are remembered.
        `init` then looks at a call's shapes, and needs a batch where data are streamed.
    select : int, optional
        For ``per="matrix"`` with "split" or "moving-average": keep the controls that explain most, each by itself, judged on
        the same draws as the coefficients.

    Raises
    ------
    TypeError
        For an estimator that hands over no draws.
    ValueError
        At the first trace: too few draws for that many controls without a ridge, draws that depend on each other or have no such
        noise, leaves that match no noise.

    Notes
    -----
    Unbiased whatever the fit, as the estimator inside is: with all the draws of a call in the fit, it would not be. The
    leave-one-out coefficients cost no more than one fit. They are those of least squares with an intercept; with :math:`n` draws
    and :math:`q` controls in a matrix, what the fit leaves is inflated by about :math:`1 + q/(n - q - 3)`, and a gain must
    be larger than that. ``"moving-average"`` has no such price but is late by ``1/(1 - decay)`` calls, and must see moments
    of all entries, at a memory of :math:`q^2 + qP`.

    A normal guide at a quadratic log density: linear controls leave nothing of the noise in the locations' gradient (with
    "linearised" at any number of draws), quadratic ones nothing in the scales' and factors'. Along Gaussian directions, and
    with mirrored pairs, the draws are even functions of the noise: linear controls take nothing away there, quadratic ones all of
    it on a quadratic objective, with D(D+3)/2 + 4 directions or more (which is dearer than D derivatives along the axes).

    Cost: that of the estimator inside, with one backward pass for each draw in the place of one for their sum, and memory for
    :math:`n` gradients. Linear algebra of :math:`n q \min(n, q)` and :math:`nP` for a matrix. ``"linearised"`` differentiates each
    draw's gradient once more, which ``n_grad`` counts as another draw.

    When not to use it: noise that does not come from the points (subsampled data, discrete sites); few draws with many controls;
    near a good fit, where `Reparam(stl=True)` or a path gradient has little noise anyway.

    References
    ----------
    Mira, Solgi and Imparato (2013); Oates, Girolami and Chopin (2017); reparameterised gradients: Miller, Foti, D'Amour and Adams
    (2017), Geffner and Domke (2018).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from ergodica.estimators import ForwardGradient, SteinControl
    >>> plain = ForwardGradient(lambda x: jnp.sum(x**2), num_directions=12)
    >>> controlled = SteinControl(plain, "quadratic")
    >>> params = jnp.array([1.0, -2.0])
    >>> state = controlled.init(jax.random.key(0), params)
    >>> estimate, state = controlled.estimate(jax.random.key(1), params, state)
    >>> print(estimate.gradient.round(3))
    [ 2. -4.]
    """

    gradient: AbstractGradientEstimator
    controls: Any
    coefficients: str = eqx.field(static=True)
    per: str = eqx.field(static=True)
    ridge: float = eqx.field(static=True)
    decay: float = eqx.field(static=True)
    select: int | None = eqx.field(static=True)

    references: ClassVar = ("mira2013", "oates2017", "miller2017", "geffner2018")

    def __init__(
        self,
        gradient: AbstractGradientEstimator,
        controls: Literal["linear", "quadratic", "linearised"] | Callable[[Array], Array] = "linear",
        coefficients: Literal["leave-one-out", "split", "moving-average", "fixed"] = "leave-one-out",
        per: Literal["matrix", "coordinate", "block", "all"] | None = None,
        *,
        ridge: float = 0.0,
        decay: float = 0.9,
        select: int | None = None,
    ) -> None:
        self.gradient = check_draws(gradient)
        self.controls = (
            as_partial(controls) if callable(controls) else Name(check.one_of("controls", controls, CONTROLS))
        )
        linearised = controls == "linearised"
        self.coefficients = check.one_of("coefficients", coefficients, COEFFICIENTS)
        self.per = check.one_of("per", per or ("block" if linearised else "matrix"), PER)
        check.positive("ridge", ridge, allow_zero=True)
        check.positive("decay", decay, allow_zero=True)
        self.ridge, self.decay = float(ridge), float(decay)  # structure: they decide how many draws are enough
        self.select = None if select is None else check.integer("select", select)
        if self.decay >= 1:
            raise ValueError(f"decay must be below 1; got {decay}.")
        if linearised and self.per == "matrix":
            raise ValueError(
                "controls='linearised' has the shape of the gradient; per must be 'coordinate', 'block' or 'all'."
            )
        if coefficients == "fixed" and not linearised:
            raise ValueError("coefficients='fixed' is 1, which is right for controls='linearised' alone.")
        if select is not None and (self.per != "matrix" or coefficients not in ("split", "moving-average")):
            raise ValueError("select is for per='matrix' with coefficients='split' or 'moving-average'.")

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> SteinState:
        """State of the estimator inside, and empty moments."""
        inner = self.gradient.init(key, params, batch)
        if self.coefficients != "moving-average":
            return SteinState(inner, None)
        shapes = jax.eval_shape(lambda k: self._draws(k, params, inner, batch)[0], jax.random.key(0))
        empty = jax.eval_shape(lambda draws: self._moments(draws, params), shapes)
        return SteinState(inner, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty))

    def estimate(
        self, key: Key, params: PyTree, state: SteinState, batch: Batch | None = None
    ) -> tuple[Estimate, SteinState]:
        """Estimate from the draws of a call, less their controls."""
        draws, inner = self._draws(key, params, state.inner, batch)
        estimate, memory = self._reduced(draws, params, state.memory)
        return estimate, SteinState(inner, memory)

    def probe(self, key: Key, params: PyTree, state: SteinState) -> Estimate | None:
        """An independent estimate, with the moments as they are."""
        found = self.gradient.per_draw(key, params, state.inner, linearise=self._linearised, independent=True)
        return None if found is None else self._reduced(found[0], params, state.memory)[0]

    def reference(self, params: PyTree) -> Reference | None:
        """As the estimator inside."""
        return self.gradient.reference(params)

    def with_budget(self, budget: int) -> "SteinControl | None":
        """The same around the estimator inside with another number of draws."""
        draws = budget // 2 if self._linearised else budget
        inner = self.gradient.with_budget(draws) if draws else None
        return None if inner is None else eqx.tree_at(lambda own: own.gradient, self, inner)

    def evaluations(self, params: PyTree, n_grad: float) -> tuple[float, float]:
        """As the estimator inside."""
        return self.gradient.evaluations(params, n_grad)

    @property
    def posterior(self) -> Any:
        """The posterior inside, if there is one."""
        return self.gradient.posterior

    @property
    def _linearised(self) -> bool:
        return self._kind == "linearised"

    @property
    def _kind(self) -> Any:
        """Name of the controls, or the function."""
        return self.controls.name if isinstance(self.controls, Name) else self.controls

    def _draws(self, key: Key, params: PyTree, inner: Any, batch: Batch | None) -> tuple[Draws, Any]:
        found = self.gradient.per_draw(key, params, inner, batch, linearise=self._linearised)
        if found is None:
            raise ValueError(
                f"gradient must hand over independent draws with smooth noise{' and expand them in it' * self._linearised}; "
                f"this {type(self.gradient).__name__} cannot. ELBOs need Reparam at a Gaussian site, and neither baselines from "
                "other particles nor memories; evolution strategies shaping=None; forward gradients directions='gaussian'"
                f"{'. Black boxes cannot be expanded: use other controls' * self._linearised}."
            )
        return found

    def _reduced(self, draws: Draws, params: PyTree, memory: Moments | None) -> tuple[Estimate, Moments | None]:
        """The estimate, and the moments after it."""
        if self.per == "matrix":
            controls, f = self._shared(draws)
            both, memory = self._by_matrix(controls, f, memory)
            gradient, value = both[:-1], both[-1]
        else:
            f = jax.vmap(tree.ravel)(draws.gradient)
            controls = matched.matched_controls(draws, self._kind, params, f.dtype)
            gradient, memory = self._by_group(controls, f, params, memory)
            value = jnp.mean(draws.value)
        value = value.astype(draws.value.dtype)
        return Estimate(tree.unravel(gradient, params), value, n_grad=draws.n_grad), memory

    def _shared(self, draws: Draws) -> tuple[Array, Array]:
        """Controls (n, q), and gradients with the value as one more entry (n, P + 1)."""
        slopes = jax.vmap(tree.ravel)(draws.gradient)
        f = jnp.concatenate([slopes, draws.value.astype(slopes.dtype)[:, None]], axis=1)
        return shared.shared_controls(draws, self._kind, f.dtype), f

    def _by_matrix(self, controls: Array, f: Array, memory: Moments | None) -> tuple[Array, Moments | None]:
        num, q = controls.shape
        kept = q if self.select is None else check.integer("select", self.select, most=q)
        if self.coefficients == "leave-one-out":
            self._enough(num, kept + 4, kept)
            return shared.leave_one_out_estimate(controls, f, self.ridge), memory
        if self.coefficients == "split":
            self._enough(num, 2 * (kept + 3), kept, least=4)
            return shared.split_estimate(controls, f, self.ridge, self.select), memory
        self._enough_remembered(num, shared.fewest_remembered(kept), kept)
        assert memory is not None
        return shared.remembered_estimate(controls, f, memory, self.ridge, self.decay, self.select)

    def _by_group(
        self, controls: Array, f: Array, params: PyTree, memory: Moments | None
    ) -> tuple[Array, Moments | None]:
        (num, kept), groups = controls.shape[:2], matched.groups_of(params, self.per)
        if self.coefficients == "fixed":
            return jnp.mean(f - controls[:, 0], axis=0), memory
        if self.coefficients == "leave-one-out":
            self._enough(num, kept + 4, kept)
            found = matched.leave_one_out_coefficients(controls, f, groups, self.ridge)
        elif self.coefficients == "split":
            self._enough(num, 2 * (kept + 3), kept, least=4)
            found = matched.split_coefficients(controls, f, groups, self.ridge)
        else:
            self._enough_remembered(num, shared.fewest_remembered(kept), kept)
            assert memory is not None
            found, memory = matched.remembered_coefficients(controls, f, groups, memory, self.ridge, self.decay)
        return matched.left_over(controls, f, found, groups), memory

    def _moments(self, draws: Draws, params: PyTree) -> Moments:
        """Moments of a call, for their shapes."""
        if self.per == "matrix":
            gram, cross = shared.centred_moments(*self._shared(draws))
        else:
            f = jax.vmap(tree.ravel)(draws.gradient)
            controls = matched.matched_controls(draws, self._kind, params, f.dtype)
            parts = matched.grouped_moments(controls, f, matched.groups_of(params, self.per))
            gram, cross = (jnp.sum(x, axis=1) for x in parts)
        return Moments(gram, cross, jnp.zeros((), gram.dtype))

    def _enough(self, num: int, needed: int, num_controls: int, least: int = 2) -> None:
        """Raise where there are too few draws."""
        if num < (needed if self.ridge == 0 else least):
            raise ValueError(
                f"{num_controls} controls with coefficients={self.coefficients!r} need at least {needed} draws without a ridge and "
                f"{least} with one; the {type(self.gradient).__name__} makes {num}. Give it more, or set ridge=1.0, take fewer "
                "controls, coefficients='moving-average', or per='coordinate'."
            )

    def _enough_remembered(self, num: int, needed: int, num_controls: int) -> None:
        """Raise where there are always too few draws."""
        self._enough(num, 2, num_controls)
        remembered = (num - 1) / (1 - self.decay)
        if self.ridge == 0 and _SHARE_IN_TIME * remembered < needed:
            raise ValueError(
                f"{num_controls} controls need {needed} remembered draws without a ridge; decay={self.decay} remembers "
                f"{remembered:.0f}, with {num} a call less one for their mean. Set a larger decay, or ridge=1.0."
            )


def check_draws(gradient: Any) -> AbstractGradientEstimator:
    """Return an estimator that may hand over its draws."""
    check.instance(
        "gradient", gradient, AbstractGradientEstimator, "such as VariationalGradient(ELBO(16), model, guide)"
    )
    if type(gradient).per_draw is AbstractGradientEstimator.per_draw:
        raise TypeError(
            f"gradient must hand over its draws and their noise; {type(gradient).__name__} does not. VariationalGradient, "
            "PathGradient, ReverseKL, EvolutionStrategy and ForwardGradient do."
        )
    return gradient
